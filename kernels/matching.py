"""Firing counts of tokens, and pairs of tokens whose counts are alike.

Matching takes three kernels: the set of each token and the square of its counts; the best partner
of each token of the first set; the pairs that merge. Dot products are of integers and taken in
float64, so their order does not matter; no matrix of all tokens by all is ever in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_shape
from .attention import product
from .blocks import base_of, block_of
from .launch import EXACT, channel_block, program_elements, row_block
from .ranking import BLOCK, before, clamp, elements
from .rows import Runs, both_or_neither, run_of, token_at

STEPS = 4  # timesteps whose loads are in flight at once
LONGEST = tl.constexpr(2**62 - 1)  # lifetimes up to this are told apart
TILE = 32  # tokens, and channels at a time, of a block of dot products


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def counts_kernel(
    x, x_t, x_b, x_r, x_c, out, token, offsets, T, B, N, rows, C,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    channel = tl.cast(c, tl.int64)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for segment in range(tl.cdiv(T, STEPS)):
        for i in tl.static_range(STEPS):
            t = segment * STEPS + i
            start, count = run_of(offsets, t, b, T, B, N, rows)
            at = base_of(start, t, b, x_t, x_b, x_r, offsets) + tl.cast(r, tl.int64) * x_r
            here = (r[:, None] < count) & (c[None, :] < C)
            value = tl.load(x + at[:, None] + channel * x_c, mask=here, other=0.0)
            total += value.to(tl.float32)
    k = token_at(token, b, r, N)
    at = (tl.cast(b, tl.int64) * N + k)[:, None] * C + channel
    tl.store(out + at, total, mask=(k[:, None] >= 0) & (c[None, :] < C))


@triton.jit
def read_counts(counts, s_n, s_c, k, c, N, C):
    at = tl.cast(k, tl.int64)[:, None] * s_n + tl.cast(c, tl.int64)[None, :] * s_c
    here = (k[:, None] < N) & (c[None, :] < C)
    return tl.load(counts + at, mask=here, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["N"])
def sets_kernel(
    counts, s_b, s_n, s_c, active_steps, sets, squares, N, C,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Which set a token is in: the second of a lifetime is one more than the first; or -1."""
    b, base, k = elements(N, BLOCK_K)
    steps = active_steps + base
    lifetime = clamp(tl.load(steps + k, mask=k < N, other=0), 0, LONGEST)
    # How many of the same lifetime are at lower indices: those before it less the shorter ones.
    place = before(steps, lifetime, k[:, None], N, 0, LONGEST, False)
    place -= before(steps, lifetime, 0, N, 0, LONGEST, False)
    which = tl.where(lifetime > 0, lifetime * 2 + place % 2, -1)
    tl.store(sets + base + k, which, mask=k < N)
    total = tl.zeros((BLOCK_K,), tl.float64)
    image = counts + tl.cast(b, tl.int64) * s_b
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        value = read_counts(image, s_n, s_c, k, c, N, C)
        total += tl.sum(value * value, 1)
    tl.store(squares + base + k, total, mask=k < N)


@triton.jit(do_not_specialize=["N"])
def partners_kernel(
    counts, s_b, s_n, s_c, sets, squares, partner, similarity, N, C, TILE: tl.constexpr
):  # fmt: skip
    """The best partner of each token and the square of their cosine; -1 where there is none."""
    b, base, k = elements(N, TILE)
    image = counts + tl.cast(b, tl.int64) * s_b
    first = tl.load(sets + base + k, mask=k < N, other=-1)
    square = tl.load(squares + base + k, mask=k < N, other=0.0)
    best = tl.full((TILE,), -1.0, tl.float64)
    found = tl.full((TILE,), -1, tl.int64)
    for begin in range(0, N, TILE):
        j = begin + tl.arange(0, TILE)
        dot = tl.zeros((TILE, TILE), tl.float64)
        for start in range(0, C, TILE):
            c = start + tl.arange(0, TILE)
            left = read_counts(image, s_n, s_c, k, c, N, C)
            right = read_counts(image, s_n, s_c, j, c, N, C)
            dot += product(left, tl.trans(right), tl.float64)
        second = tl.load(sets + base + j, mask=j < N, other=-1)
        others = tl.load(squares + base + j, mask=j < N, other=0.0)
        norm = square[:, None] * others[None, :]
        # No square root: equal ratios of whole numbers are then equal bits. Where a token is
        # silent there is no ratio, and equal squares are those of two silent tokens.
        silent = tl.where(square[:, None] == others[None, :], 1.0, 0.0).to(tl.float64)
        cosine2 = tl.where(norm > 0, dot * dot / tl.where(norm > 0, norm, 1.0), silent)
        pair = (first >= 0) & (first % 2 == 0)
        pair = pair[:, None] & (second[None, :] == first[:, None] + 1)
        cosine2 = tl.where(pair, cosine2, -1.0)
        most = tl.max(cosine2, 1)
        at = tl.min(tl.where(cosine2 == most[:, None], j[None, :], N), 1)
        better = most > best
        best = tl.where(better, most, best)
        found = tl.where(better, at.to(tl.int64), found)
    tl.store(partner + base + k, found, mask=k < N)
    tl.store(similarity + base + k, best, mask=k < N)


