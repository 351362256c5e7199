"""Rounding: to multiples of a power of two, as ``reference.round_to``, and to storage types."""

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


INTERPRETED = tl.constexpr(not isinstance(round_to, triton.JITFunction))


@triton.jit
def to_storage(x, dtype: tl.constexpr):
    """``x`` in a storage type, rounded to the nearest, half to even.

    That is what a GPU's cast does; the interpreter's cuts bfloat16 off, so it is rounded before.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)  # a NaN stays one
    return x.to(dtype)
