"""Spike-driven self-attention ``q * LIF(sum_n k * v)`` over the runs of rows.

Three launches: sums over the tokens of each run, the neuron of :mod:`.neuron` on them, and a gate
on the rows. The sums, one row a run, are all that is written between them.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_device, check_dtype, check_shape
from ..reference import arithmetic_dtype
from .blocks import Tokens, base_of, read_block, rows_of_run, weighted, write_block
from .launch import EXACT, channel_block, row_block
from .neuron import neuron, neuron_backward
from .neuron_step import surrogate_settings
from .rows import run_of


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def token_sums_kernel(
    x, x_t, x_b, x_r, x_c, y, y_t, y_b, y_r, y_c, sums, sizes, token, offsets, T, B, N, rows, C,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``[T, B, C]``: the sum over a run's tokens of ``size * x * y``."""
    blocks = tl.cdiv(C, BLOCK_C)
    run = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = run // B
    b = run % B
    start, n = run_of(offsets, t, b, T, B, N, rows)
    n = n.to(tl.int32)
    x_at = base_of(start, t, b, x_t, x_b, x_r, offsets)
    y_at = base_of(start, t, b, y_t, y_b, y_r, offsets)
    total = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for j in range(0, n, BLOCK_N):
        r = j + tl.arange(0, BLOCK_N)
        found = read_block(x, x_at, r, n, c, C, x_r, x_c, ACC)
        found *= read_block(y, y_at, r, n, c, C, y_r, y_c, ACC)
        total += weighted(found, sizes, token, b, r, N)
    tl.store(sums + tl.cast(run, tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def read_run(values, t, b, B, c, C):
    """The row of a run in ``[T, B, C]``, over all of its tokens."""
    at = (tl.cast(t, tl.int64) * B + b) * C + c
    return tl.load(values + at, mask=c < C, other=0.0)[None, :]


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def gate_kernel(
    q, q_t, q_b, q_r, q_c, gates, out, offsets, T, B, N, rows, C,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    t, b, start, n, r, c = rows_of_run(offsets, T, B, N, rows, C, BLOCK_N, BLOCK_C)
    q_at = base_of(start, t, b, q_t, q_b, q_r, offsets)
    queries = read_block(q, q_at, r, n, c, C, q_r, q_c, ACC)
    write_block(out, start, r, n, c, C, C, queries * read_run(gates, t, b, B, c, C))


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def gate_backward_kernel(
    grad, g_t, g_b, g_r, g_c, k, k_t, k_b, k_r, k_c, v, v_t, v_b, v_r, v_c, gates, grad_sums,
    grad_q, grad_k, grad_v, sizes, token, offsets, T, B, N, rows, C,
    ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dq = g * gate``, ``dk = size * v * dsum``, ``dv = size * k * dsum``."""
    t, b, start, n, r, c = rows_of_run(offsets, T, B, N, rows, C, BLOCK_N, BLOCK_C)
    sent = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    if grad is not None:
        g_at = base_of(start, t, b, g_t, g_b, g_r, offsets)
        sent = read_block(grad, g_at, r, n, c, C, g_r, g_c, ACC)
    write_block(grad_q, start, r, n, c, C, C, sent * read_run(gates, t, b, B, c, C))
    to_sum = read_run(grad_sums, t, b, B, c, C)
    v_at = base_of(start, t, b, v_t, v_b, v_r, offsets)
    values = read_block(v, v_at, r, n, c, C, v_r, v_c, ACC)
    write_block(
        grad_k, start, r, n, c, C, C, weighted(values * to_sum, sizes, token, b, r, N)
    )  # fmt: skip
    k_at = base_of(start, t, b, k_t, k_b, k_r, offsets)
    keys = read_block(k, k_at, r, n, c, C, k_r, k_c, ACC)
    write_block(grad_v, start, r, n, c, C, C, weighted(keys * to_sum, sizes, token, b, r, N))


def _token_sums(tokens: Tokens, x: Tensor, y: Tensor, sizes: Tensor | None) -> Tensor:
    """``[T, B, 1, C]`` in the arithmetic type."""
    runs = tokens.runs
    sums = x.new_empty((runs.T, runs.B, 1, tokens.C), dtype=arithmetic_dtype(x.dtype))
    if sums.numel():
        block = channel_block(tokens.C, 128)
        token_sums_kernel[(runs.T * runs.B * triton.cdiv(tokens.C, block),)](
            *tokens.of(x), *tokens.of(y), sums, sizes, *tokens.layout, tokens.C, ACC=tokens.acc,
            BLOCK_N=row_block(runs.N, 2048, block), BLOCK_C=block, **EXACT,
        )  # fmt: skip
    return sums


def _row_blocks(tokens: Tokens) -> tuple[int, dict[str, Any]]:
    """Number of programs that go over all rows, and their blocks."""
    runs = tokens.runs
    channels = channel_block(tokens.C, 1024)
    ranks = row_block(runs.N, 2048, channels)
    programs = triton.cdiv(tokens.C, channels) * triton.cdiv(runs.N, ranks) * runs.T * runs.B
    return programs, dict(ACC=tokens.acc, BLOCK_N=ranks, BLOCK_C=channels)


def _check_state(op: str, name: str, state: Tensor | None, tokens: Tokens, q: Tensor) -> None:
    if state is not None:
        check_shape(op, name, state, B=tokens.runs.B, one=1, C=tokens.C)
        check_dtype(op, name, state, (arithmetic_dtype(q.dtype),))
        check_device(op, name, state, "q", q)


def spike_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    sizes: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    v_threshold: float,
    tau: float,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """The operator; see :func:`atsnn.functional.spike_driven_attention`."""
    op = "spike_driven_attention"
    tokens = Tokens(op, {"q": q, "k": k, "v": v}, sizes, token, offsets)
    _check_state(op, "state", state, tokens, q)
    surrogate_settings(op, surrogate, alpha, True)
    sums = _token_sums(tokens, k, v, tokens.sizes)
    gates, final = neuron(
        sums, state, None, None, None, "lif", tau, v_threshold, 0.0, True, True, surrogate, alpha
    )
    out = q.new_empty(q.shape)
    programs, blocks = _row_blocks(tokens)
    if programs:
        gate_kernel[(programs,)](
            *tokens.of(q), gates, out, *tokens.layout[1:], tokens.C, **blocks, **EXACT
        )
    return out, final


def spike_driven_attention_backward(
    grad: Tensor | None,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    sizes: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    v_threshold: float,
    tau: float,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradients for ``q``, ``k``, ``v`` and ``state``, empty where there is none."""
    op = "spike_driven_attention_backward"
    given = {"q": q, "k": k, "v": v} | ({} if grad is None else {"grad": grad})
    tokens = Tokens(op, given, sizes, token, offsets)
    _check_state(op, "state", state, tokens, q)
    _check_state(op, "grad_state", grad_state, tokens, q)
    surrogate_settings(op, surrogate, alpha, True)
    lif = ("lif", tau, v_threshold, 0.0, True, True, surrogate, alpha)
    sums = _token_sums(tokens, k, v, tokens.sizes)
    gates, _ = neuron(sums, state, None, None, None, *lif)
    to_gates = None if grad is None else _token_sums(tokens, grad, q, None)
    to_sums, to_state, _ = neuron_backward(
        to_gates, grad_state, sums, state, None, None, None, *lif
    )
    grads = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    programs, blocks = _row_blocks(tokens)
    if programs:
        sent = (None, 0, 0, 0, 0) if grad is None else tokens.of(grad)
        gate_backward_kernel[(programs,)](
            *sent, *tokens.of(k), *tokens.of(v), gates, to_sums, *grads, tokens.sizes,
            *tokens.layout, tokens.C, **blocks, **EXACT,
        )  # fmt: skip
    return (*grads, to_state)
