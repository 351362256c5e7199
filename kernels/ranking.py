"""Stable orders by counting: the place of an element is the number of those that come before it.

Every program counts for its own elements, so nothing depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 64  # elements of a program
STEP = tl.constexpr(32)  # of those they are compared with, at a time


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def before(keys, key, index, N, low, high, DESCENDING: tl.constexpr):
    """How many of ``keys [N]``, clamped to ``low .. high``, come before ``key`` at ``index``.

    Of equal keys the one at the lower index comes first.
    """
    found = tl.zeros(key.shape, tl.int32)
    for start in range(0, N, STEP):
        j = start + tl.arange(0, STEP)
        other = clamp(tl.load(keys + j, mask=j < N, other=0), low, high)[None, :]
        earlier = other > key[:, None] if DESCENDING else other < key[:, None]
        earlier |= (other == key[:, None]) & (j[None, :] < index)
        found += tl.sum((earlier & (j < N)[None, :]).to(tl.int32), 1)
    return found


@triton.jit
def elements(N, BLOCK_K: tl.constexpr):
    """Which list of ``N`` elements a program takes, where it begins, and which elements of it."""
    blocks = tl.cdiv(N, BLOCK_K)
    pid = tl.program_id(0)
    which = pid // blocks
    return which, tl.cast(which, tl.int64) * N, pid % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
