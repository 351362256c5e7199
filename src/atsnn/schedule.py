"""Halting by a rule instead of learned scores.

Synthetic patterns measure what a share of halted cells saves without training; policies are what
learned halting is compared with: one schedule for all tokens, tokens picked at random, or those
that fire most. All have the method's nesting: a cell that runs runs in every earlier block, and at
every earlier timestep of its block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from .checks import (
    InvalidType,
    InvalidValue,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
)
from .nn.config import SpikformerConfig
from .nn.execution import PackedRun
from .nn.model import ATSpikformer

__all__ = [
    "check_policy",
    "directed",
    "policy_scores",
    "rule_of",
    "scheduled",
    "score_of",
    "synthetic_depths",
    "synthetic_scores",
    "undirected",
]


def synthetic_depths(
    L: int, T: int, B: int, N: int, share: float, seed: int = 0, spread: float = 0.5
) -> Tensor:
    """Depths at which tokens stop, so that about ``share`` of the ``L * T * B * N`` cells run.

    Parameters
    ----------
    L, T, B, N : int
        Blocks, timesteps, images, tokens.
    share : float
        From ``1 / L``, every token stopping after block 1, to 1.
    seed : int
    spread : float
        How much tokens differ, as a share of the blocks.

    Returns
    -------
    Tensor
        ``[T, B, N]`` int64 in ``1 .. L``, not increasing in ``t``: tokens differ by a uniform
        random amount of at most ``spread * L`` blocks, and stop a block earlier or so at the last
        timestep than at the first.
    """
    op = "synthetic_depths"
    for name, value in (("L", L), ("T", T), ("B", B), ("N", N)):
        check_integer(op, name, value, at_least=1)
    check_number(op, "share", share)
    if not 1 / L <= share <= 1:
        raise InvalidValue(f"{op}: share must lie in 1 / L = {1 / L:.3g} .. 1, got {share}")
    generator = torch.Generator().manual_seed(seed)
    apart = (torch.rand((1, B, N), generator=generator) - 0.5) * L * spread
    slope = torch.arange(T).view(T, 1, 1) / max(T - 1, 1)

    def depths(level: float) -> Tensor:
        return (level + apart - slope).round().clamp(1, L).to(torch.int64)

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


# Scores [T, B, N] after a block, given its number from 0 and the pass.
Policy = Callable[[int, PackedRun], Tensor]


class _Directed(ATSpikformer):
    """A model whose tokens stop where a rule says."""

    policy: Policy
    learns: bool
    rule: str  # what a reader is told it halts by

    def without_halting(self) -> ATSpikformer:
        return undirected(super().without_halting())

    def _scores(self, number: int, run: PackedRun) -> Tensor | None:
        given = run.layout.pack(self.policy(number, run).float())  # also under autocast
        if not self.learns:
            return given
        # Its own scores are computed all the same and get the gradient, so that a training step
        # costs what it costs.
        own = super()._scores(number, run)
        return given if own is None else own + (given - own).detach()


def _direct(op: str, model: ATSpikformer, policy: Policy, learns: bool, rule: str) -> ATSpikformer:
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"{op}: model must be an ATSpikformer, got {type(model).__name__}")
    _check_accumulator(op, model.config)
    twin = copy.copy(model)
    twin.__class__ = _Directed
    assert isinstance(twin, _Directed)
    twin.policy, twin.learns, twin.rule = policy, learns, rule
    return twin


def rule_of(model: ATSpikformer) -> str | None:
    """The rule that halts the tokens of ``model``; None: its scores do, or nothing."""
    return model.rule if isinstance(model, _Directed) else None


def undirected(model: ATSpikformer) -> ATSpikformer:
    """``model`` without a rule: its tokens halt by its scores; weights are shared."""
    if rule_of(model) is None:
        return model
    twin = copy.copy(model)
    twin.__class__ = ATSpikformer
    return twin


@torch.no_grad()
def policy_scores(model: ATSpikformer, images: Tensor) -> Tensor | None:
    """The scores ``[L, T, B, N]`` that a rule gives for ``images``; None: the model's own halt.

    They are what an engine is given, which knows no rules:
    ``freeze(undirected(model))(images, scores=policy_scores(model, images))``.
    """
    if rule_of(model) is None:
        return None
    trace = model(images, return_trace=True)
    return cast(Tensor, trace.scores)


def score_of(model: ATSpikformer) -> str | None:
    """What the tokens of ``model`` halt by: a score's name, or a rule; None: they do not halt."""
    return rule_of(model) or (model.config.score if model.config.halting else None)


def _check_accumulator(op: str, config: SpikformerConfig) -> None:
    if config.halting not in ("rectangle", "depth"):
        raise InvalidValue(
            f"{op}: halting must be 'rectangle' or 'depth', where a rule can give the scores, "
            f"got {config.halting!r}"
        )


