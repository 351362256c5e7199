"""Spiking attention over dense tokens or packed rows, as operators."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..layout import TokenLayout
from .backends import resolve_backend
from .library import (
    autograd,
    composite,
    fake,
    layout_of,
    packed,
    parts,
    reference_gradients,
    unpacked,
)

# -- spiking attention ----------------------------------------------------------------------------


def _spiking(q, k, v, sizes, layout, num_heads, scale):
    q, k, v = (unpacked(layout, x) for x in (q, k, v))
    return packed(layout, reference.spiking_attention(q, k, v, num_heads, scale, sizes))


@composite("spiking_attention")
def _spiking_composite(q, k, v, sizes, token, offsets, num_heads, scale):
    return _spiking(q, k, v, sizes, layout_of(token, offsets), num_heads, scale).contiguous()


@composite("spiking_attention_backward")
def _spiking_backward(grad, q, k, v, sizes, token, offsets, num_heads, scale):
    layout = layout_of(token, offsets)
    return reference_gradients(
        lambda q, k, v: _spiking(q, k, v, sizes, layout, num_heads, scale), (q, k, v), (grad,)
    )


@fake("spiking_attention")
def _spiking_fake(q, *_):
    return q.new_empty(q.shape)


@fake("spiking_attention_backward")
def _spiking_backward_fake(grad, q, k, v, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _spiking_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _spiking_gradient(operators, ctx, grad):
    grads = operators.spiking_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None, None)


autograd("spiking_attention", _spiking_gradient, _spiking_setup)


def spiking_attention(
    backend: str,
    layout: TokenLayout | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor | None,
    num_heads: int,
    scale: float,
) -> Tensor:
    """The ``spiking_attention`` operator by the chosen backend."""
    operators = resolve_backend("spiking_attention", backend, q.device)
    if operators is None:
        return _spiking(q, k, v, sizes, layout, num_heads, scale)
    return operators.spiking_attention(q, k, v, sizes, *parts(layout), num_heads, float(scale))


# -- spike-driven attention -----------------------------------------------------------------------


def _driven(q, k, v, state, sizes, layout, v_threshold, tau, surrogate, alpha):
    q, k, v = (unpacked(layout, x) for x in (q, k, v))
    out, state = reference.spike_driven_attention(
        q, k, v, v_threshold, sizes, tau, surrogate, alpha, state
    )
    return packed(layout, out), state


@composite("spike_driven_attention")
def _driven_composite(q, k, v, state, sizes, token, offsets, *settings):
    out, v_final = _driven(q, k, v, state, sizes, layout_of(token, offsets), *settings)
    return out.contiguous(), v_final.clone() if v_final is state else v_final


@composite("spike_driven_attention_backward")
def _driven_backward(grad, grad_state, q, k, v, state, sizes, token, offsets, *settings):
    layout = layout_of(token, offsets)
    return reference_gradients(
        lambda q, k, v, state: _driven(q, k, v, state, sizes, layout, *settings),
        (q, k, v, state), (grad, grad_state),
    )  # fmt: skip


def _driven_state(q, token):
    B = q.shape[1] if token is None else token.shape[0]
    return q.new_empty((B, 1, q.shape[-1]), dtype=reference.arithmetic_dtype(q.dtype))


@fake("spike_driven_attention")
def _driven_fake(q, k, v, state, sizes, token, offsets, *_):
    return q.new_empty(q.shape), _driven_state(q, token)


@fake("spike_driven_attention_backward")
def _driven_backward_fake(grad, grad_state, q, k, v, state, sizes, token, offsets, *_):
    nothing = q.new_empty(0, dtype=reference.arithmetic_dtype(q.dtype))
    return (
        q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape),
        nothing if state is None else _driven_state(q, token),
    )  # fmt: skip


def _driven_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)


def _driven_gradient(operators, ctx, grad, grad_state):
    nothing = (None,) * 11
    if grad is None and grad_state is None:
        return nothing
    grad_q, grad_k, grad_v, grad_v_init = operators.spike_driven_attention_backward(
        grad, grad_state, *ctx.saved_tensors, *ctx.settings
    )
    has_state = ctx.saved_tensors[3] is not None
    return (grad_q, grad_k, grad_v, grad_v_init if has_state else None, *nothing[4:])


autograd("spike_driven_attention", _driven_gradient, _driven_setup)


def spike_driven_attention(
    backend: str,
    layout: TokenLayout | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    sizes: Tensor | None,
    *settings: object,
) -> tuple[Tensor, Tensor]:
    """The ``spike_driven_attention`` operator by the chosen backend."""
    operators = resolve_backend("spike_driven_attention", backend, q.device)
    if operators is None:
        return _driven(q, k, v, state, sizes, layout, *settings)
    return operators.spike_driven_attention(q, k, v, state, sizes, *parts(layout), *settings)
