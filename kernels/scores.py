"""Halting scores of tokens, forward and backward.

Scores are computed in float64, a row in one program, its channels in blocks; their rounding to
``2^-18`` hides the order of the sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_shape, shape_of
from ..reference import SCORE_BITS, SCORES
from .launch import EXACT, arithmetic, channel_block, planes
from .rounding import round_to, to_storage

SCORE_GRID = tl.constexpr(2**SCORE_BITS)
NORM_EPS = tl.constexpr(1e-5)  # as torch's layer_norm
WHOLE_ROW = 1024  # channels up to which a program holds a row, so that it is read once


@triton.jit
def read_tile(x, x_r, x_c, row, c, rows, C):
    """Rows and channels of ``x`` in float64, and which of them exist."""
    here = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * x_r + tl.cast(c, tl.int64)[None, :] * x_c
    return tl.load(x + at, mask=here, other=0.0).to(tl.float64), here


@triton.jit
def sum_channels(
    x, x_r, x_c, row, rows, C, mean, scale, weight,
    TERM: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over the channels of rows: of ``x``, ``(x - mean)^2``, ``(x - mean) scale weight``."""
    total = tl.zeros((row.shape[0], BLOCK_C), tl.float64)
    blocks = 1 if ONE_BLOCK else tl.cdiv(C, BLOCK_C)
    for block in range(blocks):
        c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        value, here = read_tile(x, x_r, x_c, row, c, rows, C)
        if TERM == "x":
            total += value
        else:
            centred = tl.where(here, value - mean[:, None], 0.0)
            if TERM == "square":
                total += centred * centred
            else:
                factor = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float64)
                total += centred * scale[:, None] * factor[None, :]
    return tl.sum(total, 1)


