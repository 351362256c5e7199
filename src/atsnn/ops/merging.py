"""Rows from one layout to the next: taking, matching, merging, unmerging, as operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import TokenLayout
from ..reference import MergePlan
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

# -- take_rows ------------------------------------------------------------------------------------


@composite("take_rows")
def _take(x, index):
    return x.index_select(0, index)


@composite("take_rows_backward")
def _take_backward(grad, index, rows):
    return grad.new_zeros((rows, *grad.shape[1:])).index_add(0, index, grad)


@fake("take_rows")
def _take_fake(x, index):
    return x.new_empty((index.shape[0], *x.shape[1:]))


@fake("take_rows_backward")
def _take_backward_fake(grad, index, rows):
    return grad.new_empty((rows, *grad.shape[1:]))


def _take_setup(ctx, inputs, output):
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[0]


def _take_gradient(operators, ctx, grad):
    (index,) = ctx.saved_tensors
    return operators.take_rows_backward(grad, index, ctx.rows), None


autograd("take_rows", _take_gradient, _take_setup)


def take_rows(backend: str, x: Tensor, index: Tensor) -> Tensor:
    """The ``take_rows`` operator by the chosen backend."""
    operators = resolve_backend("take_rows", backend, x.device)
    if operators is None:
        return x.index_select(0, index)
    return operators.take_rows(x, index)


# -- matching -------------------------------------------------------------------------------------


def _counts(keys, layout):
    return reference.firing_counts(unpacked(layout, keys))


@composite("firing_counts")
def _counts_composite(keys, token, offsets):
    return _counts(keys, layout_of(token, offsets))


@fake("firing_counts")
def _counts_fake(keys, token, offsets):
    B, N = keys.shape[1:3] if token is None else token.shape
    return keys.new_empty((B, N, keys.shape[-1]), dtype=torch.float32)


def firing_counts(backend: str, layout: TokenLayout | None, keys: Tensor) -> Tensor:
    """The ``firing_counts`` operator by the chosen backend."""
    with torch.no_grad():
        operators = resolve_backend("firing_counts", backend, keys.device)
        if operators is None:
            return _counts(keys, layout)
        return operators.firing_counts(keys, *parts(layout))


@composite("match_tokens")
def _match(counts, active_steps, r, threshold):
    return reference.match_tokens(counts, r, threshold, active_steps).target


@fake("match_tokens")
def _match_fake(counts, active_steps, r, threshold):
    return torch.empty_like(active_steps, memory_format=torch.contiguous_format)


def match_tokens(
    backend: str,
    counts: Tensor,
    r: int | None,
    threshold: float | None,
    active_steps: Tensor,
    match: str,
    generator: torch.Generator | None,
) -> MergePlan:
    """The ``match_tokens`` operator by the chosen backend; random partners by the reference."""
    operators = resolve_backend("match_tokens", backend, counts.device)
    if operators is None or match == "random":
        return reference.match_tokens(counts, r, threshold, active_steps, match, generator)
    target = operators.match_tokens(counts.detach(), active_steps, r, threshold)
    return MergePlan.of(target)


# -- merging --------------------------------------------------------------------------------------


def _merge(x, target, sizes, layout, to, bits):
    """The reference from rows to rows, or dense."""
    plan = MergePlan.of(target)
    return packed(to, reference.merge_tokens(unpacked(layout, x), plan, sizes, bits))


@composite("merge_tokens")
def _merge_composite(x, target, sizes, token, offsets, to_token, to_offsets, bits, rows=None):
    layout, to = layout_of(token, offsets), layout_of(to_token, to_offsets)
    return _merge(x, target, sizes, layout, to, bits).contiguous()


@composite("merge_tokens_backward")
def _merge_backward(grad, target, sizes, token, offsets, to_token, to_offsets, rows=None):
    layout, to = layout_of(token, offsets), layout_of(to_token, to_offsets)
    # The merge is linear (its rounding passes gradients through), so any input will do.
    shape = grad.shape if layout is None else (layout.num_rows, *grad.shape[1:])
    (grad_x,) = reference_gradients(
        lambda x: _merge(x, target, sizes, layout, to, 0), (grad.new_zeros(shape),), (grad,)
    )
    return grad_x


def _rows_of(like, offsets, rows):
    """``like`` with as many rows as offsets say: in their values, so unknown to a fake."""
    if offsets is None:
        return like.new_empty(like.shape)
    rows = torch.library.get_ctx().new_dynamic_size() if rows is None else rows
    return like.new_empty((rows, *like.shape[1:]))


@fake("merge_tokens")
def _merge_fake(x, target, sizes, token, offsets, to_token, to_offsets, bits, rows=None):
    return _rows_of(x, to_offsets, rows)


@fake("merge_tokens_backward")
def _merge_backward_fake(grad, target, sizes, token, offsets, to_token, to_offsets, rows=None):
    return _rows_of(grad, offsets, rows)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:7])
    ctx.rows = None if inputs[3] is None else inputs[0].shape[0]


def _merge_gradient(operators, ctx, grad):
    grad_x = operators.merge_tokens_backward(grad, *ctx.saved_tensors, ctx.rows)
    return (grad_x, *(None,) * 8)


autograd("merge_tokens", _merge_gradient, _merge_setup)


def merge_tokens(
    backend: str,
    layout: TokenLayout | None,
    to: TokenLayout | None,
    x: Tensor,
    plan: MergePlan,
    sizes: Tensor,
    bits: int = reference.ROW_BITS,
) -> Tensor:
    """The ``merge_tokens`` operator by the chosen backend."""
    operators = resolve_backend("merge_tokens", backend, x.device)
    if operators is None:
        return _merge(x, plan.target, sizes, layout, to, bits)
    rows = None if to is None else to.num_rows
    return operators.merge_tokens(x, plan.target, sizes, *parts(layout), *parts(to), bits, rows)


# -- unmerging ------------------------------------------------------------------------------------


def _unmerge(y, target, layout, to):
    return packed(to, reference.unmerge_tokens(unpacked(layout, y), target))


@composite("unmerge_tokens")
def _unmerge_composite(y, target, token, offsets, to_token, to_offsets, rows=None):
    layout, to = layout_of(token, offsets), layout_of(to_token, to_offsets)
    return _unmerge(y, target, layout, to).contiguous()


@composite("unmerge_tokens_backward")
def _unmerge_backward(grad, target, token, offsets, to_token, to_offsets, rows=None):
    layout, to = layout_of(token, offsets), layout_of(to_token, to_offsets)
    shape = grad.shape if layout is None else (layout.num_rows, *grad.shape[1:])
    (grad_y,) = reference_gradients(
        lambda y: _unmerge(y, target, layout, to), (grad.new_zeros(shape),), (grad,)
    )
    return grad_y


@fake("unmerge_tokens")
def _unmerge_fake(y, target, token, offsets, to_token, to_offsets, rows=None):
    return _rows_of(y, to_offsets, rows)


@fake("unmerge_tokens_backward")
def _unmerge_backward_fake(grad, target, token, offsets, to_token, to_offsets, rows=None):
    return _rows_of(grad, offsets, rows)


def _unmerge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:6])
    ctx.rows = None if inputs[2] is None else inputs[0].shape[0]


def _unmerge_gradient(operators, ctx, grad):
    grad_y = operators.unmerge_tokens_backward(grad, *ctx.saved_tensors, ctx.rows)
    return (grad_y, *(None,) * 6)


autograd("unmerge_tokens", _unmerge_gradient, _unmerge_setup)


def unmerge_tokens(
    backend: str, layout: TokenLayout | None, to: TokenLayout | None, y: Tensor, plan: MergePlan
) -> Tensor:
    """The ``unmerge_tokens`` operator by the chosen backend."""
    operators = resolve_backend("unmerge_tokens", backend, y.device)
    if operators is None:
        return _unmerge(y, plan.target, layout, to)
    rows = None if to is None else to.num_rows
    return operators.unmerge_tokens(y, plan.target, *parts(layout), *parts(to), rows)
