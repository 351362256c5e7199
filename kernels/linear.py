"""Linear maps of spikes with their neurons, for inference, and spikes as bits.

A program makes 64 outputs (a panel of the packed weights, a word of spikes) of a block of ranks of
one image. It goes through the timesteps with the membranes in registers: the sums of a timestep are
made by ``tl.dot`` and step them at once, so that no current is written. Where none of its ranks is
active any more it does no work.

Weights are three pieces of bfloat16 in the products, spikes as bits are one (as floats: three, for
they may be numbers): each product is exact and the sums are float32. Blocks are as large as the
registers of sm_80 hold; states take some of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import (
    InvalidValue,
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    shape_of,
)
from .blocks import base_of
from .launch import EXACT, planes
from .neuron import WORD, first_potential, strided, write_spikes
from .neuron_step import charge, reset, step_settings
from .rounding import INTERPRETED
from .rows import Runs, both_or_neither, run_of

# The interpreter takes products in float32 and knows no other name for it.
PRECISION = "ieee" if INTERPRETED.value else "bf16x6"
PANEL = tl.constexpr(WORD)


@triton.jit
def word_bits(words, lanes):
    """0.0 and 1.0 of the bits of a column of words."""
    return ((words >> lanes[None, :]) & 1).to(tl.float32)


@triton.jit
def add_product(total, x, w, BITS: tl.constexpr, PRECISION: tl.constexpr):
    """``total + x @ w``. A bit is one piece of bfloat16, a weight three, smallest first."""
    if BITS and PRECISION != "ieee":
        spikes = x.to(tl.bfloat16)
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(spikes, low, total)
        total = tl.dot(spikes, middle, total)
        total = tl.dot(spikes, high, total)
    else:
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["rows"])
def pack_kernel(x, x_r, x_c, words, rows, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = (tl.program_id(0) // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.cast(r, tl.int64)[:, None]
    here = (r[:, None] < rows) & (c[None, :] < C)
    value = tl.load(x + row * x_r + tl.cast(c, tl.int64)[None, :] * x_c, mask=here, other=0.0)
    write_spikes(words, row, c, C, here, value != 0.0, "bits")


@triton.jit(do_not_specialize=["rows"])
def unpack_kernel(words, w_r, w_w, out, rows, C, BLOCK_N: tl.constexpr):
    panels = tl.cdiv(C, PANEL)
    panel = tl.program_id(0) % panels
    lanes = tl.arange(0, PANEL)
    c = panel * PANEL + lanes
    r = (tl.program_id(0) // panels) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.cast(r, tl.int64)[:, None]
    word = tl.load(words + row * w_r + tl.cast(panel, tl.int64) * w_w, mask=r[:, None] < rows)
    here = (r[:, None] < rows) & (c[None, :] < C)
    tl.store(out + row * C + c[None, :], word_bits(word, lanes), mask=here)


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def linear_kernel(
    spikes, s_t, s_r, s_k, weight, bias, v, v_b, v_n, v_c, inv_tau, out, v_final, token, offsets,
    T, B, N, rows, K, outputs,
    KIND: tl.constexpr, TAU: tl.constexpr, EXACT_INVERSE: tl.constexpr, REST: tl.constexpr,
    DECAY_INPUT: tl.constexpr, V_THRESHOLD: tl.constexpr, HARD: tl.constexpr,
    BITS: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    panels = tl.cdiv(outputs, PANEL)
    blocks_n = tl.cdiv(N, BLOCK_N)
    panel = pid % panels
    first = pid // panels % blocks_n * BLOCK_N
    b = pid // (panels * blocks_n)
    lanes = tl.arange(0, PANEL)
    c = panel * PANEL + lanes
    r = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    potential, _, _ = first_potential(
        v, v_b, v_n, v_c, token, b, r, c, N, outputs, REST, tl.float32
    )  # fmt: skip
    panel_at = weight + tl.cast(panel, tl.int64) * K * PANEL
    for t in range(T):
        start, count = run_of(offsets, t, b, T, B, N, rows)
        # Dense tensors are of one image here.
        at = base_of(start, t, 0, s_t, 0, s_r, offsets) + tl.cast(r, tl.int64)[:, None] * s_r
        row_here = r[:, None] < count
        u = tl.load(bias + c)[None, :] + tl.zeros(potential.shape, tl.float32)
        inputs = tl.where(first < count, K, 0)
        for k0 in range(0, inputs, BLOCK_K):
            if BITS:
                word = tl.load(
                    spikes + at + tl.cast(k0 // 64, tl.int64) * s_k, mask=row_here, other=0
                )
                x = word_bits(word, k0 % 64 + k)
            else:
                here = row_here & (k0 + k < K)[None, :]
                x = tl.load(
                    spikes + at + tl.cast(k0 + k, tl.int64)[None, :] * s_k, mask=here, other=0.0
                )
            w = tl.load(
                panel_at + (k0 + k)[:, None] * PANEL + lanes[None, :],
                mask=(k0 + k)[:, None] < K, other=0.0,
            )  # fmt: skip
            u = add_product(u, x, w, BITS, PRECISION)
        u = charge(potential, u, inv_tau, KIND, TAU, EXACT_INVERSE, REST, DECAY_INPUT)
        fired = u >= V_THRESHOLD
        here = row_here & (c[None, :] < outputs)
        write_spikes(out, (start + r)[:, None], c, outputs, here, fired, FORM)
        potential = tl.where(here, reset(u, fired, V_THRESHOLD, REST, HARD), potential)
    if v_final is not None:
        # Found again: addresses of 64 bits would take the registers of the products.
        _, cell, exists = first_potential(
            None, 0, 0, 0, token, b, r, c, N, outputs, REST, tl.float32
        )  # fmt: skip
        tl.store(v_final + cell, potential, mask=exists)


def pack_spikes(x: Tensor) -> Tensor:
    """The operator; see :func:`atsnn.functional.pack_spikes`."""
    op = "pack_spikes"
    check_dtype(op, "x", x, (torch.float32,))
    if x.dim() < 1:
        raise InvalidValue(f"{op}: x must have shape (..., C), got a 0-d tensor")
    C = x.shape[-1]
    words = x.new_empty((*x.shape[:-1], triton.cdiv(C, WORD)), dtype=torch.int64)
    if words.numel():
        rows, _, (folded,) = planes(x.shape, [x], last=True)
        block = min(256, triton.next_power_of_2(max(C, WORD)))
        pack_kernel[(triton.cdiv(C, block) * triton.cdiv(rows, 8),)](
            folded, *folded.stride(), words, rows, C, BLOCK_N=8, BLOCK_C=block, **EXACT
        )
    return words


def unpack_spikes(bits: Tensor, channels: int) -> Tensor:
    """The operator; see :func:`atsnn.functional.unpack_spikes`."""
    op = "unpack_spikes"
    check_dtype(op, "bits", bits, (torch.int64,))
    check_integer(op, "channels", channels, at_least=1)
    words = triton.cdiv(channels, WORD)
    if bits.dim() < 1 or bits.shape[-1] != words:
        raise InvalidValue(
            f"{op}: bits must have shape (..., {words}) for {channels} channels, "
            f"got {shape_of(bits)}"
        )
    out = bits.new_empty((*bits.shape[:-1], channels), dtype=torch.float32)
    if out.numel():
        rows, _, (folded,) = planes(bits.shape, [bits], last=True)
        unpack_kernel[(words * triton.cdiv(rows, 32),)](
            folded, *folded.stride(), out, rows, channels, BLOCK_N=32, **EXACT
        )
    return out


def spike_linear_lif(
    spikes: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    outputs: int,
    kind: str,
    tau: float,
    inv_tau: float | None,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The operator; see :func:`atsnn.functional.spike_linear_lif`."""
    op = "spike_linear_lif"
    check_dtype(op, "spikes", spikes, (torch.float32, torch.int64))
    check_integer(op, "outputs", outputs, at_least=1)
    panels = triton.cdiv(outputs, WORD)
    check_shape(op, "the packed weight", weight, panels=panels, inputs=None, panel=WORD)
    check_shape(op, "the packed bias", bias, panels=panels, panel=WORD)
    for name, value in (("weight", weight), ("bias", bias)):
        check_dtype(op, f"the packed {name}", value, (torch.float32,))
        check_device(op, f"the packed {name}", value, "spikes", spikes)
    K = weight.shape[1]
    bits = spikes.dtype == torch.int64
    last = triton.cdiv(K, WORD) if bits else K
    packed = both_or_neither(op, token, offsets)
    if K < 1 or spikes.dim() < (1 if packed else 2) or spikes.shape[-1] != last:
        raise InvalidValue(
            f"{op}: spikes must have {last} in their last dimension, got {shape_of(spikes)}"
        )
    if packed:
        check_shape(op, "packed spikes", spikes, R=None, inputs=last)
        runs = Runs.of(op, spikes, token, offsets)
        state = (runs.B, runs.N, outputs)
        x = spikes[None]
    else:
        M, _, (x,) = planes(spikes.shape[1:], [spikes], last=True)
        runs = Runs.dense(spikes.shape[0], 1, M)
        state = (*spikes.shape[1:-1], outputs)
    if v is not None:
        check_shape(op, "v", v, **{f"d{i}": size for i, size in enumerate(state)})
        check_dtype(op, "v", v, (torch.float32,))
        check_device(op, "v", v, "spikes", spikes)
        v = v if packed else planes(state, [v], last=True)[2][0][None]
    if kind == "plif" and inv_tau is None:
        raise InvalidValue(f"{op}: kind='plif' needs inv_tau, got None")
    settings = step_settings(op, kind, tau, v_threshold, v_reset, decay_input)
    shape = (*spikes.shape[:-1], panels if bits else outputs)
    out = spikes.new_empty(shape)
    final = weight.new_empty(state) if keep else None
    block = max(16, min(128, triton.next_power_of_2(max(runs.N, 1))))
    programs = panels * triton.cdiv(runs.N, block) * runs.B
    if programs:
        linear_kernel[(programs,)](
            x, *x.stride(), weight.contiguous(), bias.contiguous(), *strided(v), inv_tau or 0.0,
            out, final, runs.token, runs.offsets, runs.T, runs.B, runs.N, runs.rows, K, outputs,
            **settings, BITS=bits, FORM="bits" if bits else "float", PRECISION=PRECISION,
            BLOCK_N=block, BLOCK_K=16 if keep or v is not None else 32,
            num_warps=8 if block == 128 else 4, **EXACT,
        )  # fmt: skip
    return out, weight.new_empty(0) if final is None else final
