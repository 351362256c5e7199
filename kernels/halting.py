"""The halting step, from scores to weights, accumulators and what runs next, and its gradient.

A program takes a block of ranks of one image through all timesteps, its sums in registers, in one
launch whatever T is. Further programs of that launch fill the rows that the layout does not use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_choice, check_device, check_dtype, check_shape
from .launch import EXACT
from .neuron import UNROLLED
from .rows import Runs, run_of, token_at

RANKS = 128
PAST = 1024  # rows past the end of the layout that a program fills


@triton.jit
def fill_past(out, offsets, program, T, B, rows, value, BLOCK: tl.constexpr):
    """Writes a value to those rows of a block that are past the end of the layout."""
    end = tl.load(offsets + tl.cast(T, tl.int64) * B)
    row = tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row, value, mask=(row >= end) & (row < rows))


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def halt_kernel(
    h, h_r, H, H_r, w, last, after, active_steps, token, offsets, T, B, N, rows,
    OVER_TIME: tl.constexpr, THRESHOLD: tl.constexpr, FINAL: tl.constexpr, STEPS: tl.constexpr,
    ONE_SEGMENT: tl.constexpr, BLOCK: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    if pid >= B * blocks:
        fill_past(w, offsets, pid - B * blocks, T, B, rows, 0.0, PAST)
        fill_past(last, offsets, pid - B * blocks, T, B, rows, 0, PAST)
        fill_past(after, offsets, pid - B * blocks, T, B, rows, 0.0, PAST)
    else:
        b = pid // blocks
        r = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        so_far = tl.zeros((BLOCK,), tl.float32)
        goes_on = r < (0 if FINAL else N)
        steps = tl.zeros((BLOCK,), tl.int64)
        segments = 1 if ONE_SEGMENT else tl.cdiv(T, STEPS)
        for segment in range(segments):
            # All reads come before the first write, which the compiler would not pass with one.
            starts = ()
            counts = ()
            scores = ()
            befores = ()
            for i in tl.static_range(STEPS):
                start, count = run_of(offsets, segment * STEPS + i, b, T, B, N, rows)
                starts += (start,)
                counts += (count,)
                scores += (tl.load(h + (start + r) * h_r, mask=r < count, other=0.0),)
                befores += (tl.load(H + (start + r) * H_r, mask=r < count, other=0.0),)
            for i in tl.static_range(STEPS):
                row = starts[i] + r
                here = r < counts[i]
                so_far = so_far + scores[i] if OVER_TIME else scores[i]
                total = befores[i] + so_far
                goes_on = goes_on & (total < THRESHOLD)  # not where it is NaN
                tl.store(w + row, tl.where(goes_on, so_far, 1.0 - befores[i]), mask=here)
                tl.store(last + row, ~goes_on, mask=here)
                tl.store(after + row, total, mask=here)
                steps += (here & goes_on).to(tl.int64)
        k = token_at(token, b, r, N)
        tl.store(active_steps + tl.cast(b, tl.int64) * N + k, steps, mask=k >= 0)


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def halt_backward_kernel(
    grad_w, gw_r, grad_H, gH_r, last, last_r, grad_h, grad_before, offsets, T, B, N, rows,
    OVER_TIME: tl.constexpr, STEPS: tl.constexpr, ONE_SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
    PAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    if pid >= B * blocks:
        fill_past(grad_h, offsets, pid - B * blocks, T, B, rows, 0.0, PAST)
        fill_past(grad_before, offsets, pid - B * blocks, T, B, rows, 0.0, PAST)
    else:
        b = pid // blocks
        r = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        none = tl.zeros((BLOCK,), tl.float32)
        sent = none  # to the scores of this timestep, by those after it
        segments = 1 if ONE_SEGMENT else tl.cdiv(T, STEPS)
        for back in range(segments):
            first = (segments - 1 - back) * STEPS
            starts = ()
            counts = ()
            weights = ()
            sums = ()
            remainders = ()
            for i in tl.static_range(STEPS):
                start, count = run_of(offsets, first + (STEPS - 1 - i), b, T, B, N, rows)
                here = r < count
                row = start + r
                starts += (start,)
                counts += (count,)
                remainders += (tl.load(last + row * last_r, mask=here, other=0),)
                if grad_w is None:
                    weights += (none,)
                else:
                    weights += (tl.load(grad_w + row * gw_r, mask=here, other=0.0),)
                if grad_H is None:
                    sums += (none,)
                else:
                    sums += (tl.load(grad_H + row * gH_r, mask=here, other=0.0),)
            for i in tl.static_range(STEPS):
                row = starts[i] + r
                here = r < counts[i]
                remains = remainders[i] != 0
                to_sum = tl.where(remains, sums[i], sums[i] + weights[i])
                sent = sent + to_sum if OVER_TIME else to_sum
                tl.store(grad_h + row, sent, mask=here)
                tl.store(
                    grad_before + row, tl.where(remains, sums[i] - weights[i], sums[i]), mask=here
                )


def _check_rows(
    op: str, name: str, x: Tensor, dtype: torch.dtype, other_name: str, other: Tensor
) -> None:
    check_dtype(op, name, x, (dtype,))
    check_shape(op, name, x, R=None if x is other else other.shape[0])
    check_device(op, name, x, other_name, other)


def _step(op: str, runs: Runs, accumulator: str) -> tuple[int, dict[str, Any]]:
    """Number of programs of a halting step, and what they are compiled for."""
    check_choice(op, "accumulator", accumulator, ("rectangle", "depth"))
    programs = runs.B * triton.cdiv(runs.N, RANKS) + triton.cdiv(runs.rows, PAST)
    return programs, dict(
        OVER_TIME=accumulator == "rectangle", STEPS=min(runs.T, UNROLLED),
        ONE_SEGMENT=runs.T <= UNROLLED, BLOCK=RANKS, PAST=PAST,
    )  # fmt: skip


def halt(
    h: Tensor, H: Tensor, token: Tensor, offsets: Tensor, accumulator: str, eps: float, final: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator; see :func:`atsnn.functional.halt`.

    Rows that the layout does not use are given weight 0, no remainder and accumulator 0.
    """
    op = "halt"
    _check_rows(op, "h", h, torch.float32, "h", h)
    _check_rows(op, "H", H, torch.float32, "h", h)
    runs = Runs.of(op, h, token, offsets)
    programs, settings = _step(op, runs, accumulator)
    w, after = h.new_empty(h.shape), h.new_empty(h.shape)
    last = h.new_empty(h.shape, dtype=torch.bool)
    steps = token.new_empty(token.shape)
    if programs:
        halt_kernel[(programs,)](
            h, h.stride(0), H, H.stride(0), w, last, after, steps, runs.token, runs.offsets,
            runs.T, runs.B, runs.N, runs.rows, THRESHOLD=float(np.float32(1.0 - eps)),
            FINAL=bool(final), **settings, **EXACT,
        )  # fmt: skip
    return w, last, after, steps


def halt_backward(
    grad_w: Tensor | None,
    grad_H: Tensor | None,
    last: Tensor,
    token: Tensor,
    offsets: Tensor,
    accumulator: str,
) -> tuple[Tensor, Tensor]:
    """Its gradients for ``h`` and ``H``, 0 in rows that the layout does not use."""
    op = "halt_backward"
    _check_rows(op, "last", last, torch.bool, "last", last)
    strided: list[Any] = []
    for name, grad in (("grad_w", grad_w), ("grad_H", grad_H)):
        if grad is not None:
            _check_rows(op, name, grad, torch.float32, "last", last)
        strided += [None, 0] if grad is None else [grad, grad.stride(0)]
    runs = Runs.of(op, last, token, offsets)
    programs, settings = _step(op, runs, accumulator)
    grad_h, grad_before = (last.new_empty(last.shape, dtype=torch.float32) for _ in range(2))
    if programs:
        halt_backward_kernel[(programs,)](
            *strided, last, last.stride(0), grad_h, grad_before, runs.offsets,
            runs.T, runs.B, runs.N, runs.rows, **settings, **EXACT,
        )  # fmt: skip
    return grad_h, grad_before