@triton.jit(do_not_specialize=["N", "r"])
def pairs_kernel(
    partner, similarity, target, N, r, LIMIT: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The ``r`` best pairs, or without a number of them all above ``LIMIT``, are chosen."""
    _, base, k = elements(N, BLOCK_K)
    held = tl.load(partner + base + k, mask=k < N, other=-1)
    value = tl.load(similarity + base + k, mask=k < N, other=-1.0)
    if LIMIT is None:
        place = before(similarity + base, value, k[:, None], N, -1.0, 2.0, True)
        chosen = place < r
    else:
        chosen = value > LIMIT
    chosen = chosen & (held >= 0) & (held < N)
    tl.store(target + base + k, tl.where(chosen, held, k.to(tl.int64)), mask=k < N)


def firing_counts(keys: Tensor, token: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The operator: ``[B, N, C]`` float32, the sums of ``keys`` over the timesteps of a token."""
    op = "firing_counts"
    check_dtype(op, "keys", keys)
    if both_or_neither(op, token, offsets):
        check_shape(op, "packed keys", keys, R=None, C=None)
        strides = (0, 0, *keys.stride())
    else:
        check_shape(op, "keys", keys, T=None, B=None, N=None, C=None)
        strides = keys.stride()
    runs = Runs.of(op, keys, token, offsets)
    T, B, N, rows, token, offsets = runs
    C = keys.shape[-1]
    out = keys.new_empty((B, N, C), dtype=torch.float32)
    if out.numel():
        channels = channel_block(C, program_elements(keys))
        ranks = row_block(N, program_elements(keys), channels)
        counts_kernel[(B * triton.cdiv(N, ranks) * triton.cdiv(C, channels),)](
            keys, *strides, out, token, offsets, T, B, N, rows, C,
            STEPS=STEPS, BLOCK_N=ranks, BLOCK_C=channels, **EXACT,
        )  # fmt: skip
    return out


def match_tokens(
    counts: Tensor, active_steps: Tensor, r: int | None, threshold: float | None
) -> Tensor:
    """The operator: ``[B, N]``, the token that each token is held in after the merge."""
    op = "match_tokens"
    check_shape(op, "counts", counts, B=None, N=None, C=None)
    B, N, C = counts.shape
    check_shape(op, "active_steps", active_steps, B=B, N=N)
    check_dtype(op, "active_steps", active_steps, (torch.int64,))
    check_device(op, "active_steps", active_steps, "counts", counts)
    if (r is None) == (threshold is None):
        raise InvalidValue(
            f"{op}: exactly one of r and threshold must be given, got r={r}, threshold={threshold}"
        )
    if r is not None and r < 0:
        raise InvalidValue(f"{op}: r must be at least 0, got {r}")
    limit = None
    if threshold is not None:
        # Similarities are squared cosines; every one exceeds a threshold below 0.
        limit = -1.0 if threshold < 0 else min(threshold * threshold, 2.0)
    steps = active_steps.contiguous()
    target, sets, partner = (torch.empty_like(steps) for _ in range(3))
    squares, similarity = (steps.new_empty((B, N), dtype=torch.float64) for _ in range(2))
    if B * N:
        given = (counts, *counts.stride())
        grid = (B * triton.cdiv(N, BLOCK),)
        sets_kernel[grid](*given, steps, sets, squares, N, C, BLOCK_K=BLOCK, BLOCK_C=TILE, **EXACT)
        partners_kernel[(B * triton.cdiv(N, TILE),)](
            *given, sets, squares, partner, similarity, N, C, TILE=TILE, num_warps=8, **EXACT
        )
        pairs_kernel[grid](
            partner, similarity, target, N, min(r or 0, N), LIMIT=limit, BLOCK_K=BLOCK, **EXACT
        )
    return target
