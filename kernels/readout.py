"""What a block gives to the readout, ``sum over t, k of size * w * x`` in float64; its gradients.

A program sums a block of the ranks of one run; the sums of an image are added up in a second
reduction, whose order is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_device, check_dtype, check_shape
from .blocks import Tokens, base_of, read_block, rows_of_run, weighted, write_block
from .launch import EXACT, channel_block, program_elements, row_block


@triton.jit
def row_weights(
    w, w_t, w_b, w_r, sizes, token, offsets, start, t, b, r, n, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sizes of the tokens of some ranks and ``w * size``, as columns of float64."""
    at = base_of(start, t, b, w_t, w_b, w_r, offsets) + tl.cast(r, tl.int64) * w_r
    weight = tl.load(w + at, mask=r < n, other=0.0).to(tl.float64)[:, None]
    size = weighted(tl.full((BLOCK_N, 1), 1.0, tl.float64), sizes, token, b, r, N)
    return size, weight * size


@triton.jit(do_not_specialize=["w_t", "w_b", "T", "B", "N", "rows"])
def forward_kernel(
    x, x_t, x_b, x_r, x_c, w, w_t, w_b, w_r, partial, sizes, token, offsets, T, B, N, rows, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t, b, start, n, r, c = rows_of_run(offsets, T, B, N, rows, C, BLOCK_N, BLOCK_C)
    _, weight = row_weights(
        w, w_t, w_b, w_r, sizes, token, offsets, start, t, b, r, n, N, BLOCK_N
    )  # fmt: skip
    x_at = base_of(start, t, b, x_t, x_b, x_r, offsets)
    value = read_block(x, x_at, r, n, c, C, x_r, x_c, tl.float64)
    # Tokens without a weight say nothing, whatever they are.
    total = tl.sum(tl.where(weight != 0, weight * value, 0.0), 0)
    part = tl.cast(tl.program_id(0) // tl.cdiv(C, BLOCK_C), tl.int64)
    tl.store(partial + part * C + c, total, mask=c < C)


@triton.jit(do_not_specialize=["w_t", "w_b", "T", "B", "N", "rows"])
def backward_kernel(
    grad, g_b, g_c, x, x_t, x_b, x_r, x_c, w, w_t, w_b, w_r, grad_x, grad_w, sizes, token, offsets,
    T, B, N, rows, C, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dx = w * size * g`` and ``dw = size * (g . x)``; a program goes over all channels."""
    t, b, start, n, r, lane = rows_of_run(offsets, T, B, N, rows, BLOCK_C, BLOCK_N, BLOCK_C)
    size, weight = row_weights(
        w, w_t, w_b, w_r, sizes, token, offsets, start, t, b, r, n, N, BLOCK_N
    )  # fmt: skip
    x_at = base_of(start, t, b, x_t, x_b, x_r, offsets)
    g_at = grad + tl.cast(b, tl.int64) * g_b
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float64)
    for begin in range(0, C, BLOCK_C):
        c = begin + lane
        sent = tl.load(g_at + tl.cast(c, tl.int64) * g_c, mask=c < C, other=0.0)[None, :]
        total += sent * read_block(x, x_at, r, n, c, C, x_r, x_c, tl.float64)
        write_block(grad_x, start, r, n, c, C, C, (weight * sent).to(ACC))
    found = (size * tl.sum(total, 1)[:, None]).to(tl.float32)
    tl.store(grad_w + (start + r)[:, None], found, mask=(r < n)[:, None])


class _Readout:
    """What both directions are launched with."""

    def __init__(
        self, op: str, x: Tensor, w: Tensor, sizes: Tensor | None, token: Tensor | None,
        offsets: Tensor | None,
    ) -> None:  # fmt: skip
        self.tokens = Tokens(op, {"x": x}, sizes, token, offsets)
        lead = dict(zip(("R",) if self.tokens.runs.packed else "TBN", x.shape, strict=False))
        check_shape(op, "w", w, **lead)
        check_dtype(op, "w", w, (torch.float32,))
        check_device(op, "w", w, "x", x)
        strides = (0, 0, w.stride(0)) if self.tokens.runs.packed else w.stride()
        self.read = (*self.tokens.of(x), w, *strides)
        self.C = self.tokens.C

    def blocks(self, elements: int, channels: int) -> tuple[int, dict[str, int]]:
        """Blocks of ranks in all runs, and their sizes."""
        runs, block_c = self.tokens.runs, channel_block(self.C, channels)
        block_n = row_block(runs.N, elements, block_c)
        return triton.cdiv(runs.N, block_n), dict(BLOCK_N=block_n, BLOCK_C=block_c)


def readout(
    x: Tensor, w: Tensor, sizes: Tensor | None, token: Tensor | None, offsets: Tensor | None
) -> Tensor:
    """The operator; see :func:`atsnn.functional.readout`."""
    call = _Readout("readout", x, w, sizes, token, offsets)
    runs = call.tokens.runs
    parts, blocks = call.blocks(4096, 64)
    partial = x.new_empty((runs.T, runs.B, parts, call.C), dtype=torch.float64)
    if partial.numel():
        programs = runs.T * runs.B * parts * triton.cdiv(call.C, blocks["BLOCK_C"])
        forward_kernel[(programs,)](
            *call.read, partial, call.tokens.sizes, *call.tokens.layout, call.C, **blocks, **EXACT
        )
    return partial.sum((0, 2))


def readout_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    sizes: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Its gradients for ``x`` and ``w``; rows that the layout does not use are not written."""
    op = "readout_backward"
    call = _Readout(op, x, w, sizes, token, offsets)
    runs = call.tokens.runs
    check_shape(op, "grad", grad, B=runs.B, C=call.C)
    check_dtype(op, "grad", grad, (torch.float64,))
    check_device(op, "grad", grad, "x", x)
    grad_x, grad_w = x.new_empty(x.shape), w.new_empty(w.shape)
    parts, blocks = call.blocks(program_elements(x), 128)
    if w.numel():
        backward_kernel[(runs.T * runs.B * parts,)](
            grad, *grad.stride(), *call.read, grad_x, grad_w, call.tokens.sizes,
            *call.tokens.layout, call.C, ACC=call.tokens.acc, **blocks, **EXACT,
        )  # fmt: skip
    return grad_x, grad_w
