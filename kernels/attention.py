"""Spiking self-attention ``scale * q (k^T diag(sizes) v)`` over the runs of rows.

A program takes one head of one run ``(t, b)``, so nothing is padded to the longest image. Sums are
of integers and taken in float32 (float64 for float64) without reduced precision: exact below 2^24,
so both orders of the product give the same bits. The cheaper one is chosen for each run.

Heads wider than ``PANEL`` channels are shared by several programs, each of which makes a panel of
the columns; ``k^T v`` never leaves the registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue
from .blocks import Tokens, base_of, read_block, weighted, write_block
from .rows import run_of

PANEL = 64  # of heads that fit into one; of wider ones it is narrower, for the registers
# NVIDIA's assembler would rather spill a few bytes than take more; AMD's does not know the option.
REGISTERS = {"maxnreg": 128} if torch.version.hip is None else {}
MOST_CHANNELS = 512  # of a head, for the shared memory


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


@triton.jit
def attend(
    x, x_at, x_r, x_c, y, y_at, y_r, y_c, z, z_at, z_r, z_c, out, sizes, token, b, start, n, N,
    head, first, C, SUM_WEIGHS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``out = SCALE * x (y^T z)`` of one head of one run, a panel of its columns.

    The sizes weigh the rows that are summed over, or those of the result.
    """
    c = head * D + tl.arange(0, BLOCK_D)
    p = head * D + first + tl.arange(0, BLOCK_P)
    end = head * D + D
    lane = tl.arange(0, BLOCK_N)
    if n >= D:
        inner = tl.zeros((BLOCK_D, BLOCK_P), ACC)
        for j in range(0, n, BLOCK_N):
            left = read_block(y, y_at, j + lane, n, c, end, y_r, y_c, ACC)
            right = read_block(z, z_at, j + lane, n, p, end, z_r, z_c, ACC)
            if SUM_WEIGHS:
                right = weighted(right, sizes, token, b, j + lane, N)
            inner += product(tl.trans(left), right, ACC)
        for i in range(0, n, BLOCK_N):
            rows = read_block(x, x_at, i + lane, n, c, end, x_r, x_c, ACC)
            found = product(rows, inner, ACC) * SCALE
            if not SUM_WEIGHS:
                found = weighted(found, sizes, token, b, i + lane, N)
            write_block(out, start, i + lane, n, p, end, C, found)
    else:
        for i in range(0, n, BLOCK_N):
            rows = read_block(x, x_at, i + lane, n, c, end, x_r, x_c, ACC)
            found = tl.zeros((BLOCK_N, BLOCK_P), ACC)
            for j in range(0, n, BLOCK_N):
                left = read_block(y, y_at, j + lane, n, c, end, y_r, y_c, ACC)
                right = read_block(z, z_at, j + lane, n, p, end, z_r, z_c, ACC)
                if SUM_WEIGHS:
                    right = weighted(right, sizes, token, b, j + lane, N)
                found += product(product(rows, tl.trans(left), ACC), right, ACC)
            found *= SCALE
            if not SUM_WEIGHS:
                found = weighted(found, sizes, token, b, i + lane, N)
            write_block(out, start, i + lane, n, p, end, C, found)


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
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
    attend(
        q, q_at, q_r, q_c, k, k_at, k_r, k_c, v, v_at, v_r, v_c, out, sizes, token, b, start, n, N,
        head, first, C, True, D, SCALE, ACC, BLOCK_N, BLOCK_D, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def backward_kernel(
    grad, g_t, g_b, g_r, g_c, q, q_t, q_b, q_r, q_c, k, k_t, k_b, k_r, k_c,
    v, v_t, v_b, v_r, v_c, grad_q, grad_k, grad_v, sizes,
    token, offsets, T, B, N, rows, heads, C,
    D: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each gradient has the form of the forward: ``dq = g (v^T k)``, ``dk = v (g^T q)`` and
    ``dv = k (q^T g)``. A run is read for all three in turn, so that it comes from the cache."""
    t, b, head, first = run_head_panel(T, B, heads, D, BLOCK_P)
    start, n = run_of(offsets, t, b, T, B, N, rows)
    n = n.to(tl.int32)
    g_at = base_of(start, t, b, g_t, g_b, g_r, offsets)
    q_at = base_of(start, t, b, q_t, q_b, q_r, offsets)
    k_at = base_of(start, t, b, k_t, k_b, k_r, offsets)
    v_at = base_of(start, t, b, v_t, v_b, v_r, offsets)
    attend(
        grad, g_at, g_r, g_c, v, v_at, v_r, v_c, k, k_at, k_r, k_c, grad_q, sizes, token, b, start,
        n, N, head, first, C, True, D, SCALE, ACC, BLOCK_N, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    attend(
        v, v_at, v_r, v_c, grad, g_at, g_r, g_c, q, q_at, q_r, q_c, grad_k, sizes, token, b, start,
        n, N, head, first, C, False, D, SCALE, ACC, BLOCK_N, BLOCK_D, BLOCK_P,
    )  # fmt: skip
    attend(
        k, k_at, k_r, k_c, q, q_at, q_r, q_c, grad, g_at, g_r, g_c, grad_v, sizes, token, b, start,
        n, N, head, first, C, False, D, SCALE, ACC, BLOCK_N, BLOCK_D, BLOCK_P,
    )  # fmt: skip


def _heads(op: str, tokens: Tokens, num_heads: int, scale: float) -> tuple[int, dict[str, Any]]:
    """Number of programs, and what they are compiled for."""
    if num_heads < 1 or tokens.C % num_heads:
        raise InvalidValue(
            f"{op}: num_heads must divide the {tokens.C} channels, got {num_heads}"
        )  # fmt: skip
    D = tokens.C // num_heads
    if D > MOST_CHANNELS:
        raise InvalidValue(
            f"{op}: a head must have at most {MOST_CHANNELS} channels in Triton's kernel, got {D}"
        )
    block = max(16, triton.next_power_of_2(max(D, 1)))
    panel = block if block <= PANEL else PANEL // 2 if block < MOST_CHANNELS else PANEL // 4
    programs = tokens.runs.T * tokens.runs.B * num_heads * triton.cdiv(D, panel)
    return programs, dict(
        D=D, SCALE=float(scale), ACC=tokens.acc, BLOCK_N=32 if block <= 32 else 16, BLOCK_D=block,
        BLOCK_P=panel, num_warps=4 if block <= 128 else 8, enable_fp_fusion=True,
        # Runs are a few blocks long: fetching ahead takes registers and gains nothing.
        num_stages=1, **({} if tokens.acc == tl.float64 else REGISTERS),
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
