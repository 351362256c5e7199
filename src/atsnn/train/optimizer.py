"""Optimiser and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..nn.model import ATSpikformer
from .config import TrainConfig

__all__ = ["optimizer_of", "schedule_of"]


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
