"""What the conversions have in common."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import InvalidType, InvalidValue
from ..nn.config import SpikformerConfig
from ..nn.model import ATSpikformer

# What the tensors say; another value would be another network.
FIXED = (
    "embed_dim",
    "depth",
    "in_channels",
    "num_classes",
    "mlp_ratio",
    "bias",
    "attention",
    "task",
)

COUNTER = "num_batches_tracked"  # of a BatchNorm, the one tensor of integers


def plain(config: SpikformerConfig) -> SpikformerConfig:
    return config.replace(halting=None, merge_r=0, merge_threshold=None)


def check_plain(op: str, model: ATSpikformer, drop_halting: bool) -> None:
    """Refuse what other Spikformers do not have."""
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"{op}: model must be an ATSpikformer, got {type(model).__name__}")
    config = model.config
    if config.attention != "ssa":
        raise InvalidValue(
            f"{op}: expected Spikformer's attention 'ssa', got attention={config.attention!r}"
        )
    if config.task != "classes":
        raise InvalidValue(
            f"{op}: expected a model of an image's class, task='classes', got task={config.task!r}"
        )
    if config.adaptive and not drop_halting:
        raise InvalidValue(
            f"{op}: expected a model without halting and merging, which Spikformer does not have, "
            f"got halting={config.halting!r}, merge_r={config.merge_r}, "
            f"merge_threshold={config.merge_threshold}; drop_halting=True leaves them out, "
            "which changes the numbers"
        )


def check_fixed(op: str, config: SpikformerConfig, overrides: Mapping[str, Any]) -> None:
    for name in FIXED:
        if name in overrides and overrides[name] != getattr(config, name):
            raise InvalidValue(
                f"{op}: {name} must be {getattr(config, name)!r}, as in the given weights, "
                f"got {overrides[name]!r}"
            )


def ratio_of(hidden: int, dim: int) -> float:
    """The ``mlp_ratio`` with ``int(dim * mlp_ratio) = hidden``, in spite of rounding."""
    ratio = hidden / max(dim, 1)
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def build(config: SpikformerConfig, state: dict[str, Tensor], dtype: torch.dtype) -> ATSpikformer:
    model = ATSpikformer(config).to(dtype)
    model.load_state_dict({**model.state_dict(), **state})  # halting keeps what it starts with
    return model


def fold_biases(state: Mapping[str, Tensor], linears: Collection[str]) -> dict[str, Tensor]:
    """``state`` with these layers' biases taken off the means of the BatchNorms behind them."""
    state = dict(state)
    for linear in linears:
        bias = state.pop(f"{linear}.bias", None)
        if bias is not None and bool(bias.any()):
            mean = f"{linear.removesuffix('_linear')}_bn.running_mean"
            state[mean] = state[mean] - bias
    return state
