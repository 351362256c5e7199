"""Blocks of ranks and channels: which a program takes, where they lie, reading and writing them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_device, check_dtype, check_like, check_shape
from .launch import arithmetic
from .rounding import to_storage
from .rows import Runs, both_or_neither, run_of, token_at


@triton.jit
def block_of(N, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image (or run), ranks and channels of a program; neighbours share rows."""
    pid = tl.program_id(0)
    blocks_c = (C - 1) // BLOCK_C + 1  # not (C + BLOCK_C - 1) // BLOCK_C, which could overflow
    blocks_n = tl.cdiv(N, BLOCK_N)
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = (pid // blocks_c % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    return pid // (blocks_c * blocks_n), r, c


@triton.jit
def rows_of_run(offsets, T, B, N, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Timestep, image, first row and number of rows of a program's run; its ranks and channels."""
    run, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    start, n = run_of(offsets, run // B, run % B, T, B, N, rows)
    return run // B, run % B, start, n, r, c


@triton.jit
def base_of(start, t, b, x_t, x_b, x_r, offsets):
    """Where the first row of a run is: as dense strides say, or after the rows before it."""
    if offsets is None:
        at = tl.cast(t, tl.int64) * x_t + tl.cast(b, tl.int64) * x_b
    else:
        at = start * x_r
    return at


@triton.jit
def block_at(base, r, n, c, end, x_r, x_c):
    """Addresses of rows ``r`` and channels ``c`` of a run, and which of them exist."""
    at = base + tl.cast(r, tl.int64)[:, None] * x_r + tl.cast(c, tl.int64)[None, :] * x_c
    return at, (r[:, None] < n) & (c[None, :] < end)


@triton.jit
def read_block(x, base, r, n, c, end, x_r, x_c, ACC: tl.constexpr):
    at, here = block_at(base, r, n, c, end, x_r, x_c)
    return tl.load(x + at, mask=here, other=0.0).to(ACC)


@triton.jit
def write_block(out, start, r, n, c, end, C, value):
    """Rows and channels of an output, whose rows follow each other."""
    at, here = block_at(start * C, r, n, c, end, C, 1)
    tl.store(out + at, to_storage(value, out.dtype.element_ty), mask=here)


@triton.jit
def weighted(v, sizes, token, b, r, N):
    """Rows ``v`` times the sizes of their tokens."""
    if sizes is not None:
        k = token_at(token, b, r, N)
        at = sizes + tl.cast(b, tl.int64) * N + k
        v *= tl.load(at, mask=k >= 0, other=0.0).to(v.dtype)[:, None]
    return v


class Tokens:
    """Dense tokens or rows that an operation on runs is given, checked, with their strides."""

    def __init__(
        self, op: str, tensors: dict[str, Tensor], sizes: Tensor | None, token: Tensor | None,
        offsets: Tensor | None,
    ) -> None:  # fmt: skip
        (name, first), *others = tensors.items()
        check_dtype(op, name, first)
        packed = both_or_neither(op, token, offsets)
        shape = dict(R=None, C=None) if packed else dict(T=None, B=None, N=None, C=None)
        check_shape(op, name, first, **shape)
        for other, x in others:
            check_like(op, other, x, name, first)
        self.runs = Runs.of(op, first, token, offsets)
        self.C = first.shape[-1]
        self.acc = arithmetic(first.dtype)
        self.sizes = None
        if sizes is not None:
            check_shape(op, "sizes", sizes, B=self.runs.B, N=self.runs.N)
            check_device(op, "sizes", sizes, name, first)
            self.sizes = sizes.contiguous()

    def of(self, x: Tensor) -> tuple[Tensor, int, int, int, int]:
        """A tensor and its strides over timesteps, images, rows and channels."""
        if self.runs.packed:
            return (x, 0, 0, *x.stride())
        return (x, *x.stride())

    @property
    def layout(self) -> tuple[Tensor | None, Tensor | None, int, int, int, int]:
        runs = self.runs
        return runs.token, runs.offsets, runs.T, runs.B, runs.N, runs.rows
