"""Spikes on their way from one layer to the next, as bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OPS = torch.ops.atsnn


@dataclass(frozen=True)
class Spikes:
    """Maps ``[T, B, channels, ...]`` of zeros and ones.

    Attributes
    ----------
    bits : Tensor
        ``[T, B, ..., words]`` int64, channels last.
    channels : int
    count : int
        Ones among them.
    """

    bits: Tensor
    channels: int
    count: int

    @property
    def numel(self) -> int:
        return self.bits[..., 0].numel() * self.channels

    def dense(self) -> Tensor:
        """``[T, B, channels, ...]`` float32, contiguous."""
        lead = self.bits.shape[:2]
        return OPS.unpack_maps(self.bits.flatten(0, 1), self.channels).unflatten(0, lead)


def dense(x: Tensor | Spikes) -> Tensor:
    return x.dense() if isinstance(x, Spikes) else x
