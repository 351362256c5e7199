"""Merging of tokens and its inverse, as gathers: a program makes a block of the result's rows.

There are two layouts: of the tokens before a merge and of those after it, in which the tokens that
merged are gone. Rows after it are sums over the members of a token, in the order of their indices;
rows before it are those of the token that holds them. Sums are float64 and rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_shape
from .blocks import base_of, block_of
from .launch import EXACT, arithmetic, channel_block, program_elements, row_block
from .layout import check_same_cells, place_in, runs_of_result, token_ranks
from .ranking import BLOCK, before, clamp, elements
from .rounding import round_to, to_storage
from .rows import Runs, both_or_neither, run_of, token_at
from .taking import sum_of, with_entry


@triton.jit(do_not_specialize=["N"])
def members_kernel(target, first, member, N, BLOCK_K: tl.constexpr):
    """The tokens that each token holds: those at places ``first[k] .. first[k + 1]``."""
    b, base, k = elements(N + 1, BLOCK_K)
    base -= b  # of N elements
    targets = target + base
    tl.store(
        first + base + b + k, before(targets, k, 0, N, -1, N, False), mask=k <= N
    )  # fmt: skip
    held = clamp(tl.load(targets + k, mask=k < N, other=-1), -1, N)
    place = before(targets, held, k[:, None], N, -1, N, False)
    tl.store(member + base + place, k, mask=k < N)


@triton.jit
def members_of(first, b, k, N):
    """Where the members of tokens ``k`` begin, and how many there are; none of token -1."""
    inside = (k >= 0) & (k < N)
    at = first + tl.cast(b, tl.int64) * (N + 1) + k
    begin = tl.load(at, mask=inside, other=0)
    return begin, tl.load(at + 1, mask=inside, other=0) - begin


@triton.jit
def member_at(member, b, begin, members, i, N):
    """The ``i``-th of the members; -1 where there are not so many."""
    at = member + tl.cast(b, tl.int64) * N + begin + i
    return tl.load(at, mask=i < members, other=-1).to(tl.int64)


@triton.jit
def size_of(sizes, b, k, N):
    at = sizes + tl.cast(b, tl.int64) * N + k
    return tl.load(at, mask=(k >= 0) & (k < N), other=0.0).to(tl.float64)


@triton.jit
def total_size(sizes, member, b, begin, members, N):
    """The sizes of all the members; 1 where that is 0, to divide by."""
    total = tl.zeros(begin.shape, tl.float64)
    for i in range(tl.max(members, 0)):
        total += size_of(sizes, b, member_at(member, b, begin, members, i, N), N)
    return tl.where(total == 0, 1.0, total)


@triton.jit
def read_rows(
    x, x_t, x_b, x_r, x_c, rank, offsets, t, b, k, c, T, B, N, rows, C, ACC: tl.constexpr
):  # fmt: skip
    """Rows of tokens ``k`` in float64, zeros where they are not active."""
    start, r = place_in(rank, offsets, t, b, k, T, B, N, rows)
    at = base_of(start, t, b, x_t, x_b, x_r, offsets) + r * x_r
    here = (r >= 0)[:, None] & (c < C)[None, :]
    channel = tl.cast(c, tl.int64)[None, :] * x_c
    value = tl.load(x + at[:, None] + channel, mask=here, other=0.0)
    return value.to(ACC).to(tl.float64)


@triton.jit
def write_rows(out, start, r, count, c, C, value, ACC: tl.constexpr):
    at = (start + r)[:, None] * C + tl.cast(c, tl.int64)[None, :]
    here = (r[:, None] < count) & (c[None, :] < C)
    tl.store(out + at, to_storage(value.to(ACC), out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T", "B", "N", "rows", "to_rows"])
def sum_kernel(
    x, x_t, x_b, x_r, x_c, rank, offsets, out, to_token, to_offsets, sizes, first, member,
    T, B, N, rows, to_rows, C,
    GRID: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows after a merge: sums over the members, or with sizes their mean."""
    run, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    t, b = run // B, run % B
    to_start, count = run_of(to_offsets, t, b, T, B, N, to_rows)
    begin, members = members_of(first, b, token_at(to_token, b, r, N), N)
    if sizes is not None:
        total = total_size(sizes, member, b, begin, members, N)
    found = tl.zeros((BLOCK_N, BLOCK_C), tl.float64)
    for i in range(tl.max(members, 0)):
        k = member_at(member, b, begin, members, i, N)
        value = read_rows(x, x_t, x_b, x_r, x_c, rank, offsets, t, b, k, c, T, B, N, rows, C, ACC)
        if sizes is not None:
            value *= tl.where(members == 1, 1.0, size_of(sizes, b, k, N))[:, None]
        found = with_entry(found, value, i, members)
    found = sum_of(found, members)
    if sizes is not None:
        mean = round_to(found / total[:, None], GRID)
        found = tl.where((members == 1)[:, None], found, mean)
    write_rows(out, to_start, r, count, c, C, found, ACC)


