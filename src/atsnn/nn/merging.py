"""Token merging as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue, check_choice, check_integer, check_number
from ..reference import MATCHES, MergePlan, merged_sizes


class TokenMerge(nn.Module):
    """Merge similar tokens of equal lifetime; see :func:`atsnn.functional.match_tokens`.

    Parameters
    ----------
    r : int
        Pairs an image merges at most.
    threshold : float, optional
        Merge every pair above it, instead of ``r``.
    match : {"similar", "random"}
    """

    def __init__(
        self, r: int | None = None, threshold: float | None = None, *, match: str = "similar"
    ) -> None:
        super().__init__()
        if r is not None and threshold is not None:
            raise InvalidValue(
                f"TokenMerge: at most one of r and threshold may be given, got {r} and {threshold}"
            )
        if threshold is None:
            r = check_integer("TokenMerge", "r", 0 if r is None else r, at_least=0)
        else:
            check_number("TokenMerge", "threshold", threshold)
        check_choice("TokenMerge", "match", match, MATCHES)
        self.r, self.threshold, self.match = r, threshold, match

    def plan(self, counts: Tensor, active_steps: Tensor | None = None) -> MergePlan:
        """Which tokens merge, from firing counts ``[B, N, C]`` and lifetimes ``[B, N]``."""
        return F.match_tokens(
            counts, r=self.r, threshold=self.threshold, active_steps=active_steps, match=self.match
        )

    def forward(
        self, x: Tensor, counts: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, MergePlan]:
        """Merge ``x [T, B, N, C]`` by ``counts [B, N, C]``: tokens, sizes ``[B, N]``, plan."""
        plan = self.plan(counts)
        if sizes is None:
            sizes = x.new_ones(x.shape[1:3])
        return F.merge_tokens(x, plan, sizes=sizes), merged_sizes(sizes, plan), plan

    def extra_repr(self) -> str:
        return f"r={self.r}, threshold={self.threshold}, match={self.match!r}"
