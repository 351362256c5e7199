"""What training minimises."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from ..nn.trace import Trace
from .config import TrainConfig

__all__ = ["executed_share", "training_loss"]


def executed_share(trace: Trace) -> Tensor:
    """The share of cells that a batch executed, 0-d float64."""
    return trace.active.double().mean()


def training_loss(
    trace: Trace,
    target: Tensor,
    config: TrainConfig,
    share: float,
    progress: float = 1.0,
    taught: Tensor | None = None,
) -> Tensor:
    """Loss of a batch.

    Cross-entropy, plus where scores are learned the ponder loss: ``ponder_weight * (share -
    target) * ponder`` towards a budget, or ``ponder_weight * ponder``.

    Parameters
    ----------
    trace : Trace
    target : Tensor
        Classes, ``[B]`` or ``[B, H, W]`` int64.
    config : TrainConfig
    share : float
        Executed share of cells of the whole batch, over all processes.
    progress : float
        Share of the run's steps that are done, for the ponder weight's warm-up and the budget's
        fall.
    taught : Tensor, optional
        Class probabilities of the checkpoint that is distilled, shaped like the logits.
    """
    loss = nnf.cross_entropy(trace.logits, target, label_smoothing=config.label_smoothing)
    if taught is not None:
        loss = loss + config.distill * (nnf.cross_entropy(trace.logits, taught) - loss)
    if config.halts:
        pull = 1.0 if config.target is None else share - _budget(config.target, config, progress)
        weight = config.ponder_weight
        if config.ponder_warmup:
            weight *= min(1.0, progress / config.ponder_warmup)
        loss = loss + weight * pull * trace.ponder_loss
    return loss


def _budget(target: float, config: TrainConfig, progress: float) -> float:
    """The share of cells to aim at now."""
    left = 1 - progress / config.target_anneal if config.target_anneal else 0.0
    return target + (1 - target) * max(0.0, left)
