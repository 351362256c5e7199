"""Spiking self-attention ``scale * q (k^T diag(sizes) v)`` over the runs of rows.

A program takes one head of one run ``(t, b)``, so nothing is padded to the longest image. Sums are
of integers and taken in float32 (float64 for float64) without reduced precision: exact below 2^24,
so both orders of the product give the same bits. The cheaper one is chosen for each run.

Heads wider than ``PANEL`` channels are shared by several programs, each of which makes a panel of
the columns; ``k^T v`` never leaves the registers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_like, check_shape
from .launch import arithmetic
from .rows import Runs, both_or_neither, run_of, token_at

PANEL = 64


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
def weighted(v, sizes, token, b, r, N):
    """Rows ``v`` times the sizes of their tokens."""
    if sizes is None:
        return v
    else:
        k = token_at(token, b, r, N)
        at = sizes + tl.cast(b, tl.int64) * N + k
        return v * tl.load(at, mask=k >= 0, other=0.0).to(v.dtype)[:, None]


@triton.jit
def product(a, b, ACC: tl.constexpr):
    """``a @ b`` without reduced precision."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def run_head_panel(T, B, heads, D: tl.constexpr, BLOCK_P: tl.constexpr):
    """Timestep, image, head and first column of a program."""
    pid = tl.program_id(0)
    panels: tl.constexpr = (D + BLOCK_P - 1) // BLOCK_P
    panel = pid % panels
    head = pid // panels % heads
    run = pid // (panels * heads)
    return run // B, run % B, head, panel * BLOCK_P


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    q, q_t, q_b, q_r, q_c, k, k_t, k_b, k_r, k_c, v, v_t, v_b, v_r, v_c, out, sizes,
    token, offsets, T, B, N, rows, heads, C,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    t, b, head, first = run_head_panel(T, B, heads, D, BLOCK_P)
    start, n = run_of(offsets, t, b, T, B, N, rows)
    n = n.to(tl.int32)
    q_at = base_of(start, t, b, q_t, q_b, q_r, offsets)
    k_at = base_of(start, t, b, k_t, k_b, k_r, offsets)
    v_at = base_of(start, t, b, v_t, v_b, v_r, offsets)
    c = head * D + tl.arange(0, BLOCK_D)
    p = head * D + first + tl.arange(0, BLOCK_P)
    end = head * D + D
    lane = tl.arange(0, BLOCK_N)
    if n >= D:
        kv = tl.zeros((BLOCK_D, BLOCK_P), ACC)
        for j in range(0, n, BLOCK_N):
            r = j + lane
            keys = read_block(k, k_at, r, n, c, end, k_r, k_c, ACC)
            values = read_block(v, v_at, r, n, p, end, v_r, v_c, ACC)
            kv += product(tl.trans(keys), weighted(values, sizes, token, b, r, N), ACC)
        for i in range(0, n, BLOCK_N):
            r = i + lane
            queries = read_block(q, q_at, r, n, c, end, q_r, q_c, ACC)
            found = product(queries, kv, ACC) * SCALE
            at, here = block_at(start * C, r, n, p, end, C, 1)
            tl.store(out + at, found.to(out.dtype.element_ty), mask=here)
    else:
        for i in range(0, n, BLOCK_N):
            r = i + lane
            queries = read_block(q, q_at, r, n, c, end, q_r, q_c, ACC)
            found = tl.zeros((BLOCK_N, BLOCK_P), ACC)
            for j in range(0, n, BLOCK_N):
                keys = read_block(k, k_at, j + lane, n, c, end, k_r, k_c, ACC)
                values = read_block(v, v_at, j + lane, n, p, end, v_r, v_c, ACC)
                pairs = product(queries, tl.trans(keys), ACC)
                found += product(pairs, weighted(values, sizes, token, b, j + lane, N), ACC)
            at, here = block_at(start * C, r, n, p, end, C, 1)
            tl.store(out + at, (found * SCALE).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    grad, g_t, g_b, g_r, g_c, q, q_t, q_b, q_r, q_c, k, k_t, k_b, k_r, k_c,
    v, v_t, v_b, v_r, v_c, grad_q, grad_k, grad_v, sizes,
    token, offsets, T, B, N, rows, heads, C,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """With ``w = diag(sizes) v``: ``dq = g kv^T``, ``dk = w dkv^T``, ``dv = diag(sizes) k dkv``.

    ``kv = k^T w`` and ``dkv = q^T g``, ``g`` the gradient times the scale.
    """
    t, b, head, first = run_head_panel(T, B, heads, D, BLOCK_P)
    start, n = run_of(offsets, t, b, T, B, N, rows)
    n = n.to(tl.int32)
    g_at = base_of(start, t, b, g_t, g_b, g_r, offsets)
    q_at = base_of(start, t, b, q_t, q_b, q_r, offsets)
    k_at = base_of(start, t, b, k_t, k_b, k_r, offsets)
    v_at = base_of(start, t, b, v_t, v_b, v_r, offsets)
    c = head * D + tl.arange(0, BLOCK_D)
    p = head * D + first + tl.arange(0, BLOCK_P)
    end = head * D + D
    lane = tl.arange(0, BLOCK_N)
    if n >= D:
        # Rows p of kv and dkv, and columns p of dkv: the same where one program has them all.
        kv = tl.zeros((BLOCK_P, BLOCK_D), ACC)
        dkv = tl.zeros((BLOCK_P, BLOCK_D), ACC)
        columns = tl.zeros((BLOCK_D, BLOCK_P), ACC)
        for j in range(0, n, BLOCK_N):
            r = j + lane
            keys = read_block(k, k_at, r, n, p, end, k_r, k_c, ACC)
            values = read_block(v, v_at, r, n, c, end, v_r, v_c, ACC)
            kv += product(tl.trans(keys), weighted(values, sizes, token, b, r, N), ACC)
            queries = read_block(q, q_at, r, n, p, end, q_r, q_c, ACC)
            sent = read_block(grad, g_at, r, n, c, end, g_r, g_c, ACC) * SCALE
            dkv += product(tl.trans(queries), sent, ACC)
            if BLOCK_P < BLOCK_D:
                queries = read_block(q, q_at, r, n, c, end, q_r, q_c, ACC)
                sent = read_block(grad, g_at, r, n, p, end, g_r, g_c, ACC) * SCALE
                columns += product(tl.trans(queries), sent, ACC)
        if BLOCK_P == BLOCK_D:
            columns = dkv
        for i in range(0, n, BLOCK_N):
            r = i + lane
            at, here = block_at(start * C, r, n, p, end, C, 1)
            sent = read_block(grad, g_at, r, n, c, end, g_r, g_c, ACC) * SCALE
            to_q = product(sent, tl.trans(kv), ACC)
            tl.store(grad_q + at, to_q.to(grad_q.dtype.element_ty), mask=here)
            values = read_block(v, v_at, r, n, c, end, v_r, v_c, ACC)
            to_k = product(weighted(values, sizes, token, b, r, N), tl.trans(dkv), ACC)
            tl.store(grad_k + at, to_k.to(grad_k.dtype.element_ty), mask=here)
            keys = read_block(k, k_at, r, n, c, end, k_r, k_c, ACC)
            to_v = weighted(product(keys, columns, ACC), sizes, token, b, r, N)
            tl.store(grad_v + at, to_v.to(grad_v.dtype.element_ty), mask=here)
    else:
        for i in range(0, n, BLOCK_N):
            r = i + lane
            to_q = tl.zeros((BLOCK_N, BLOCK_P), ACC)
            to_k = tl.zeros((BLOCK_N, BLOCK_P), ACC)
            to_v = tl.zeros((BLOCK_N, BLOCK_P), ACC)
            for j in range(0, n, BLOCK_N):
                o = j + lane
                # What row r sends through the pairs it is a query in: to its query.
                sent = read_block(grad, g_at, r, n, c, end, g_r, g_c, ACC) * SCALE
                values = read_block(v, v_at, o, n, c, end, v_r, v_c, ACC)
                values = weighted(values, sizes, token, b, o, N)
                keys = read_block(k, k_at, o, n, p, end, k_r, k_c, ACC)
                to_q += product(product(sent, tl.trans(values), ACC), keys, ACC)
                # And through those it is a key in: to its key and value.
                sent = read_block(grad, g_at, o, n, c, end, g_r, g_c, ACC) * SCALE
                values = read_block(v, v_at, r, n, c, end, v_r, v_c, ACC)
                values = weighted(values, sizes, token, b, r, N)
                queries = read_block(q, q_at, o, n, p, end, q_r, q_c, ACC)
                to_k += product(product(values, tl.trans(sent), ACC), queries, ACC)
                queries = read_block(q, q_at, o, n, c, end, q_r, q_c, ACC)
                keys = read_block(k, k_at, r, n, c, end, k_r, k_c, ACC)
                sent = read_block(grad, g_at, o, n, p, end, g_r, g_c, ACC) * SCALE
                to_v += product(product(keys, tl.trans(queries), ACC), sent, ACC)
            at, here = block_at(start * C, r, n, p, end, C, 1)
            tl.store(grad_q + at, to_q.to(grad_q.dtype.element_ty), mask=here)
            tl.store(grad_k + at, to_k.to(grad_k.dtype.element_ty), mask=here)
            to_v = weighted(to_v, sizes, token, b, r, N)
            tl.store(grad_v + at, to_v.to(grad_v.dtype.element_ty), mask=here)


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


def _heads(op: str, tokens: Tokens, num_heads: int, scale: float) -> tuple[int, dict[str, Any]]:
    """Number of programs, and what they are compiled for."""
    if num_heads < 1 or tokens.C % num_heads:
        raise InvalidValue(
            f"{op}: num_heads must divide the {tokens.C} channels, got {num_heads}"
        )  # fmt: skip
    D = tokens.C // num_heads
    block = max(16, triton.next_power_of_2(max(D, 1)))
    panel = min(block, PANEL)
    programs = tokens.runs.T * tokens.runs.B * num_heads * triton.cdiv(D, panel)
    return programs, dict(
        D=D, SCALE=float(scale), ACC=tokens.acc, BLOCK_N=32, BLOCK_D=block, BLOCK_P=panel,
        num_warps=4 if block <= 64 else 8,
    )  # fmt: skip


def spiking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    num_heads: int,
    scale: float,
) -> Tensor:
    """The operator; see :func:`atsnn.functional.spiking_attention`."""
    op = "spiking_attention"
    tokens = Tokens(op, {"q": q, "k": k, "v": v}, sizes, token, offsets)
    programs, settings = _heads(op, tokens, num_heads, scale)
    out = q.new_empty(q.shape)
    if programs:
        forward_kernel[(programs,)](
            *tokens.of(q), *tokens.of(k), *tokens.of(v), out, tokens.sizes, *tokens.layout,
            num_heads, tokens.C, **settings,
        )  # fmt: skip
    return out


def spiking_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients for ``q``, ``k`` and ``v``."""
    op = "spiking_attention_backward"
    tokens = Tokens(op, {"q": q, "k": k, "v": v, "grad": grad}, sizes, token, offsets)
    programs, settings = _heads(op, tokens, num_heads, scale)
    grads = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    if programs:
        backward_kernel[(programs,)](
            *tokens.of(grad), *tokens.of(q), *tokens.of(k), *tokens.of(v), *grads, tokens.sizes,
            *tokens.layout, num_heads, tokens.C, **settings,
        )  # fmt: skip
    return grads
