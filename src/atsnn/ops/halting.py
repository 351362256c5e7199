"""Halting scores, the halting step and the readout, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import TokenLayout
from .backends import resolve_backend
from .library import autograd, composite, fake, layout_of, parts, reference_gradients, unpacked

# -- scores ---------------------------------------------------------------------------------------

composite("halting_scores")(reference.halting_scores)


@composite("halting_scores_backward")
def _scores_backward(grad, x, weight, bias, score):
    found = reference_gradients(
        lambda x, weight, bias: reference.halting_scores(x, weight, bias, score),
        (x, weight, bias), (grad,),
    )  # fmt: skip
    return found if score in ("first", "mean") else (x.new_empty(0), *found[1:])


@fake("halting_scores")
def _scores_fake(x, weight, bias, score):
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


@fake("halting_scores_backward")
def _scores_backward_fake(grad, x, weight, bias, score):
    shape = x.shape if score in ("first", "mean") else (0,)
    return x.new_empty(shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _scores_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.score = inputs[3]


def _scores_gradient(operators, ctx, grad):
    grad_x, grad_weight, grad_bias = operators.halting_scores_backward(
        grad, *ctx.saved_tensors, ctx.score
    )
    return grad_x if ctx.score in ("first", "mean") else None, grad_weight, grad_bias, None


autograd("halting_scores", _scores_gradient, _scores_setup)


def halting_scores(backend: str, x: Tensor, weight: Tensor, bias: Tensor, score: str) -> Tensor:
    """The ``halting_scores`` operator by the chosen backend."""
    operators = resolve_backend("halting_scores", backend, x.device)
    if operators is None:
        return reference.halting_scores(x, weight, bias, score)
    return operators.halting_scores(x, weight, bias, score)


# -- halt -----------------------------------------------------------------------------------------


def _halt(h, H, layout, accumulator, eps, final):
    w, last, after, steps = reference.halt(
        unpacked(layout, h), unpacked(layout, H), layout.mask, accumulator, eps, final
    )
    return layout.pack(w), layout.pack(last), layout.pack(after), steps


@composite("halt")
def _halt_composite(h, H, token, offsets, accumulator, eps, final):
    w, last, after, steps = _halt(h, H, layout_of(token, offsets), accumulator, eps, final)
    return w.contiguous(), last.contiguous(), after.contiguous(), steps


@composite("halt_backward")
def _halt_backward(grad_w, grad_H, last, token, offsets, accumulator):
    layout = TokenLayout.from_parts(token, offsets)
    zeros = last.new_zeros(last.shape, dtype=torch.float32)

    def weights(h, H):
        g = reference.accumulate_block(unpacked(layout, h), accumulator)
        before = unpacked(layout, H)
        w, _ = reference.halting_weights(g, before, layout.mask, ~unpacked(layout, last))
        return layout.pack(w), layout.pack(before + g)

    return reference_gradients(weights, (zeros, zeros), (grad_w, grad_H))


@fake("halt")
def _halt_fake(h, H, token, offsets, accumulator, eps, final):
    last = h.new_empty(h.shape, dtype=torch.bool)
    return h.new_empty(h.shape), last, h.new_empty(h.shape), token.new_empty(token.shape)


@fake("halt_backward")
def _halt_backward_fake(grad_w, grad_H, last, token, offsets, accumulator):
    grad = last.new_empty(last.shape, dtype=torch.float32)
    return grad, torch.empty_like(grad)


def _halt_setup(ctx, inputs, output):
    _, _, token, offsets, accumulator, _, _ = inputs
    _, last, _, steps = output
    ctx.mark_non_differentiable(last, steps)
    ctx.save_for_backward(last, token, offsets)
    ctx.accumulator = accumulator
    ctx.set_materialize_grads(False)


def _halt_gradient(operators, ctx, grad_w, grad_last, grad_H, grad_steps):
    nothing = (None,) * 7
    if grad_w is None and grad_H is None:
        return nothing
    grads = operators.halt_backward(grad_w, grad_H, *ctx.saved_tensors, ctx.accumulator)
    return (*grads, *nothing[2:])


autograd("halt", _halt_gradient, _halt_setup)


def halt(
    backend: str,
    layout: TokenLayout,
    h: Tensor,
    H: Tensor,
    accumulator: str,
    eps: float,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``halt`` operator by the chosen backend."""
    operators = resolve_backend("halt", backend, h.device)
    if operators is None:
        return _halt(h, H, layout, accumulator, eps, final)
    return operators.halt(h, H, *parts(layout), accumulator, eps, final)


# -- readout --------------------------------------------------------------------------------------


def _readout(x, w, sizes, layout):
    return reference.readout_block(unpacked(layout, x), unpacked(layout, w), sizes)


@composite("readout")
def _readout_composite(x, w, sizes, token, offsets):
    return _readout(x, w, sizes, layout_of(token, offsets))


@composite("readout_backward")
def _readout_backward(grad, x, w, sizes, token, offsets):
    layout = layout_of(token, offsets)
    return reference_gradients(lambda x, w: _readout(x, w, sizes, layout), (x, w), (grad,))


@fake("readout")
def _readout_fake(x, w, sizes, token, offsets):
    B = x.shape[1] if token is None else token.shape[0]
    return x.new_empty((B, x.shape[-1]), dtype=torch.float64)


@fake("readout_backward")
def _readout_backward_fake(grad, x, w, *_):
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _readout_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _readout_gradient(operators, ctx, grad):
    grads = operators.readout_backward(grad, *ctx.saved_tensors)
    return (*grads, None, None, None)


autograd("readout", _readout_gradient, _readout_setup)


def readout(
    backend: str, layout: TokenLayout | None, x: Tensor, w: Tensor, sizes: Tensor | None
) -> Tensor:
    """The ``readout`` operator by the chosen backend."""
    operators = resolve_backend("readout", backend, x.device)
    if operators is None:
        return _readout(x, w, sizes, layout)
    return operators.readout(x, w, sizes, *parts(layout))