@triton.jit
def token_feature(
    x, x_r, x_c, row, rows, weight, C,
    SCORE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``f`` of rows; of the linear score also the layer normalisation's mean and scale."""
    f = tl.zeros((row.shape[0],), tl.float64)
    mean = f
    scale = f
    if SCORE == "first":
        f = tl.load(x + row * x_r, mask=row < rows, other=0.0).to(tl.float64)
    elif SCORE == "mean" or SCORE == "linear":
        total = sum_channels(
            x, x_r, x_c, row, rows, C, mean, scale, weight, "x", ONE_BLOCK, BLOCK_C
        )
        mean = total / C
        if SCORE == "mean":
            f = mean
        else:
            squares = sum_channels(
                x, x_r, x_c, row, rows, C, mean, scale, weight, "square", ONE_BLOCK, BLOCK_C
            )
            scale = 1.0 / tl.sqrt(squares / C + NORM_EPS)
            f = sum_channels(
                x, x_r, x_c, row, rows, C, mean, scale, weight, "linear", ONE_BLOCK, BLOCK_C
            )
    return f, mean, scale


@triton.jit
def sigmoid(z):
    e = tl.exp(-tl.abs(z))  # which cannot overflow
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_of(f, weight, bias, SCORE: tl.constexpr):
    """The score before it is rounded."""
    z = f
    if SCORE == "first" or SCORE == "mean":
        z = tl.load(weight).to(tl.float64) * f
    return sigmoid(z + tl.load(bias).to(tl.float64))


@triton.jit
def rows_of_program(BLOCK_N: tl.constexpr):
    return tl.cast(tl.program_id(0), tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def scores_kernel(
    x, x_r, x_c, weight, bias, h, rows, C,
    SCORE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = rows_of_program(BLOCK_N)
    f, _, _ = token_feature(x, x_r, x_c, row, rows, weight, C, SCORE, ONE_BLOCK, BLOCK_C)
    score = round_to(sigmoid_of(f, weight, bias, SCORE), SCORE_GRID)
    tl.store(h + row, score.to(tl.float32), mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def scores_backward_kernel(
    grad, g_r, x, x_r, x_c, weight, bias, grad_x, partial, found, rows, C,
    SCORE: tl.constexpr, ACC: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``grad_x``, and of each program the sums that make the gradients of bias and ``weight``.

    Of the linear score it leaves in ``found [3, rows]`` what its weights' gradient is made of.
    """
    row = rows_of_program(BLOCK_N)
    f, mean, scale = token_feature(x, x_r, x_c, row, rows, weight, C, SCORE, ONE_BLOCK, BLOCK_C)
    s = sigmoid_of(f, weight, bias, SCORE)
    sent = tl.load(grad + row * g_r, mask=row < rows, other=0.0).to(tl.float64)
    # Rows to which no gradient comes may hold anything: those past the end of a layout do.
    reached = sent != 0
    grad_z = tl.where(reached, sent * (s * (1.0 - s)), 0.0)
    tl.store(partial + tl.program_id(0) * 2, tl.sum(grad_z, 0))
    tl.store(partial + tl.program_id(0) * 2 + 1, tl.sum(tl.where(reached, grad_z * f, 0.0), 0))
    if SCORE == "linear":
        total = tl.cast(rows, tl.int64)
        tl.store(found + row, grad_z, mask=row < rows)
        tl.store(found + total + row, mean, mask=row < rows)
        tl.store(found + 2 * total + row, scale, mask=row < rows)
    if SCORE == "first" or SCORE == "mean":
        share = grad_z * tl.load(weight).to(tl.float64)
        if SCORE == "mean":
            share = share / C
        share = to_storage(share.to(ACC), grad_x.dtype.element_ty)[:, None]
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            reads = c < (1 if SCORE == "first" else C)
            at = row[:, None] * C + tl.cast(c, tl.int64)[None, :]
            here = (row < rows)[:, None] & (c < C)[None, :]
            tl.store(grad_x + at, tl.where(reads[None, :], share, 0.0), mask=here)


@triton.jit(do_not_specialize=["rows"])
def linear_backward_kernel(
    x, x_r, x_c, found, partial, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The sums over a program's rows of ``grad_z * (x - mean) * scale``, ``[programs, C]``."""
    blocks = tl.cdiv(C, BLOCK_C)
    part = tl.cast(tl.program_id(0) // blocks, tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = part * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.cast(rows, tl.int64)
    grad_z = tl.load(found + row, mask=row < rows, other=0.0)[:, None]
    mean = tl.load(found + total + row, mask=row < rows, other=0.0)[:, None]
    scale = tl.load(found + 2 * total + row, mask=row < rows, other=0.0)[:, None]
    value, _ = read_tile(x, x_r, x_c, row, c, rows, C)
    term = tl.where(grad_z != 0, grad_z * ((value - mean) * scale), 0.0)
    tl.store(partial + part * C + c, tl.sum(term, 0), mask=c < C)


def _rows(x: Tensor) -> Tensor:
    """``[R, C]`` of ``[..., C]``."""
    return planes(x.shape, [x], last=True)[2][0]


class _Scores:
    """What both directions are launched with."""

    def __init__(self, op: str, x: Tensor, weight: Tensor, bias: Tensor, score: str) -> None:
        check_dtype(op, "x", x)
        if score not in SCORES:
            raise InvalidValue(f"{op}: unknown score {score!r}, must be one of {', '.join(SCORES)}")
        if x.dim() < 1 or x.shape[-1] < 1:
            raise InvalidValue(f"{op}: x must have shape (..., C) with C >= 1, got {shape_of(x)}")
        self.C = x.shape[-1]
        for name, value, want in (
            ("weight", weight, self.C if score == "linear" else 1), ("bias", bias, 1),
        ):  # fmt: skip
            check_dtype(op, name, value)
            check_device(op, name, value, "x", x)
            if value.numel() != want:
                elements = "element" if want == 1 else "elements"
                raise InvalidValue(
                    f"{op}: {name} must have {want} {elements}, got {shape_of(value)}"
                )
        self.whole = score in ("mean", "linear")
        # Where one channel of a row is read, or none, no other is touched by folding either.
        self.x = _rows(x if self.whole else x[..., :1])
        self.rows = self.x.shape[0]
        self.weight, self.bias = weight.contiguous(), bias

    @property
    def read(self) -> tuple[Tensor, int, int]:
        return (self.x, *self.x.stride())

    def blocks(self, fills: bool = False) -> tuple[int, dict[str, Any]]:
        """Number of programs, and their blocks; ``fills``: whether they write whole rows."""
        one = self.C <= WHOLE_ROW
        channels = max(16, triton.next_power_of_2(self.C)) if one else channel_block(self.C, 1024)
        elements = 2048 if self.whole or fills else 256 * channels
        block = elements // channels
        return triton.cdiv(self.rows, block), dict(ONE_BLOCK=one, BLOCK_N=block, BLOCK_C=channels)


def halting_scores(x: Tensor, weight: Tensor, bias: Tensor, score: str) -> Tensor:
    """The operator; see :func:`atsnn.functional.halting_scores`."""
    call = _Scores("halting_scores", x, weight, bias, score)
    h = x.new_empty(x.shape[:-1], dtype=torch.float32)
    programs, blocks = call.blocks()
    if programs:
        scores_kernel[(programs,)](
            *call.read, call.weight, call.bias, h, call.rows, call.C, SCORE=score, **blocks,
            **EXACT,
        )  # fmt: skip
    return h


def halting_scores_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, score: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients for ``x``, ``weight`` and ``bias``; empty where no ``x`` is reached."""
    op = "halting_scores_backward"
    call = _Scores(op, x, weight, bias, score)
    check_shape(op, "grad", grad, **{f"d{i}": n for i, n in enumerate(x.shape[:-1])})
    check_dtype(op, "grad", grad, (torch.float32,))
    check_device(op, "grad", grad, "x", x)
    sent = _rows(grad[..., None])
    reaches = score in ("first", "mean")
    programs, blocks = call.blocks(fills=reaches)
    grad_x = x.new_empty(x.shape if reaches else 0)
    sums = x.new_empty((programs, 2), dtype=torch.float64)
    linear = score == "linear"
    found = x.new_empty((3, call.rows), dtype=torch.float64) if linear else None
    if programs:
        scores_backward_kernel[(programs,)](
            sent, sent.stride(0), *call.read, call.weight, call.bias, grad_x, sums, found,
            call.rows, call.C, SCORE=score, ACC=arithmetic(x.dtype), **blocks, **EXACT,
        )  # fmt: skip
    # Each program's sums are numbers; theirs are taken in an order that is always the same.
    grad_bias, weighted = sums.sum(0)
    grad_weight = _linear_gradient(call, found) if found is not None else weighted
    return (
        grad_x,
        grad_weight.to(weight.dtype, copy=True).view(weight.shape),
        grad_bias.to(bias.dtype, copy=True).view(bias.shape),
    )


def _linear_gradient(call: _Scores, found: Tensor) -> Tensor:
    channels = channel_block(call.C, 64)
    block = 2048 // channels
    parts = triton.cdiv(call.rows, block)
    partial = found.new_empty((parts, call.C))
    if parts:
        linear_backward_kernel[(parts * triton.cdiv(call.C, channels),)](
            *call.read, found, partial, call.rows, call.C, BLOCK_N=block, BLOCK_C=channels, **EXACT
        )
    return partial.sum(0)
