"""What a model gets right, and which cells it executes for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..checks import InvalidValue
from ..data import Split
from ..nn.model import ATSpikformer, evaluating

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and executed cells of a model on a split.

    Attributes
    ----------
    accuracy : float
        Share of images classified right; of pixels with ``task="pixels"``.
    cells : float
        Share of the ``L * T * N`` cells of an image that were executed.
    images : int
    cells_by_block, cells_by_timestep : list of float
        The same share for each block and for each timestep.
    loss : float
        Mean cross-entropy.
    mean_iou : float, optional
        With ``task="pixels"``: intersection over union of each class that occurs, averaged.
    """

    accuracy: float
    cells: float
    images: int
    cells_by_block: list[float]
    cells_by_timestep: list[float]
    loss: float
    mean_iou: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate(model: ATSpikformer, split: Split, batch_size: int = 128) -> Evaluation:
    """Accuracy and executed cells of ``model``, in evaluation mode, on ``split``.

    With ``task="pixels"`` the split must have ``maps``.
    """
    if len(split) == 0:
        raise InvalidValue("evaluate: expected at least one image, got none")
    c = model.config
    truth = target_of(split, c.task)
    device = next(model.parameters()).device
    confusion = torch.zeros(c.num_classes, c.num_classes, dtype=torch.int64)
    loss, cells = 0.0, torch.zeros(c.depth, c.T)
    with evaluating(model):
        for start in range(0, len(split), batch_size):
            part = slice(start, start + batch_size)
            labels = truth[part].long().to(device)
            trace = model(split[part].images.to(device), return_trace=True, firing_rates=False)
            pairs = labels * c.num_classes + trace.logits.argmax(1)
            confusion += (
                pairs.flatten().bincount(minlength=c.num_classes**2).view_as(confusion).cpu()
            )
            loss += float(nnf.cross_entropy(trace.logits.float(), labels, reduction="sum"))
            cells += trace.active.sum((2, 3)).cpu()
    share = cells / (len(split) * c.grid**2)
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    return Evaluation(
        accuracy=int(right.sum()) / truth.numel(),
        cells=float(share.mean()),
        images=len(split),
        cells_by_block=share.mean(1).tolist(),
        cells_by_timestep=share.mean(0).tolist(),
        loss=loss / truth.numel(),
        mean_iou=float((right / union)[union > 0].mean()) if c.task == "pixels" else None,
    )


def target_of(split: Split, task: str) -> Tensor:
    """What a model is to say of each image: its class ``[M]``, or its pixels' ``[M, H, W]``."""
    if task == "classes":
        return split.labels
    if split.maps is None:
        raise InvalidValue(
            "task='pixels' expects a data set with the class of every pixel, such as "
            "scenes-digits, got one without"
        )
    return split.maps
