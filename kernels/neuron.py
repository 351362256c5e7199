"""LIF, IF and PLIF over the timesteps of dense or packed rows, forward and backward.

A program takes a block of ranks and channels of one image through all timesteps; its membranes
stay in registers. Up to ``UNROLLED`` timesteps the loop is unrolled, so that all loads are in
flight at once; beyond it goes by segments and the kernel serves any T.

The backward reads the input again and makes the potentials of one segment at a time in registers;
of more segments it first keeps the potential at the beginning of each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import (
    InvalidValue,
    check_choice,
    check_device,
    check_dtype,
    check_like,
    check_shape,
)
from ..reference import arithmetic_dtype
from .blocks import base_of, block_at, block_of
from .launch import EXACT, arithmetic, channel_block, planes, program_elements, row_block
from .neuron_step import charge, reset, step_back, step_settings, surrogate_settings
from .rounding import to_storage
from .rows import Runs, both_or_neither, run_of, token_at

UNROLLED = 8
SEGMENT_BACK = 4  # timesteps of a segment of the backward, which holds two numbers of each
WORD = 64  # channels in a word of spikes as bits
FORMS = ("float", "uint8", "bits")


@triton.jit
def read_steps(x, x_t, x_r, x_c, offsets, t, b, r, c, T, B, N, rows, C, ACC: tl.constexpr):
    """The input of a block at timestep ``t`` (0 where there is none), its rows and their number."""
    start, count = run_of(offsets, t, b, T, B, N, rows)
    # Dense tensors are of one image here.
    base = base_of(start, t, 0, x_t, 0, x_r, offsets)
    at, here = block_at(base, r, count, c, C, x_r, x_c)
    return tl.load(x + at, mask=here, other=0.0).to(ACC), (start + r)[:, None], here


@triton.jit
def write_spikes(out, row, c, C, here, fired, FORM: tl.constexpr):
    """Spikes as 0 and 1 of the type of ``out``, or as bits of int64 words."""
    if FORM == "bits":
        BLOCK_N: tl.constexpr = fired.shape[0]
        WORDS: tl.constexpr = fired.shape[1] // 64
        bits = (fired & here).to(tl.int64) << (tl.cast(c, tl.int64)[None, :] % 64)
        words = tl.sum(tl.reshape(bits, (BLOCK_N, WORDS, 64)), 2)
        # Where a row is has one answer for all of its words.
        w = tl.min(tl.reshape(c, (WORDS, 64)), 1) // 64
        exists = tl.max(here.to(tl.int32), 1)[:, None] > 0
        total = tl.cdiv(C, 64)
        tl.store(out + row * total + w[None, :], words, mask=exists & (w[None, :] < total))
    else:
        at = row * C + tl.cast(c, tl.int64)[None, :]
        value = fired.to(tl.int8) if FORM == "uint8" else tl.where(fired, 1.0, 0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def first_potential(v, v_b, v_n, v_c, token, b, r, c, N, C, REST: tl.constexpr, ACC: tl.constexpr):
    """The membranes of a block before the first timestep, and which of them exist and where."""
    k = token_at(token, b, r, N)
    exists = (k[:, None] >= 0) & (c[None, :] < C)
    channel = tl.cast(c, tl.int64)[None, :]
    cell = (tl.cast(b, tl.int64) * N + k)[:, None] * C + channel
    if v is None:
        potential = tl.full(cell.shape, REST, ACC)
    else:
        at = tl.cast(b, tl.int64) * v_b + k[:, None] * v_n + channel * v_c
        potential = tl.load(v + at, mask=exists, other=REST).to(ACC)
    return potential, cell, exists


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def forward_kernel(
    x, x_t, x_r, x_c, v, v_b, v_n, v_c, inv_tau, spikes, v_final, token, offsets,
    T, B, N, rows, C,
    KIND: tl.constexpr, TAU: tl.constexpr, EXACT_INVERSE: tl.constexpr, REST: tl.constexpr,
    DECAY_INPUT: tl.constexpr, V_THRESHOLD: tl.constexpr, HARD: tl.constexpr,
    FORM: tl.constexpr, ACC: tl.constexpr, STEPS: tl.constexpr, ONE_SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    factor = tl.load(inv_tau).to(ACC) if KIND == "plif" else 1.0
    potential, cell, exists = first_potential(v, v_b, v_n, v_c, token, b, r, c, N, C, REST, ACC)
    segments = 1 if ONE_SEGMENT else tl.cdiv(T, STEPS)
    for segment in range(segments):
        for i in tl.static_range(STEPS):
            value, row, here = read_steps(
                x, x_t, x_r, x_c, offsets, segment * STEPS + i, b, r, c, T, B, N, rows, C, ACC
            )
            u = charge(potential, value, factor, KIND, TAU, EXACT_INVERSE, REST, DECAY_INPUT)
            fired = u >= V_THRESHOLD
            write_spikes(spikes, row, c, C, here, fired, FORM)
            # A token's membrane stays as its last active timestep left it.
            potential = tl.where(here, reset(u, fired, V_THRESHOLD, REST, HARD), potential)
    tl.store(v_final + cell, potential, mask=exists)


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def backward_kernel(
    grad_spikes, gs_t, gs_r, gs_c, grad_v, gv_b, gv_n, gv_c, x, x_t, x_r, x_c, v, v_b, v_n, v_c,
    inv_tau, grad_x, grad_v_init, partial, kept, token, offsets,
    T, B, N, rows, C,
    KIND: tl.constexpr, TAU: tl.constexpr, EXACT_INVERSE: tl.constexpr, REST: tl.constexpr,
    DECAY_INPUT: tl.constexpr, V_THRESHOLD: tl.constexpr, HARD: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr, DETACH_RESET: tl.constexpr,
    ACC: tl.constexpr, STEPS: tl.constexpr, ONE_SEGMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, r, c = block_of(N, C, BLOCK_N, BLOCK_C)
    factor = tl.load(inv_tau).to(ACC) if KIND == "plif" else 1.0
    first, cell, exists = first_potential(v, v_b, v_n, v_c, token, b, r, c, N, C, REST, ACC)
    grad, _, _ = first_potential(grad_v, gv_b, gv_n, gv_c, token, b, r, c, N, C, 0.0, ACC)
    grad_factor = tl.zeros(cell.shape, ACC)
    segments = 1 if ONE_SEGMENT else tl.cdiv(T, STEPS)
    # Where the potential at the beginning of each segment is kept: by rank, as a program sees it.
    block = (tl.cast(tl.program_id(0), tl.int64) * segments) * (BLOCK_N * BLOCK_C)
    lane = tl.arange(0, BLOCK_N)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if not ONE_SEGMENT:
        potential = first
        for segment in range(segments):
            tl.store(kept + block + segment * (BLOCK_N * BLOCK_C) + lane, potential)
            for i in tl.static_range(STEPS):
                value, _, here = read_steps(
                    x, x_t, x_r, x_c, offsets, segment * STEPS + i, b, r, c, T, B, N, rows, C, ACC
                )
                u = charge(potential, value, factor, KIND, TAU, EXACT_INVERSE, REST, DECAY_INPUT)
                after = reset(u, u >= V_THRESHOLD, V_THRESHOLD, REST, HARD)
                potential = tl.where(here, after, potential)
        tl.debug_barrier()  # what other threads of the program stored is read below
    for back in range(segments):
        segment = segments - 1 - back
        potential = first
        if not ONE_SEGMENT:
            potential = tl.load(kept + block + segment * (BLOCK_N * BLOCK_C) + lane)
        values = ()
        befores = ()
        for i in tl.static_range(STEPS):
            value, _, here = read_steps(
                x, x_t, x_r, x_c, offsets, segment * STEPS + i, b, r, c, T, B, N, rows, C, ACC
            )
            values += (value,)
            befores += (potential,)
            u = charge(potential, value, factor, KIND, TAU, EXACT_INVERSE, REST, DECAY_INPUT)
            after = reset(u, u >= V_THRESHOLD, V_THRESHOLD, REST, HARD)
            potential = tl.where(here, after, potential)
        for i in tl.static_range(STEPS):
            t = segment * STEPS + (STEPS - 1 - i)
            value = values[STEPS - 1 - i]
            before = befores[STEPS - 1 - i]
            start, count = run_of(offsets, t, b, T, B, N, rows)
            at, here = block_at(start * C, r, count, c, C, C, 1)
            grad_s = tl.zeros(cell.shape, ACC)
            if grad_spikes is not None:
                grad_s, _, _ = read_steps(
                    grad_spikes, gs_t, gs_r, gs_c, offsets, t, b, r, c, T, B, N, rows, C, ACC
                )
            u = charge(before, value, factor, KIND, TAU, EXACT_INVERSE, REST, DECAY_INPUT)
            to_x, to_v, to_factor = step_back(
                grad_s, grad, u, before, value, factor, KIND, TAU, REST, DECAY_INPUT, V_THRESHOLD,
                HARD, DETACH_RESET, SURROGATE, ALPHA,
            )  # fmt: skip
            tl.store(grad_x + at, to_storage(to_x, grad_x.dtype.element_ty), mask=here)
            grad = tl.where(here, to_v, grad)
            if KIND == "plif":
                grad_factor += tl.where(here, to_factor, 0.0)
    if grad_v_init is not None:
        tl.store(grad_v_init + cell, grad, mask=exists)
    if KIND == "plif":
        total = tl.sum(tl.sum(grad_factor, 1), 0)
        tl.store(partial + tl.program_id(0), total.to(tl.float64))


class _Call:
    """What both directions are launched with: checked shapes, views and blocks.

    ``columns``: the last dimension must be what programs take channels of.
    """

    def __init__(
        self, op: str, x: Tensor, states: dict[str, Tensor | None], token: Tensor | None,
        offsets: Tensor | None, grad_spikes: Tensor | None = None, columns: bool = False,
    ) -> None:  # fmt: skip
        check_dtype(op, "x", x)
        packed = both_or_neither(op, token, offsets)
        if packed:
            self.runs = Runs.of(op, x, token, offsets)
            check_shape(op, "packed x", x, R=None, C=None)
            self.state = (self.runs.B, self.runs.N, x.shape[1])
        else:
            if x.dim() < 1:
                raise InvalidValue(f"{op}: x must have shape (T, ...), got a 0-d tensor")
            self.state = tuple(x.shape[1:])
        if grad_spikes is not None:
            check_like(op, "grad_spikes", grad_spikes, "x", x)
        self.dtype = arithmetic_dtype(x.dtype)
        self.states = {name: v for name, v in states.items() if v is not None}
        for name, v in self.states.items():
            check_shape(op, name, v, **{f"d{i}": size for i, size in enumerate(self.state)})
            check_dtype(op, name, v, (self.dtype,))
            check_device(op, name, v, "x", x)
        if packed:
            self.C = x.shape[1]
            self.x, self.grad_spikes = (y if y is None else y[None] for y in (x, grad_spikes))
        else:
            given = [y for y in (x, grad_spikes, *self.states.values()) if y is not None]
            M, self.C, folded = planes(self.state, given, columns)
            self.runs = Runs.dense(x.shape[0], 1, M)
            views = iter(folded)
            self.x = next(views)
            self.grad_spikes = None if grad_spikes is None else next(views)
            self.states = {name: next(views)[None] for name in self.states}

    def blocks(self, segment: int, least: int = 1) -> tuple[int, dict[str, Any]]:
        """Number of programs, and their blocks; ``segment`` timesteps of more than one segment."""
        elements, T = program_elements(self.x), self.runs.T
        channels = max(least, channel_block(self.C, elements))
        ranks = row_block(self.runs.N, elements, channels)
        per_image = triton.cdiv(self.C, channels) * triton.cdiv(self.runs.N, ranks)
        return per_image * self.runs.B, dict(
            ACC=arithmetic(self.x.dtype), STEPS=T if T <= UNROLLED else segment,
            ONE_SEGMENT=T <= UNROLLED, BLOCK_N=ranks, BLOCK_C=channels,
            num_warps=8 if self.x.element_size() < 4 else 4,
        )  # fmt: skip

    def state_of(self, name: str) -> tuple[Tensor | None, int, int, int]:
        return strided(self.states.get(name))

    @property
    def layout(self) -> tuple[Tensor | None, Tensor | None, int, int, int, int, int]:
        runs = self.runs
        return runs.token, runs.offsets, runs.T, runs.B, runs.N, runs.rows, self.C

    def new_state(self) -> Tensor:
        return self.x.new_empty(self.state, dtype=self.dtype)


def strided(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """A tensor of three dimensions and its strides."""
    return (None, 0, 0, 0) if x is None else (x, *x.stride())


def _factor(op: str, kind: str, inv_tau: Tensor | None, x: Tensor) -> Tensor | None:
    if kind != "plif":
        return None
    if inv_tau is None:
        raise InvalidValue(f"{op}: kind='plif' needs inv_tau, a 0-d tensor, got None")
    check_dtype(op, "inv_tau", inv_tau)
    if inv_tau.numel() != 1:
        check_shape(op, "inv_tau", inv_tau)
    check_device(op, "inv_tau", inv_tau, "x", x)
    return inv_tau


def neuron_spikes(
    x: Tensor,
    v: Tensor | None,
    inv_tau: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    form: str,
    kind: str,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
) -> tuple[Tensor, Tensor]:
    """Spikes in one of three forms, and the final membrane.

    Parameters
    ----------
    x, v, inv_tau, token, offsets, kind, tau, v_threshold, v_reset, decay_input
        Of the operator ``neuron``.
    form : {"float", "uint8", "bits"}
        Spikes of the type of ``x``, as bytes, or as bits: int64 words ``[..., ceil(C / 64)]`` of
        the last dimension, as :func:`atsnn.functional.pack_spikes` makes them.

    Returns
    -------
    (Tensor, Tensor)
        Spikes, and the membrane as of :func:`atsnn.functional.neuron`.
    """
    op = "neuron"
    check_choice(op, "form", form, FORMS)
    bits = form == "bits"
    call = _Call(op, x, {"v": v}, token, offsets, columns=bits)
    settings = step_settings(op, kind, tau, v_threshold, v_reset, decay_input)
    factor = _factor(op, kind, inv_tau, x)
    if bits:
        spikes = x.new_empty((*x.shape[:-1], triton.cdiv(call.C, WORD)), dtype=torch.int64)
    else:
        spikes = x.new_empty(x.shape, dtype=torch.uint8 if form == "uint8" else x.dtype)
    v_final = call.new_state()
    programs, blocks = call.blocks(UNROLLED, WORD if bits else 1)
    if programs:
        forward_kernel[(programs,)](
            *strided(call.x), *call.state_of("v"), factor, spikes, v_final, *call.layout,
            **settings, FORM=form, **blocks, **EXACT,
        )  # fmt: skip
    return spikes, v_final


def neuron(
    x: Tensor,
    v: Tensor | None,
    inv_tau: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``neuron``; see :func:`atsnn.functional.neuron`."""
    surrogate_settings("neuron", surrogate, alpha, detach_reset)
    settings = (kind, tau, v_threshold, v_reset, decay_input)
    return neuron_spikes(x, v, inv_tau, token, offsets, "float", *settings)


