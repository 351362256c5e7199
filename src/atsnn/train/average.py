"""The moving average of the weights, and BatchNorm statistics measured after training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..nn.model import batch_norms
from .config import TrainConfig

__all__ = ["measure_statistics", "moving_average"]


def moving_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The exponential moving average of the weights, if one is asked for.

    Its BatchNorm statistics have to be measured (:func:`measure_statistics`): what layers put out
    with averaged weights is not the average of what they put out, and spikes are sensitive to it.
    So are the scores' thresholds, which is why the budget is met by
    :func:`~atsnn.train.calibrate`.
    """
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set BatchNorm statistics to their means over training images, with the weights as they are.

    The statistics that training keeps are a moving average over its last ten batches or so, whose
    weights differed; one odd batch stands out in it, and neurons with a threshold pass that on
    ("precise BatchNorm", Wu and Johnson, arXiv 2105.07576, section 3).

    Parameters
    ----------
    model : Module
        Left in training mode. A BatchNorm that no batch updates keeps its statistics: one of a
        block in which no token was active, or of a sequential accumulator's blocks, which train
        with theirs as they are.
    batches : iterable of Tensor
        Images, each in the form that ``model`` takes.
    """
    kept = [
        (norm, norm.momentum, tracked, tracked.clone())
        for norm in batch_norms(model)
        if (tracked := norm.num_batches_tracked) is not None
    ]
    for norm, _, tracked, _ in kept:
        norm.momentum = None  # the mean of all batches, of which the first replaces what was there
        tracked.zero_()
    model.train()
    try:
        for images in batches:
            model(images)
    finally:
        for norm, momentum, tracked, before in kept:
            norm.momentum = momentum
            tracked.copy_(before)
