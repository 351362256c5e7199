"""Firing rates of an untrained model, set with BatchNorm constants, for measuring speed.

An untrained spiking network is silent after a few layers, and the time of event-driven kernels
follows the spikes. So each BatchNorm is given the statistics of its input and the bias with which
the neurons behind it fire at a chosen rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .checks import InvalidType, InvalidValue, check_number
from .nn.blocks import Context
from .nn.model import ATSpikformer, evaluating
from .nn.neurons import Neuron
from .nn.stem import SpikingPatchSplitting, halve

__all__ = ["set_firing_rates"]

STEPS = 16  # halvings of the interval in which a bias is sought


def set_firing_rates(
    model: ATSpikformer, images: Tensor, spikes: float = 0.05, residual: float = 0.15
) -> None:
    """Set every BatchNorm so that layers fire at given rates on ``images``.

    Parameters
    ----------
    model : ATSpikformer
        Changed in place; its weights stay.
    images : Tensor
        ``[B, C, H, W]`` or ``[T, B, C, H, W]``.
    spikes : float
        Share of the inputs of convolutions (after pooling), of the projection and of the second
        linear layer of the MLP that fire, and of queries, keys and values.
    residual : float
        Share of the residual stream that is not zero, on average over the blocks: what goes into
        queries, keys, values and the first linear layer of the MLP. It grows from block to block,
        by a quarter of its mean in all.
    """
    op = "set_firing_rates"
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"{op}: model must be an ATSpikformer, got {type(model).__name__}")
    check_number(op, "spikes", spikes, above=0, below=1)
    check_number(op, "residual", residual, above=0, below=1)
    if not images.numel():
        raise InvalidValue(f"{op}: images must hold at least one image, got none")
    T, B = (model.config.T, len(images)) if images.dim() == 4 else images.shape[:2]
    added = residual / 4 / (2 * model.config.depth)  # by each of the two halves of a block
    first = 1 - (1 - residual * 7 / 8) ** 0.5  # tokens and positions, one of which fires
    stem = model.patch_embed
    handles = []

    def adjust(layers: nn.Module, name: str, rate: float, pool: str | None = None) -> None:
        bn, neuron = (_part(layers, part, name) for part in ("bn", "lif"))

        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            # Rows [T * B, C, H, W], of a still image [B, ...], or [T * B * N, C].
            x = inputs[0]
            shown = T if x.dim() == 4 and len(x) == B else 1
            _adjust(bn, neuron, x.unflatten(0, (T // shown, -1)), shown, rate, pool)

        handles.append(bn.register_forward_pre_hook(hook))

    for name in (*stem.names, "rpe"):
        pool = model.config.pool if name in stem.pooled else None
        adjust(stem, name, first if name in ("proj3", "rpe") else spikes, pool)
    for block in model.block:
        for part, names in ((block.attn, ("q", "k", "v", "proj")), (block.mlp, ("fc1", "fc2"))):
            for name in names:
                adjust(part, name, added if name in ("proj", "fc2") else spikes)
    try:
        with torch.no_grad(), evaluating(model):
            tokens = model.embed(images)
            for block in model.block:
                _adjust_attention(block.attn, tokens, spikes)
                tokens, _ = block.forward_with_keys(tokens, Context())
    finally:
        for handle in handles:
            handle.remove()


def _part(layers: nn.Module, part: str, name: str) -> Any:
    if isinstance(layers, SpikingPatchSplitting):
        return layers._layer(part, name)
    return getattr(layers, f"{name}_{part}")


def _adjust(bn: Any, neuron: Neuron, x: Tensor, shown: int, rate: float, pool: str | None) -> None:
    """Give ``bn`` the statistics of ``x [T, ...]`` and the bias at which ``neuron`` has ``rate``.

    ``shown``: ``x`` is one timestep that is shown so many times.
    """
    channels = x.flatten(0, 1).transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(channels, dim=1)
    bn.running_mean.copy_(mean)
    bn.running_var.copy_(variance)
    bn.weight.fill_(1.0)
    shape = (-1, *(1,) * (x.dim() - 3))
    y = (x - mean.view(shape)) / (variance + bn.eps).sqrt().view(shape)
    if pool == "before_lif":
        y = _halved(y)
    if shown > 1:
        y = y.expand(shown, *y.shape[1:])

    def fires(bias: float) -> float:
        s = neuron.run(y + bias)[0]
        return float((_halved(s) if pool == "after_lif" else s).mean())

    bn.bias.fill_(_bisect(fires, rate, -8.0, 8.0))


def _halved(x: Tensor) -> Tensor:
    """Maps ``[T, B, C, H, W]`` pooled."""
    return halve(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _adjust_attention(attention: Any, tokens: Tensor, rate: float) -> None:
    """Set the threshold of the neurons behind the attention, whose input is what it is."""
    q, k, v = (Context().layer(attention, name, tokens) for name in "qkv")
    neuron = attention.attn_lif

    def fires(threshold: float) -> float:
        neuron.v_threshold = -threshold
        return float(attention.attend(q, k, v, Context()).mean())

    neuron.v_threshold = -_bisect(fires, rate, -8.0, -(2.0**-6))


def _bisect(grows: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The smallest argument, nearly, at which a growing function reaches ``wanted``."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if grows(middle) < wanted else (low, middle)
    return high
