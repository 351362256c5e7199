"""Spikformer's patch embedding (spiking patch splitting): images to tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn

from .blocks import Context, _lif
from .config import SpikformerConfig


class SpikingPatchSplitting(nn.Module):
    """Four convolutions, each with BN and LIF, then a convolution for relative position.

    Parameter names are those of Spikformer's published code. Inside, channels come last in memory:
    in training, convolutions, BatchNorm and pooling take half the time so, and the maps are tokens.

    Parameters
    ----------
    config : SpikformerConfig
        ``stem`` says after which convolutions the maps are halved, ``pool`` whether spikes or
        potentials are pooled.
    """

    def __init__(self, config: SpikformerConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        widths = (config.in_channels, dim // 8, dim // 4, dim // 2, dim)
        self.names = ("proj", "proj1", "proj2", "proj3")
        self.pooled = self.names[2:] if config.stem == "cifar" else self.names
        self.pool_spikes = config.pool == "after_lif"
        for name, before, after in zip(self.names, widths, widths[1:], strict=False):
            self._add(name, before, after, config)
        self._add("rpe", dim, dim, config)

    def _add(self, name: str, before: int, after: int, config: SpikformerConfig) -> None:
        stem, number = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
        setattr(self, f"{stem}_conv{number}", nn.Conv2d(before, after, 3, padding=1, bias=False))
        setattr(self, f"{stem}_bn{number}", nn.BatchNorm2d(after))
        lif = _lif(config.tau, config.surrogate, config.alpha)
        setattr(self, f"{stem}_lif{number}", lif)

    def _layer(self, part: str, name: str) -> Any:
        number = name.lstrip("abcdefghijklmnopqrstuvwxyz")
        return getattr(self, f"{name.rstrip('0123456789')}_{part}{number}")

    def _stage(self, name: str, x: Tensor, context: Context, still: int) -> Tensor:
        """One convolution with BN, pooling and LIF; ``still`` > 0 repeats its output ``T`` times.

        The convolution of a still image is the same at every timestep, so it runs once. In
        training BatchNorm sees the repeated maps, as the unbiased running variance counts them.
        """
        conv, bn = self._layer("conv", name), self._layer("bn", name)
        context.note(f"{name}.input", _channels_first(x))
        y = _maps(conv, x)
        if still and self.training:
            y, still = y.expand(still, *y.shape[1:]), 0
        y = _maps(bn, y)
        if name in self.pooled and not self.pool_spikes:
            y = _maps(halve, y)
        if still:
            y = y.expand(still, *y.shape[1:])
        y, _ = self._layer("lif", name).run(y)
        context.note(f"{name}_lif", _channels_first(y))
        if name in self.pooled and self.pool_spikes:
            y = _maps(halve, y)
        return y

    def forward(self, x: Tensor, T: int = 0, context: Context | None = None) -> Tensor:
        """Images to tokens.

        Parameters
        ----------
        x : Tensor
            ``[T, B, C, H, W]``, or ``[1, B, C, H, W]`` to be shown ``T`` times.
        T : int
            0, or the number of timesteps of a still image.

        Returns
        -------
        Tensor
            ``[T, B, N, C]``, small non-negative integers.
        """
        context = context or Context()
        x = x.movedim(2, -1)
        for name in self.names:
            x = self._stage(name, x, context, T)
            T = 0
        x = x + self._stage("rpe", x, context, 0)
        return x.flatten(2, 3).contiguous()


def _maps(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer of maps ``[M, C, H, W]`` on ``x [T, B, H, W, C]``."""
    y = layer(_channels_first(x.contiguous().flatten(0, 1)))
    return y.movedim(-3, -1).contiguous().unflatten(0, x.shape[:2])


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, -3)


def halve(x: Tensor) -> Tensor:
    """Maps ``[M, C, H, W]`` pooled to half their height and width."""
    return nnf.max_pool2d(x, 3, 2, 1)
