"""BatchNorm statistics as inference sees them, measured after training."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..nn.model import batch_norms

__all__ = ["measure_statistics"]


@torch.no_grad()
def measure_statistics(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set BatchNorm statistics to their means over training images, as inference will see them.

    The statistics that training keeps are a moving average over its last ten batches or so, whose
    weights differed ("precise BatchNorm" measures them with the final ones: Wu and Johnson, arXiv
    2105.07576, section 3). And they are of layers whose inputs were normalised by the batch itself.
    That matters to spikes: where an image is empty a layer gives the same number everywhere, and a
    threshold close to it makes all of these neurons fire in one batch and none in the next; what
    the following layers keep is a mean of the two, which is neither. So each BatchNorm is measured
    with all before it as they are in inference, from the first to the last.

    Parameters
    ----------
    model : Module
        Left in training mode. A BatchNorm that no batch updates keeps its statistics: one of a
        block in which no token was active, or of a sequential accumulator's blocks, which train
        with theirs as they are.
    batches : sequence of Tensor
        Images, each in the form that ``model`` takes; run once, and for every BatchNorm up to it.
    """
    norms = batch_norms(model)
    model.train()
    for norm in norms:
        norm.eval()
    try:
        for norm in _in_order(model, norms, batches):
            _measure(model, norm, batches)
    finally:
        model.train()


class _Reached(Exception):
    """The BatchNorm that is measured has run."""


def _in_order(
    model: nn.Module, norms: Sequence[BatchNorm], batches: Sequence[Tensor]
) -> list[BatchNorm]:
    """Those that run, as they first do."""
    seen: dict[BatchNorm, None] = {}
    hooks = [norm.register_forward_hook(lambda norm, *_: seen.setdefault(norm)) for norm in norms]
    for images in batches:
        model(images)
    for hook in hooks:
        hook.remove()
    return list(seen)


def _measure(model: nn.Module, norm: BatchNorm, batches: Sequence[Tensor]) -> None:
    def reached(*_: Any) -> None:
        raise _Reached

    tracked = norm.num_batches_tracked
    assert tracked is not None
    momentum, before = norm.momentum, tracked.clone()
    norm.momentum = None  # the mean of all batches, of which the first replaces what was there
    tracked.zero_()
    norm.train()
    hook = norm.register_forward_hook(reached)
    try:
        for images in batches:
            with contextlib.suppress(_Reached):
                model(images)
    finally:
        hook.remove()
        norm.eval()
        norm.momentum = momentum
        tracked.copy_(before)
