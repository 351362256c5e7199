"""Spiking neurons as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..layout import TokenLayout
from .backends import resolve_backend
from .library import autograd, composite, fake, layout_of, parts, reference_gradients


def neuron_reference(x, v, inv_tau, layout, settings):
    """The reference on dense or packed rows."""
    if layout is None:
        return reference.neuron(x, v, inv_tau, *settings)
    dense = layout.unpack(x)
    # A token's membrane after its last active timestep is what counts, so each is run to its own.
    spikes, _ = reference.neuron(dense, v, inv_tau, *settings)
    rest = settings[3] or 0.0
    dtype = reference.arithmetic_dtype(x.dtype)
    state = x.new_full(dense.shape[1:], rest, dtype=dtype) if v is None else v
    for T in range(1, layout.T + 1):
        ends = (layout.active_steps == T).unsqueeze(-1)
        _, at_end = reference.neuron(dense[:T], v, inv_tau, *settings)
        state = torch.where(ends, at_end, state)
    return layout.pack(spikes), state


@composite("neuron")
def _neuron(x, v, inv_tau, token, offsets, *settings):
    s, v_final = neuron_reference(x, v, inv_tau, layout_of(token, offsets), settings)
    # An operator must not return one of its inputs, which v is where T = 0.
    return s, v_final.clone() if v_final is v else v_final


@composite("neuron_backward")
def _neuron_backward(grad_spikes, grad_v, x, v, inv_tau, token, offsets, *settings):
    layout = layout_of(token, offsets)
    return reference_gradients(
        lambda x, v, inv_tau: neuron_reference(x, v, inv_tau, layout, settings),
        (x, v, inv_tau), (grad_spikes, grad_v),
    )  # fmt: skip


def _state(x, token):
    shape = x.shape[1:] if token is None else (*token.shape, x.shape[1])
    return x.new_empty(shape, dtype=reference.arithmetic_dtype(x.dtype))


@fake("neuron")
def _neuron_fake(x, v, inv_tau, token, offsets, *settings):
    return x.new_empty(x.shape), _state(x, token)


@fake("neuron_backward")
def _neuron_backward_fake(grad_spikes, grad_v, x, v, inv_tau, token, offsets, *settings):
    nothing = x.new_empty(0, dtype=reference.arithmetic_dtype(x.dtype))
    return (
        x.new_empty(x.shape),
        nothing if v is None else _state(x, token),
        torch.empty_like(nothing) if inv_tau is None else torch.empty_like(inv_tau),
    )


def _setup(ctx, inputs, output):
    x, v, inv_tau, token, offsets, *settings = inputs
    # Only the inputs are saved: the backward makes the potentials again from them.
    ctx.save_for_backward(x, v, inv_tau, token, offsets)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _gradient(operators, ctx, grad_spikes, grad_v):
    x, v, inv_tau, token, offsets = ctx.saved_tensors
    nothing = (None,) * (5 + len(ctx.settings))
    if grad_spikes is None and grad_v is None:
        return nothing
    grad_x, grad_state, grad_factor = operators.neuron_backward(
        grad_spikes, grad_v, x, v, inv_tau, token, offsets, *ctx.settings
    )
    return (
        grad_x,
        None if v is None else grad_state,
        None if inv_tau is None else grad_factor,
        *nothing[3:],
    )


autograd("neuron", _gradient, _setup)


def neuron(
    backend: str,
    layout: TokenLayout | None,
    x: Tensor,
    v: Tensor | None,
    inv_tau: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """The ``neuron`` operator by the chosen backend; settings as in the schema."""
    operators = resolve_backend("neuron", backend, x.device)
    if operators is None:
        return neuron_reference(x, v, inv_tau, layout, settings)
    return operators.neuron(x, v, inv_tau, *parts(layout), *settings)
