"""Optimiser, learning rate and moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from ..nn.model import ATSpikformer
from .config import TrainConfig

__all__ = ["measure_statistics", "moving_average", "optimizer_of", "schedule_of"]


def optimizer_of(model: ATSpikformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; ``alpha`` and ``beta`` learn ten times as fast, without weight decay."""
    halting = [] if model.halting is None else [model.halting.alpha, model.halting.beta]
    fast = {id(p) for p in halting}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in fast]},
    ]
    if halting:
        groups.append({"params": halting, "lr": config.lr * 10, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def schedule_of(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> LambdaLR:
    """A linear rise from 0 over ``warmup`` of the steps, then half a cosine down to 0."""
    rise = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return LambdaLR(optimizer, factor)


def moving_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The exponential moving average of the weights, if one is asked for.

    Its BatchNorm statistics have to be measured (:func:`measure_statistics`): what layers put out
    with averaged weights is not the average of what they put out, and spikes are sensitive to it.
    """
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


@torch.no_grad()
def measure_statistics(average: AveragedModel, batches: Iterable[Tensor]) -> None:
    """Set the BatchNorm statistics of averaged weights to their means over training images."""
    update_bn(batches, average.module)