@triton.jit(do_not_specialize=["T", "B", "N", "rows", "to_rows"])
def held_kernel(
    x, x_t, x_b, x_r, x_c, rank, offsets, out, to_token, to_offsets, sizes, first, member, target,
    T, B, N, rows, to_rows, C,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows before a merge: those of the tokens that hold them, or with sizes their shares."""
    run, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    t, b = run // B, run % B
    to_start, count = run_of(to_offsets, t, b, T, B, N, to_rows)
    k = token_at(to_token, b, r, N)
    held = tl.load(target + tl.cast(b, tl.int64) * N + k, mask=k >= 0, other=-1)
    if sizes is not None:
        begin, members = members_of(first, b, held, N)
        part = size_of(sizes, b, k, N) / total_size(sizes, member, b, begin, members, N)
        share = tl.where(members == 1, 1.0, part)
    value = read_rows(x, x_t, x_b, x_r, x_c, rank, offsets, t, b, held, c, T, B, N, rows, C, ACC)
    if sizes is not None:
        value *= share[:, None]
    write_rows(out, to_start, r, count, c, C, value, ACC)


class _Plan(NamedTuple):
    """A merge between two layouts, checked: ``x`` has rows of ``runs``, the result of ``to``."""

    x: Tensor
    strides: tuple[int, ...]
    C: int
    runs: Runs
    to: Runs
    target: Tensor
    sizes: Tensor | None

    @classmethod
    def of(
        cls, op: str, x: Tensor, target: Tensor, sizes: Tensor | None, token: Tensor | None,
        offsets: Tensor | None, to_token: Tensor | None, to_offsets: Tensor | None,
        rows: int | None,
    ) -> _Plan:  # fmt: skip
        check_dtype(op, "the rows", x)
        packed = both_or_neither(op, token, offsets)
        if packed != both_or_neither(op, to_token, to_offsets):
            raise InvalidValue(f"{op}: both or neither of the layouts must be given, got one")
        runs = Runs.of(op, x, token, offsets)
        to = runs
        if to_token is not None and to_offsets is not None:
            to = runs_of_result(op, to_token, to_offsets, rows)
        check_same_cells(op, runs, to)
        B, N = runs.B, runs.N
        for name, value in (("the plan's target", target), ("sizes", sizes)):
            if value is not None:
                check_shape(op, name, value, B=B, N=N)
                check_device(op, name, value, "the rows", x)
        check_dtype(op, "the plan's target", target, (torch.int64,))
        lead = 1 if packed else 3
        # One value a row, or several dimensions of them, as channels.
        view = x.unsqueeze(-1) if x.dim() == lead else x.flatten(lead)
        strides = (0, 0, *view.stride()) if packed else view.stride()
        sizes = None if sizes is None else sizes.to(torch.float32).contiguous()
        return cls(view, strides, view.shape[-1], runs, to, target.contiguous(), sizes)

    def members(self) -> tuple[Tensor, Tensor]:
        """Where the members of each token begin, ``[B, N + 1]``, and the members ``[B, N]``."""
        B, N = self.target.shape
        first = self.target.new_empty((B, N + 1), dtype=torch.int32)
        member = self.target.new_empty((B, N), dtype=torch.int32)
        grid = (B * triton.cdiv(N + 1, BLOCK),)
        members_kernel[grid](self.target, first, member, N, BLOCK_K=BLOCK, **EXACT)
        return first, member

    def launch(self, kernel: Any, out: Tensor, *plan: Tensor | None, **settings: Any) -> Tensor:
        """``out`` with its rows made by a kernel that is given the plan."""
        runs, to, C = self.runs, self.to, self.C
        channels = channel_block(C, program_elements(out))
        ranks = row_block(runs.N, program_elements(out), channels)
        kernel[(runs.T * runs.B * triton.cdiv(runs.N, ranks) * triton.cdiv(C, channels),)](
            self.x, *self.strides, token_ranks(runs.token), runs.offsets, out, to.token,
            to.offsets, self.sizes, *plan, *runs[:3], runs.rows, to.rows, C, **settings,
            ACC=arithmetic(out.dtype), BLOCK_N=ranks, BLOCK_C=channels, **EXACT,
        )  # fmt: skip
        return out

    def new_rows(self, x: Tensor) -> Tensor:
        return x.new_empty((self.to.rows, *x.shape[1:]) if self.to.packed else x.shape)


def _sums(plan: _Plan, x: Tensor, bits: int) -> Tensor:
    out = plan.new_rows(x)
    if out.numel():
        plan.launch(sum_kernel, out, *plan.members(), GRID=2.0**bits)
    return out


def _held(plan: _Plan, x: Tensor) -> Tensor:
    out = plan.new_rows(x)
    if out.numel():
        members = (None, None) if plan.sizes is None else plan.members()
        plan.launch(held_kernel, out, *members, plan.target)
    return out


def merge_tokens(
    x: Tensor,
    target: Tensor,
    sizes: Tensor,
    token: Tensor | None,
    offsets: Tensor | None,
    to_token: Tensor | None,
    to_offsets: Tensor | None,
    bits: int,
    rows: int | None = None,
) -> Tensor:
    """The operator; see :func:`atsnn.functional.merge_tokens`.

    ``rows`` is how many the result has, of which those past the layout are not set; without it
    the number is read from the offsets, which waits for the device.
    """
    op = "merge_tokens"
    if not 0 <= bits <= 52:
        raise InvalidValue(f"{op}: bits must lie in 0 .. 52, got {bits}")
    layouts = (token, offsets, to_token, to_offsets)
    return _sums(_Plan.of(op, x, target, sizes, *layouts, rows), x, bits)


def merge_tokens_backward(
    grad: Tensor,
    target: Tensor,
    sizes: Tensor,
    token: Tensor | None,
    offsets: Tensor | None,
    to_token: Tensor | None,
    to_offsets: Tensor | None,
    rows: int | None = None,
) -> Tensor:
    """Its gradient, of as many rows as ``x`` had."""
    layouts = (to_token, to_offsets, token, offsets)
    return _held(_Plan.of("merge_tokens_backward", grad, target, sizes, *layouts, rows), grad)


def unmerge_tokens(
    y: Tensor,
    target: Tensor,
    token: Tensor | None,
    offsets: Tensor | None,
    to_token: Tensor | None,
    to_offsets: Tensor | None,
    rows: int | None = None,
) -> Tensor:
    """The operator; see :func:`atsnn.functional.unmerge_tokens`. ``rows``: :func:`merge_tokens`."""
    layouts = (token, offsets, to_token, to_offsets)
    return _held(_Plan.of("unmerge_tokens", y, target, None, *layouts, rows), y)


def unmerge_tokens_backward(
    grad: Tensor,
    target: Tensor,
    token: Tensor | None,
    offsets: Tensor | None,
    to_token: Tensor | None,
    to_offsets: Tensor | None,
    rows: int | None = None,
) -> Tensor:
    """Its gradient, of as many rows as ``y`` had."""
    layouts = (to_token, to_offsets, token, offsets)
    return _sums(_Plan.of("unmerge_tokens_backward", grad, target, None, *layouts, rows), grad, 0)