def scheduled(model: ATSpikformer, scores: Tensor) -> ATSpikformer:
    """``model`` with its halting scores replaced by ``scores [L, T, B, N]``; weights are shared."""
    shape = {"L": model.config.depth, "T": None, "B": None, "N": None}
    check_shape("scheduled", "scores", scores, **shape)
    return _direct("scheduled", model, lambda number, run: scores[number], True, "given scores")


# -- policies -------------------------------------------------------------------------------------


def directed(model: ATSpikformer, policy: str | None) -> ATSpikformer:
    """``model`` with its tokens halted by a rule; weights are shared.

    Parameters
    ----------
    model : ATSpikformer
        Which halts by ``"rectangle"`` or ``"depth"``; its scores are not used.
    policy : str or None
        None: no rule, the model itself is returned.

        ``"static:D1,D2,..."``
            Every token runs ``D_t`` blocks at timestep ``t``, as many numbers as timesteps, none
            larger than the one before it.
        ``"random:SHARE"``
            Tokens stop at random depths (:func:`synthetic_depths`), so that ``SHARE`` of the cells
            run; others in every call of a model in training, the same ones in evaluation.
        ``"top:S1,S2,..."``
            After block ``l`` the share ``S_l`` of an image's tokens goes on, those with the most
            spikes in the residual stream over all timesteps (ties by the lower index), as
            TP-Spikformer prunes; ``depth - 1`` shares, none larger than the one before it.
    """
    if policy is None:
        return model
    check_policy("directed", policy, model.config)
    return _direct("directed", model, _policy("directed", policy), False, policy)


def check_policy(op: str, policy: str, config: SpikformerConfig) -> None:
    """Refuse a policy that is none, or none of this configuration's."""
    _check_accumulator(op, config)
    kind, values = _parsed(op, policy)
    count = {"static": config.T, "random": 1, "top": config.depth - 1}[kind]
    low, high = (1, config.depth) if kind == "static" else (0.0, 1.0)
    if kind == "random":
        low = 1 / config.depth
    if len(values) != count or not all(low <= value <= high for value in values):
        raise InvalidValue(
            f"{op}: policy must name {count} numbers in {low:.3g} .. {high:.3g} for {kind!r}, "
            f"got {policy!r}"
        )
    if any(after > before for before, after in pairwise(values)):
        raise InvalidValue(f"{op}: policy must name numbers that do not rise, got {policy!r}")


def _parsed(op: str, policy: str) -> tuple[str, list[float]]:
    if not isinstance(policy, str):
        raise InvalidType(f"{op}: policy must be a string, got {type(policy).__name__}")
    kind, _, rest = policy.partition(":")
    try:
        if kind not in ("static", "random", "top"):
            raise ValueError
        return kind, [int(v) if kind == "static" else float(v) for v in rest.split(",") if v]
    except ValueError:
        raise InvalidValue(
            f"{op}: policy must be static:D1,D2,..., random:SHARE or top:S1,S2,..., got {policy!r}"
        ) from None


def _policy(op: str, policy: str) -> Policy:
    kind, values = _parsed(op, policy)
    if kind == "static":
        return _Static(torch.tensor(values))
    if kind == "random":
        return _Random(values[0])
    return _Top(values)


class _Static:
    def __init__(self, depths: Tensor) -> None:
        self.depths = depths

    def __call__(self, number: int, run: PackedRun) -> Tensor:
        stops = (self.depths == number + 1).to(run.x)
        _, B, N = run.layout.mask.shape
        return stops.view(-1, 1, 1).expand(-1, B, N)


class _Random:
    """Depths are drawn at the first block of a call; generators follow the caller's seed."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.scores = torch.empty(0)

    def __call__(self, number: int, run: PackedRun) -> Tensor:
        T, B, N = run.layout.mask.shape
        L = run.config.depth
        if number == 0:
            seed = int(torch.randint(2**31, ())) if torch.is_grad_enabled() else 0
            depths = synthetic_depths(L, T, B, N, self.share, seed, spread=2.0)
            self.scores = synthetic_scores(depths, L)
        return self.scores[number].to(run.x)


class _Top:
    def __init__(self, shares: list[float]) -> None:
        self.shares = shares

    def __call__(self, number: int, run: PackedRun) -> Tensor:
        mask = run.layout.mask
        _, _, N = mask.shape
        if number == len(self.shares):
            return torch.zeros_like(mask, dtype=run.x.dtype)
        x = run.x.detach()
        spikes = (run.layout.unpack(x) if run.packed else x).sum((0, 3))
        # Those that stopped before come last.
        spikes = spikes.masked_fill(~mask.any(0), -1)
        order = spikes.argsort(dim=1, descending=True, stable=True)
        stops = torch.zeros_like(spikes)
        stops.scatter_(1, order[:, round(self.shares[number] * N) :], 1.0)
        return stops.expand(mask.shape)
