"""Synthetic halting: a chosen share of cells, for measuring what halting saves without training.

The patterns have the method's nesting: a cell that runs runs in every earlier block, and at every
earlier timestep of its block.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .checks import InvalidValue, check_integer, check_number, check_shape, check_tensor
from .nn.execution import PackedRun
from .nn.model import ATSpikformer

__all__ = ["scheduled", "synthetic_depths", "synthetic_scores"]


def synthetic_depths(L: int, T: int, B: int, N: int, share: float, seed: int = 0) -> Tensor:
    """Depths at which tokens stop, so that about ``share`` of the ``L * T * B * N`` cells run.

    Parameters
    ----------
    L, T, B, N : int
        Blocks, timesteps, images, tokens.
    share : float
        From ``1 / L``, every token stopping after block 1, to 1.
    seed : int

    Returns
    -------
    Tensor
        ``[T, B, N]`` int64 in ``1 .. L``, not increasing in ``t``: tokens differ by a uniform
        random amount of half the blocks, and stop a block earlier or so at the last timestep
        than at the first.
    """
    op = "synthetic_depths"
    for name, value in (("L", L), ("T", T), ("B", B), ("N", N)):
        check_integer(op, name, value, at_least=1)
    check_number(op, "share", share)
    if not 1 / L <= share <= 1:
        raise InvalidValue(f"{op}: share must lie in 1 / L = {1 / L:.3g} .. 1, got {share}")
    generator = torch.Generator().manual_seed(seed)
    spread = (torch.rand((1, B, N), generator=generator) - 0.5) * L / 2
    slope = torch.arange(T).view(T, 1, 1) / max(T - 1, 1)

    def depths(level: float) -> Tensor:
        return (level + spread - slope).round().clamp(1, L).to(torch.int64)

    low, high = -2.0 * L, 3.0 * L
    for _ in range(40):
        middle = (low + high) / 2
        if float(depths(middle).double().mean()) < share * L:
            low = middle
        else:
            high = middle
    return depths(high)


def synthetic_scores(depths: Tensor, L: int) -> Tensor:
    """Scores ``[L, T, B, N]`` with which tokens stop at ``depths [T, B, N]``.

    A score of 1 in the last cell that is to run, 0 elsewhere: so it is for the rectangle as for
    the depth accumulator.
    """
    op = "synthetic_scores"
    check_shape(op, "depths", check_tensor(op, "depths", depths), T=None, B=None, N=None)
    if depths.numel() and not 1 <= int(depths.min()) <= int(depths.max()) <= L:
        raise InvalidValue(
            f"{op}: depths must lie in 1 .. L = {L}, got {int(depths.min())} .. {int(depths.max())}"
        )
    blocks = torch.arange(1, L + 1, device=depths.device).view(L, 1, 1, 1)
    return (blocks == depths).to(torch.float32)


class _Scheduled(ATSpikformer):
    """A model whose tokens stop where they are told; its own scores are computed all the same."""

    schedule: Tensor

    def _scores(self, number: int, run: PackedRun) -> Tensor | None:
        own = super()._scores(number, run)
        given = run.layout.pack(self.schedule[number])
        # The gradient goes to the own score, so that training costs what it costs.
        return given if own is None else own + (given - own).detach()


def scheduled(model: ATSpikformer, scores: Tensor) -> ATSpikformer:
    """``model`` with its halting scores replaced by ``scores [L, T, B, N]``; weights are shared."""
    c = model.config
    if c.halting not in ("rectangle", "depth"):
        raise InvalidValue(
            f"scheduled: the model must halt by 'rectangle' or 'depth', got {c.halting!r}"
        )
    check_shape("scheduled", "scores", scores, L=c.depth, T=None, B=None, N=None)
    twin = copy.copy(model)
    twin.__class__ = _Scheduled
    assert isinstance(twin, _Scheduled)
    twin.schedule = scores
    return twin
