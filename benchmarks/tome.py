"""Token merging (ToMe: Bolya et al., ICLR 2023) in plain PyTorch: the peer of our merging.

Written from the paper's description of bipartite soft matching, for tokens without a class token:

1. tokens alternate into a set A and a set B;
2. each token of A keeps its most similar partner in B, by the cosine of a metric;
3. the ``r`` most similar pairs merge into the mean weighted by size;
4. what is left of A, the most similar first, then B, are the tokens that go on.

The paper merges the tokens of one image; here they carry timesteps, ``[T, B, N, C]``, and one
matching holds for all of them, as in ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Matching(NamedTuple):
    """Positions within the sets: of A that stay and that go, and in B where these go."""

    stay: Tensor
    go: Tensor
    to: Tensor


def match(metric: Tensor, r: int) -> Matching:
    """The ``r`` pairs of ``metric [B, N, C]`` that merge."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)
    go = order[:, :r]
    return Matching(order[:, r:], go, partner.gather(1, go))


def merge(x: Tensor, sizes: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """Tokens ``[T, B, N - r, C]`` and their sizes ``[B, N - r]``."""
    sizes = sizes[None, :, :, None]
    merged = _summed(x * sizes, matching)
    sizes = _summed(sizes, matching)
    return merged / sizes, sizes[0, :, :, 0]


def unmerge(y: Tensor, matching: Matching) -> Tensor:
    """Give every original token what it was merged into: ``[T, B, N, C]``."""
    left = matching.stay.shape[1]
    b = y[:, :, left:]
    out = y.new_empty((*y.shape[:2], y.shape[2] + matching.go.shape[1], y.shape[3]))
    out[:, :, 1::2] = b
    out.scatter_(2, _along(2 * matching.stay, out), y[:, :, :left])
    out.scatter_(2, _along(2 * matching.go, out), b.gather(2, _along(matching.to, b)))
    return out


def tokens(matching: Matching, count: int) -> Tensor:
    """``[B, N - r]``: which of the ``count`` tokens each that goes on was."""
    b = torch.arange(1, count, 2).expand(len(matching.stay), -1)
    return torch.cat((2 * matching.stay, b), 1)


def _summed(x: Tensor, matching: Matching) -> Tensor:
    a, b = x[:, :, ::2], x[:, :, 1::2]
    stay, go = (a.gather(2, _along(index, a)) for index in (matching.stay, matching.go))
    return torch.cat((stay, b.scatter_reduce(2, _along(matching.to, b), go, "sum")), 2)


def _along(index: Tensor, x: Tensor) -> Tensor:
    """``index [B, n]`` for all timesteps and channels of ``x``."""
    return index[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3])