def neuron_backward(
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    x: Tensor,
    v: Tensor | None,
    inv_tau: Tensor | None,
    token: Tensor | None,
    offsets: Tensor | None,
    kind: str,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients for ``x``, ``v`` and ``inv_tau``; empty where there is no such input."""
    op = "neuron_backward"
    call = _Call(op, x, {"v": v, "grad_v": grad_v}, token, offsets, grad_spikes)
    settings = step_settings(op, kind, tau, v_threshold, v_reset, decay_input)
    settings |= surrogate_settings(op, surrogate, alpha, detach_reset)
    factor = _factor(op, kind, inv_tau, x)
    programs, blocks = call.blocks(SEGMENT_BACK)
    grad_x = x.new_empty(x.shape)
    grad_v_init = None if v is None else call.new_state()
    partial = kept = None
    if factor is not None:
        partial = x.new_empty(programs, dtype=torch.float64)
    if not blocks["ONE_SEGMENT"]:
        segments = triton.cdiv(call.runs.T, blocks["STEPS"])
        lanes = blocks["BLOCK_N"] * blocks["BLOCK_C"]
        kept = x.new_empty((programs, segments, lanes), dtype=call.dtype)
    if programs:
        backward_kernel[(programs,)](
            *strided(call.grad_spikes), *call.state_of("grad_v"), *strided(call.x),
            *call.state_of("v"), factor, grad_x, grad_v_init, partial, kept, *call.layout,
            **settings, **blocks, **EXACT,
        )  # fmt: skip
    nothing = x.new_empty(0, dtype=call.dtype)
    return (
        grad_x,
        nothing if grad_v_init is None else grad_v_init,
        # Each program's sum is one number; theirs is taken in an order that is always the same.
        nothing.clone() if factor is None else partial.sum().to(factor.dtype).view(factor.shape),
    )
