"""The gate: nothing is timed on a wrong result."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import AtsnnError
from ..compare import compare_engine, compare_executions
from ..engine import engine_of
from ..nn.model import ATSpikformer
from ..ops import available_backends, use_backend
from ..schedule import undirected

__all__ = ["GateFailed", "check_gate"]


class GateFailed(AtsnnError, AssertionError):
    """A result was wrong, so no timing of it is reported."""


def check_gate(model: ATSpikformer, images: Tensor) -> list[str]:
    """Compare the native backend with the reference, and packed with masked execution.

    Returns
    -------
    list of str
        What was found, one line a comparison.
    """
    found = []
    if model.config.adaptive:
        difference = compare_executions(model, images)
        if difference.flipped == 0 and difference.cells > 0:
            raise GateFailed(
                f"bench: expected packed execution to run the cells of the masked one where no "
                f"spike differs, got {difference.cells} others"
            )
        found.append(str(difference))
    if available_backends()["native"] is not True:
        return ["native kernels not built: the reference is timed", *found]
    with torch.no_grad():
        native = model(images, return_trace=True)  # each operation that has a native kernel
        with use_backend("reference"):
            reference = model(images, return_trace=True)
    for name in ("logits", "scores", "active", "depth"):
        ours, theirs = getattr(native, name), getattr(reference, name)
        if not torch.equal(ours, theirs):
            raise GateFailed(
                f"bench: expected the native backend to give the reference's {name} bit for bit, "
                f"got {int((ours != theirs).sum())} of {ours.numel()} different"
            )
    engine = engine_of(undirected(model))
    found.append(engine if isinstance(engine, str) else str(compare_engine(model, images)))
    return [
        f"native = reference bit for bit on {len(images)} images (logits, scores, depths)",
        *found,
    ]
