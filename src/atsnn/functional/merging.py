"""Rows from one layout to the next: taking, matching, merging, unmerging."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..checks import (
    InvalidType,
    InvalidValue,
    check_choice,
    check_device,
    check_dtype,
    check_finite,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    shape_of,
    values_visible,
)
from ..layout import TokenLayout
from ..reference import MergePlan
from .tokens import check_layout, check_rows, check_sizes, check_tokens


def take_rows(x: Tensor, layout: TokenLayout, to: TokenLayout, *, backend: str = "auto") -> Tensor:
    """Rows of one layout to those of another whose cells are all active in it: one gather.

    Parameters
    ----------
    x : Tensor
        ``[R, ...]`` rows of ``layout``.
    layout, to : TokenLayout
        Of the same ``T``, ``B``, ``N``.

    Returns
    -------
    Tensor
        ``[R', ...]`` rows of ``to``.
    """
    op = "take_rows"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    check_layout(op, layout, x)
    check_layout(op, to, x)
    if x.dim() < 1 or x.shape[0] != layout.num_rows:
        raise InvalidValue(f"{op}: x must have {layout.num_rows} rows, got shape {shape_of(x)}")
    return ops.take_rows(backend, x, to.rows_in(layout, op=op))


def firing_counts(
    keys: Tensor, *, layout: TokenLayout | None = None, backend: str = "auto"
) -> Tensor:
    """Spikes of each token over the timesteps, what :func:`match_tokens` compares.

    ``keys`` are ``[T, B, N, C]``, with a layout ``[R, C]``; the result is ``[B, N, C]`` float32,
    without a gradient.
    """
    check_tokens("firing_counts", "keys", keys, layout)
    return ops.firing_counts(backend, layout, keys)


def match_tokens(
    counts: Tensor,
    *,
    r: int | None = None,
    threshold: float | None = None,
    sizes: Tensor | None = None,
    active_steps: Tensor | None = None,
    match: str = "similar",
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> MergePlan:
    """Pairs of similar tokens to merge: bipartite, deterministic, within equal lifetimes.

    Parameters
    ----------
    counts : Tensor
        ``[B, N, C]`` firing counts of the keys over the timesteps, non-negative integers of any
        dtype.
    r : int, optional
        Number of pairs an image merges at most.
    threshold : float, optional
        Merge every pair whose cosine similarity exceeds it; that of two silent tokens is 1, of a
        silent and a firing one 0. Exactly one of ``r``, ``threshold``.
    sizes : Tensor, optional
        ``[B, N]``; accepted for symmetry with :func:`merge_tokens`, checked, not used.
    active_steps : Tensor, optional
        ``[B, N]`` integer; only tokens with equal, non-zero values can merge. Give
        ``layout.active_steps`` of packed tokens. Default: all equal.
    match : {"similar", "random"}
        ``random`` is a control: random partners, from ``generator``.

    Returns
    -------
    MergePlan
    """
    op = "match_tokens"
    check_tensor(op, "counts", counts)
    check_shape(op, "counts", counts, B=None, N=None, C=None)
    check_choice(op, "match", match, reference.MATCHES)
    if (r is None) == (threshold is None):
        raise InvalidValue(
            f"{op}: exactly one of r and threshold must be given, got r={r}, threshold={threshold}"
        )
    if r is not None:
        check_integer(op, "r", r, at_least=0)
    else:
        check_number(op, "threshold", threshold)
    B, N, _ = counts.shape
    if sizes is not None:
        check_sizes(op, sizes, B, N, counts)
    if active_steps is not None:
        check_tensor(op, "active_steps", active_steps)
        check_shape(op, "active_steps", active_steps, B=B, N=N)
        check_device(op, "active_steps", active_steps, "counts", counts)
        if active_steps.is_floating_point() or active_steps.is_complex():
            raise InvalidType(
                f"{op}: active_steps must be an integer tensor, got {active_steps.dtype}"
            )
    if values_visible(counts) and counts.numel():
        _check_counts(op, counts)
    lifetimes = (
        torch.ones((B, N), dtype=torch.int64, device=counts.device)
        if active_steps is None
        else active_steps.to(torch.int64)
    )
    threshold = None if threshold is None else float(threshold)
    return ops.match_tokens(backend, counts, r, threshold, lifetimes, match, generator)


def _check_counts(op: str, counts: Tensor) -> None:
    """Non-negative integers: two passes where they are, as this is most of a match's time."""
    whole = not counts.is_floating_point()
    low, high = counts.aminmax()  # NaN where one is
    if low >= 0 and (whole or (high < float("inf") and torch.equal(counts, counts.round()))):
        return
    check_finite(op, "counts", counts)
    bad = counts < 0 if whole else (counts < 0) | (counts != counts.round())
    raise InvalidValue(f"{op}: counts must be non-negative integers, got {counts[bad][0]}")


def _check_plan(op: str, x: Tensor, plan: MergePlan, layout: TokenLayout | None) -> None:
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if not isinstance(plan, MergePlan):
        raise InvalidType(f"{op}: plan must be a MergePlan, got {type(plan).__name__}")
    if layout is None:
        if x.dim() != 4 or x.shape[1:3] != plan.shape:
            raise InvalidValue(
                f"{op}: x must have shape (T, B, N, C) with the plan's (B, N) = "
                f"{shape_of(plan.shape)}, got {shape_of(x)}"
            )
    else:
        check_layout(op, layout, x)
        if plan.shape != (layout.B, layout.N):
            raise InvalidValue(
                f"{op}: the layout must have the plan's (B, N) = {shape_of(plan.shape)}, "
                f"got {(layout.B, layout.N)}"
            )
    check_device(op, "x", x, "the plan", plan.target)
    target = plan.target
    check_dtype(op, "the plan's target", target, (torch.int64,))
    if not values_visible(target) or not target.numel():
        return
    N = target.shape[1]
    outside = (target < 0) | (target >= N)
    if bool(outside.any()):
        raise InvalidValue(
            f"{op}: the plan's targets must lie in 0 .. {N - 1}, got {int(target[outside][0])}"
        )
    moved = target.gather(1, target) != target
    if bool(moved.any()):
        raise InvalidValue(
            f"{op}: a token that takes others in must stay, got token {int(target[moved][0])}, "
            f"which merges itself"
        )


def _after(
    op: str, plan: MergePlan, layout: TokenLayout | None, after: TokenLayout | None
) -> TokenLayout | None:
    """The layout after a merge, given or made."""
    if layout is None:
        if after is not None:
            raise InvalidValue(f"{op}: after needs a layout before the merge, got none")
        return None
    if after is None:
        after = layout.without(plan.merged)
    shape = (layout.T, layout.B, layout.N)
    if shape != (after.T, after.B, after.N):
        raise InvalidValue(
            f"{op}: after must have (T, B, N) = {shape}, got {(after.T, after.B, after.N)}"
        )
    if values_visible(plan.target):
        # A token must be active wherever the one that holds it is active after the merge.
        needed = after.active_steps.gather(1, plan.target)
        short = layout.active_steps < needed
        if bool(short.any()):
            b, k = short.nonzero()[0].tolist()
            raise InvalidValue(
                f"{op}: a merged token must be active for the {int(needed[b, k])} timesteps of the "
                f"token that holds it, got {int(layout.active_steps[b, k])} of token {k} of image "
                f"{b}; was the plan made with active_steps=layout.active_steps, and is layout the "
                f"one before the merge?"
            )
    return after


def merge_tokens(
    x: Tensor,
    plan: MergePlan,
    *,
    sizes: Tensor | None = None,
    layout: TokenLayout | None = None,
    after: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Merge tokens into their size-weighted mean, rounded to a multiple of ``2^-8``.

    Parameters
    ----------
    x : Tensor
        ``[T, B, N, C]``; with a layout ``[R, C]``.
    plan : MergePlan
        From :func:`match_tokens`.
    sizes : Tensor, optional
        ``[B, N]`` before the merge. Default: ones. No gradient.
    layout, after : TokenLayout, optional
        The cells before and after the merge. ``after`` is ``layout.without(plan.merged)`` if it
        is not given (it must be under ``torch.compile``, which cannot make a layout).

    Returns
    -------
    Tensor
        ``[T, B, N, C]``; rows of tokens that merged into another are zero. With a layout the rows
        of ``after``.
    """
    op = "merge_tokens"
    _check_plan(op, x, plan, layout)
    if layout is not None:
        check_rows(op, "x", x, layout)
    after = _after(op, plan, layout, after)
    if sizes is None:
        sizes = torch.ones(plan.shape, device=x.device)
    sizes = check_sizes(op, sizes, plan.shape[0], plan.shape[1], x)
    return ops.merge_tokens(backend, layout, after, x, plan, sizes)


def unmerge_tokens(
    y: Tensor,
    plan: MergePlan,
    *,
    layout: TokenLayout | None = None,
    after: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Give every original token the row of the token it was merged into.

    Parameters
    ----------
    y : Tensor
        ``[T, B, N, C]``; with a layout the rows of ``after``.
    plan : MergePlan
    layout, after : TokenLayout, optional
        The cells before and after the merge, as in :func:`merge_tokens`.

    Returns
    -------
    Tensor
        ``[T, B, N, C]``; with a layout the rows of ``layout``.
    """
    op = "unmerge_tokens"
    _check_plan(op, y, plan, layout)
    after = _after(op, plan, layout, after)
    if after is not None:
        check_rows(op, "y", y, after)
    return ops.unmerge_tokens(backend, after, layout, y, plan)
