"""Halting: scores, accumulators, readout weights and depths, block by block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue, check_choice, check_integer, check_number
from ..reference import ACCUMULATORS, SCORES, accumulate

START_SHARE = 0.85  # share of cells that the constant score executes to begin with


def starting_beta(L: int, T: int, accumulator: str = "rectangle", eps: float = 0.01) -> float:
    """The ``beta`` at which the constant score executes the attainable share nearest to 85 %.

    The share of executed cells is a step function of ``beta``; of its values the smallest one
    that is at least 85 % is taken, at the middle of its interval.
    """
    step = 0.01
    betas = torch.arange(-12.0, 4.0, step, dtype=torch.float64)
    h = torch.sigmoid(betas).to(torch.float32).expand(L, T, 1, len(betas))
    share = accumulate(h, accumulator, eps).active.double().mean((0, 1)).squeeze(0)
    least = share[share >= START_SHARE].min()
    at = betas[share == least]
    # Where nothing halts the interval has no lower end: stay just below the first halting.
    return float(at[-1] - 5 * step) if least == 1 else float(at.mean())


class Halting(nn.Module):
    """Halting scores ``h = sigmoid(alpha * f(x) + beta)`` with learned ``alpha`` and ``beta``.

    Parameters
    ----------
    dim : int
        Channels ``C``.
    score : {"first", "mean", "linear", "constant"}
        What ``f`` is; see :func:`atsnn.functional.halting_scores`.
    eps : float
        A cell is active while its accumulator is below ``1 - eps``.
    accumulator : {"rectangle", "depth", "sequential"}
    depth, T : int
        Blocks and timesteps the initial ``beta`` is solved for.
    alpha, beta : float
        Initial values; by default 1 and :func:`starting_beta`. An initial constant score of
        0.99 or more is refused: every token would stop after block 1, and no gradient could
        undo it.
    """

    def __init__(
        self,
        dim: int,
        score: str = "first",
        eps: float = 0.01,
        accumulator: str = "rectangle",
        *,
        depth: int = 4,
        T: int = 4,
        alpha: float = 1.0,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        check_integer("Halting", "dim", dim, at_least=1)
        check_choice("Halting", "score", score, SCORES)
        check_choice("Halting", "accumulator", accumulator, ACCUMULATORS)
        check_number("Halting", "eps", eps, above=0, below=1)
        check_number("Halting", "alpha", alpha)
        if beta is None:
            beta = starting_beta(depth, T, accumulator, eps)
        check_number("Halting", "beta", beta)
        start = torch.sigmoid(torch.tensor(beta, dtype=torch.float64)).item()
        if start >= 0.99:
            raise InvalidValue(
                f"Halting: the initial score sigmoid(beta) must be below 0.99, "
                f"got {start:.4f} for beta = {beta}"
            )
        self.dim, self.score, self.eps, self.accumulator = dim, score, eps, accumulator
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        if score == "constant":
            self.alpha.requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(dim)) if score == "linear" else None

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[...]`` of tokens ``x [..., C]``."""
        weight = self.alpha if self.weight is None else self.alpha * self.weight
        return F.halting_scores(x, weight, self.beta, score=self.score)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, score={self.score!r}, eps={self.eps}, "
            f"accumulator={self.accumulator!r}"
        )
