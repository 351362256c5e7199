"""Runs of rows: what the kernels go over, and how a launcher describes it to them.

A kernel is given ``token [B, N]`` and ``offsets [T * B + 1]`` of a layout, or ``None`` for dense
tokens. Whatever they hold, it touches no row outside ``0 .. rows - 1``: on a GPU a launcher cannot
look at values without waiting for the device, so they are clamped where they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_shape, shape_of


@triton.jit
def run_of(offsets, t, b, T, B, N, rows):
    """First row and number of rows of the run ``(t, b)``; none where there is no timestep ``t``."""
    if offsets is None:
        start = (tl.cast(t, tl.int64) * B + b) * N
        count = tl.cast(N, tl.int64)
    else:
        at = offsets + tl.minimum(t, T - 1) * B + b
        start = tl.minimum(tl.maximum(tl.load(at), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(at + 1), start), rows)
        count = tl.minimum(end - start, N)
    return start, tl.where(t < T, count, 0)


@triton.jit
def token_at(token, b, rank, N):
    """Original index of the tokens of some ranks of image ``b``; -1 where there is none."""
    inside = rank < N
    if token is None:
        found = tl.cast(rank, tl.int64)
    else:
        found = tl.load(token + tl.cast(b, tl.int64) * N + rank, mask=inside, other=-1)
    return tl.where(inside & (found >= 0) & (found < N), found, -1)


class Runs(NamedTuple):
    """``T * B`` runs of at most ``N`` rows; ``token`` and ``offsets`` are ``None`` where dense.

    ``rows`` is how many rows the tensors have. A layout may use fewer: buffers of a capacity.
    """

    T: int
    B: int
    N: int
    rows: int
    token: Tensor | None
    offsets: Tensor | None

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    @classmethod
    def dense(cls, T: int, B: int, N: int) -> Runs:
        return cls(T, B, N, T * B * N, None, None)

    @classmethod
    def of(cls, op: str, x: Tensor, token: Tensor | None, offsets: Tensor | None) -> Runs:
        """The runs of rows ``x [R, ...]`` of a layout, or of dense ``x [T, B, N, ...]``."""
        if both_or_neither(op, token, offsets):
            if x.dim() < 1:
                raise InvalidValue(f"{op}: rows must have shape (R, ...), got a 0-d tensor")
            return cls.of_layout(op, token, offsets, x.shape[0], x)
        if x.dim() < 3:
            raise InvalidValue(f"{op}: x must have shape (T, B, N, ...), got {shape_of(x)}")
        return cls.dense(*x.shape[:3])

    @classmethod
    def of_layout(
        cls, op: str, token: Tensor, offsets: Tensor, rows: int, like: Tensor | None = None
    ) -> Runs:
        for name, value in (("token", token), ("offsets", offsets)):
            check_dtype(op, f"the layout's {name}", value, (torch.int64,))
            if like is not None:
                check_device(op, f"the layout's {name}", value, "the rows", like)
        check_device(op, "the layout's offsets", offsets, "its token", token)
        check_shape(op, "the layout's token", token, B=None, N=None)
        B, N = token.shape
        runs = offsets.numel() - 1
        if offsets.dim() != 1 or runs < 0 or (runs % B if B else runs):
            raise InvalidValue(
                f"{op}: the layout's offsets must have shape (T * B + 1) with B = {B}, "
                f"got {shape_of(offsets)}"
            )
        # Of metadata alone a copy is made where it is not contiguous.
        return cls(
            runs // B if B else 0, B, N, rows, token.contiguous(), offsets.contiguous()
        )  # fmt: skip


def both_or_neither(op: str, token: Tensor | None, offsets: Tensor | None) -> bool:
    """Whether there is a layout."""
    if (token is None) != (offsets is None):
        raise InvalidValue(f"{op}: a layout needs both token and offsets, got one of them")
    return token is not None
