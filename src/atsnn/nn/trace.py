"""What a forward pass tells of itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import TokenLayout


@dataclass
class Trace:
    """What a forward pass did, beside its logits.

    Attributes
    ----------
    logits : Tensor
        ``[B, num_classes]``; ``[B, num_classes, H, W]`` with ``task="pixels"``.
    active : Tensor
        ``[L, T, B, N]`` bool, the executed cells; a merged-away token is not active.
    depth : Tensor
        ``[T, B, N]`` int64, blocks executed for each original token: from the merge on, those of
        the token that holds it.
    ponder_loss : Tensor
        0-d, ``mean over t, k of (D + w[D])``.
    scores : Tensor
        ``[L, T, B, N]`` float32, zero where not executed.
    weights : Tensor
        ``[L, T, B, N]`` float32, readout weights.
    sizes : Tensor
        ``[B, N]`` float32 after the last block.
    block_sizes : Tensor
        ``[L, B, N]`` float32, in each block.
    source : Tensor
        ``[B, N]`` int64, the token that holds each original token after the last block.
    firing_rates : dict of str to float
        Spikes per neuron and active cell of every spiking layer, and of what goes into the
        convolutions, the attention and the MLP (``*.input``; an integer k counts as k spikes).
    """

    logits: Tensor
    active: Tensor
    depth: Tensor
    ponder_loss: Tensor
    scores: Tensor
    weights: Tensor
    sizes: Tensor
    block_sizes: Tensor
    source: Tensor
    firing_rates: dict[str, float]


class FiringRates:
    """Spikes per neuron and active cell, by layer, summed over calls."""

    def __init__(self) -> None:
        self.spikes: dict[str, float] = {}
        self.neurons: dict[str, float] = {}

    def __call__(self, name: str, spikes: Tensor, layout: TokenLayout | None) -> None:
        cells = spikes.numel() if layout is None else layout.num_rows * spikes.shape[-1]
        total = float(spikes.detach().sum(dtype=torch.float64))
        self.spikes[name] = self.spikes.get(name, 0.0) + total
        self.neurons[name] = self.neurons.get(name, 0.0) + cells

    def rates(self) -> dict[str, float]:
        return {name: s / max(self.neurons[name], 1.0) for name, s in self.spikes.items()}
