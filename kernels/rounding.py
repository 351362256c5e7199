"""Rounding to multiples of a power of two, as ``reference.round_to`` does it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, GRID: tl.constexpr):
    """``x`` rounded to a multiple of ``1 / GRID``, half to even; zeros keep the sign of ``x``."""
    size = tl.abs(x) * GRID
    whole = tl.floor(size)
    rest = size - whole  # exact
    odd = whole * 0.5 != tl.floor(whole * 0.5)
    up = (rest > 0.5) | ((rest == 0.5) & odd)
    found = tl.where(up, whole + 1.0, whole) * (1.0 / GRID)
    return tl.where(x < 0, found * -1.0, found)  # a minus sign is a subtraction from +0
