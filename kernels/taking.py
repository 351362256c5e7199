"""Rows by their index: a gather, and on the way back the sum of all that came from a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_shape, shape_of
from .launch import EXACT, arithmetic, channel_block, planes, program_elements, row_block
from .rounding import to_storage


@triton.jit
def item_block(items, P, C, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr):
    """The rows of a program, the planes of them, its channels, and what exists of all."""
    pid = tl.program_id(0)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.cast(pid // blocks_c, tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    return i, i // P, i % P, i < items, tl.cast(c, tl.int64)[None, :], (c < C)[None, :]


@triton.jit(do_not_specialize=["items", "rows"])
def take_kernel(
    x, x_r, x_p, x_c, index, out, items, P, rows, C, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    i, row, plane, inside, c, channel = item_block(items, P, C, BLOCK_I, BLOCK_C)
    source = tl.load(index + row, mask=inside, other=-1)
    exists = (source >= 0) & (source < rows)
    at = x + (source * x_r + plane * x_p)[:, None] + c * x_c
    value = tl.load(at, mask=exists[:, None] & channel, other=0.0)
    tl.store(out + i[:, None] * C + c, value, mask=inside[:, None] & channel)


@triton.jit
def with_entry(total, value, i, entries):
    """``total`` with the ``i``-th value, where there are so many.

    One alone is copied, a zero with its sign; :func:`sum_of` finishes the others.
    """
    return tl.where((i < entries)[:, None], tl.where(i == 0, value, total + value), total)


@triton.jit
def sum_of(total, entries):
    """A sum of several, which begins at +0."""
    return tl.where((entries == 1)[:, None], total, total + 0.0)


@triton.jit(do_not_specialize=["items"])
def take_backward_kernel(
    grad, g_r, g_p, g_c, first, source, out, items, P, C,
    ACC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i, row, plane, inside, c, channel = item_block(items, P, C, BLOCK_I, BLOCK_C)
    begin = tl.load(first + row, mask=inside, other=0)
    entries = tl.load(first + row + 1, mask=inside, other=0) - begin
    total = tl.zeros((BLOCK_I, BLOCK_C), tl.float64)
    for entry in range(tl.max(entries, 0)):
        here = entry < entries
        came_from = tl.load(source + begin + entry, mask=here, other=0)
        at = grad + (came_from * g_r + plane * g_p)[:, None] + c * g_c
        value = tl.load(at, mask=here[:, None] & channel, other=0.0)
        total = with_entry(total, value.to(ACC).to(tl.float64), entry, entries)
    value = to_storage(sum_of(total, entries).to(ACC), out.dtype.element_ty)
    tl.store(out + i[:, None] * C + c, value, mask=inside[:, None] & channel)


def _check(op: str, name: str, x: Tensor, index: Tensor) -> None:
    check_dtype(op, name, x)
    if x.dim() < 1:
        raise InvalidValue(f"{op}: {name} must have shape (R, ...), got a 0-d tensor")
    check_shape(op, "index", index, R=None)
    check_dtype(op, "index", index, (torch.int64,))
    check_device(op, "index", index, name, x)


def _blocks(x: Tensor, rows: int) -> tuple[tuple[int], tuple[Any, ...], int, int, dict[str, int]]:
    """Grid, ``x`` and its strides, planes, channels and blocks for a result of so many rows."""
    shape = x.shape[1:] if x.dim() > 1 else (1,)
    P, C, (view,) = planes(shape, [x if x.dim() > 1 else x[:, None]])
    channels = channel_block(C, program_elements(x))
    block = row_block(rows * P, program_elements(x), channels)
    grid = (triton.cdiv(rows * P, block) * triton.cdiv(C, channels),)
    return grid, (view, *view.stride()), P, C, dict(BLOCK_I=block, BLOCK_C=channels)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """The operator: rows ``index`` of ``x [R, ...]``; zeros where there is no such row."""
    op = "take_rows"
    _check(op, "x", x, index)
    out = x.new_empty((index.shape[0], *x.shape[1:]))
    if out.numel():
        grid, given, P, C, blocks = _blocks(x, out.shape[0])
        take_kernel[grid](
            *given, index.contiguous(), out, out.shape[0] * P, P, x.shape[0], C, **blocks, **EXACT
        )  # fmt: skip
    return out


def take_rows_backward(grad: Tensor, index: Tensor, rows: int) -> Tensor:
    """Its gradient for ``x``, of so many rows: float64 sums of ``grad`` in order of its rows."""
    op = "take_rows_backward"
    _check(op, "grad", grad, index)
    if grad.shape[0] != index.shape[0]:
        raise InvalidValue(
            f"{op}: grad must have the {index.shape[0]} rows of index, got {shape_of(grad)}"
        )
    if rows < 0:
        raise InvalidValue(f"{op}: rows must be at least 0, got {rows}")
    out = grad.new_empty((rows, *grad.shape[1:]))
    if out.numel():
        found, source = torch.sort(index, stable=True)
        first = torch.searchsorted(found, torch.arange(rows + 1, device=index.device))
        grid, given, P, C, blocks = _blocks(grad, rows)
        take_backward_kernel[grid](
            *given, first, source, out, rows * P, P, C, ACC=arithmetic(grad.dtype), **blocks,
            **EXACT,
        )  # fmt: skip
    return out
