"""Halting: scores, the step from block to block, accumulators, readout, ponder loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..checks import (
    InvalidValue,
    check_choice,
    check_device,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
    values_visible,
)
from ..layout import TokenLayout
from ..reference import HaltingState
from .tokens import check_layout, check_sizes, check_tokens, images_of


def halting_scores(
    x: Tensor, weight: Tensor, bias: Tensor, *, score: str = "first", backend: str = "auto"
) -> Tensor:
    """Halting scores ``h = sigmoid(alpha * f(x) + beta)`` of tokens after a block.

    Parameters
    ----------
    x : Tensor
        ``[..., C]``.
    weight : Tensor
        ``alpha``, 0-d; the linear map ``[C]`` for ``score="linear"``.
    bias : Tensor
        ``beta``, 0-d.
    score : {"first", "mean", "linear", "constant"}
        What ``f`` is; see :func:`atsnn.reference.halting_scores`.

    Returns
    -------
    Tensor
        ``[...]`` float32, multiples of ``2^-18`` (the gradient passes straight through).
    """
    op = "halting_scores"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    check_choice(op, "score", score, reference.SCORES)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise InvalidValue(f"{op}: x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    dims = {"C": x.shape[-1]} if score == "linear" else {}
    for name, value, want in (("weight", weight, dims), ("bias", bias, {})):
        check_tensor(op, name, value)
        if value.numel() != 1 or want:
            check_shape(op, name, value, **want)
        check_device(op, name, value, "x", x)
    if score != "linear":
        weight = weight.reshape(())
    return ops.halting_scores(backend, x, weight, bias.reshape(()), score)


def halt(
    h: Tensor,
    H: Tensor,
    layout: TokenLayout,
    *,
    accumulator: str = "rectangle",
    eps: float = 0.01,
    final: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block's halting step: from scores to accumulators, weights and what runs next.

    Parameters
    ----------
    h, H : Tensor
        ``[R]`` float32: scores after the block, accumulators before it.
    layout : TokenLayout
        The cells that ran.
    accumulator : {"rectangle", "depth"}
    eps : float
        A cell is active in the next block while its accumulator is below ``1 - eps``.
    final : bool
        Whether it was the last block: nothing goes on, every weight is a remainder.

    Returns
    -------
    w : Tensor
        ``[R]`` readout weights; gradients flow to ``h`` and ``H``.
    last : Tensor
        ``[R]`` bool, where the weight is the remainder.
    H : Tensor
        ``[R]`` the accumulators after the block.
    active_steps : Tensor
        ``[B, N]`` int64, the timesteps each token is active in the next block, of which
        :meth:`TokenLayout.from_active_steps` makes its layout.

    Notes
    -----
    With ``g[t]`` the sum of ``h`` up to ``t`` (``h[t]`` itself for ``depth``)::

        H' = H + g        a cell goes on where H' < 1 - eps, and did at every earlier timestep
        w  = g where it goes on, the remainder 1 - H where it does not
    """
    op = "halt"
    for name, value in (("h", h), ("H", H)):
        check_tensor(op, name, value)
        check_layout(op, layout, value)
        check_shape(op, name, value, R=layout.num_rows)
        check_dtype(op, name, value, (torch.float32,))
    check_choice(op, "accumulator", accumulator, ("rectangle", "depth"))
    check_number(op, "eps", eps, above=0, below=1)
    return ops.halt(backend, layout, h, H, accumulator, float(eps), final)


def readout(
    x: Tensor,
    w: Tensor,
    *,
    sizes: Tensor | None = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """What one block gives to the readout: ``sum over t, k of size * w * x``, in float64.

    Parameters
    ----------
    x : Tensor
        ``[T, B, N, C]`` tokens after the block; with a layout ``[R, C]``.
    w : Tensor
        ``[T, B, N]`` float32 weights; with a layout ``[R]``.
    sizes : Tensor, optional
        ``[B, N]``; no gradient.

    Returns
    -------
    Tensor
        ``[B, C]`` float64.
    """
    op = "readout"
    check_tokens(op, "x", x, layout)
    names = ("T", "B", "N") if layout is None else ("R",)
    check_tensor(op, "w", w)
    check_shape(op, "w", w, **dict(zip(names, x.shape, strict=False)))
    check_dtype(op, "w", w, (torch.float32,))
    if sizes is not None:
        sizes = check_sizes(op, sizes, *images_of(x, layout), x)
    return ops.readout(backend, layout, x, w, sizes)


def accumulate(h: Tensor, *, accumulator: str = "rectangle", eps: float = 0.01) -> HaltingState:
    """Which cells are executed, given the halting scores of all of them.

    Parameters
    ----------
    h : Tensor
        ``[L, T, B, N]`` scores in ``[0, 1]``; those of cells that are not executed are ignored.
    accumulator : {"rectangle", "depth", "sequential"}
        How scores add up; see ``docs/method.md``.
    eps : float
        A cell is active while its accumulator is below ``1 - eps``.

    Returns
    -------
    HaltingState
        ``active``, ``H``, ``weights`` (``[L, T, B, N]``) and ``depth`` (``[T, B, N]``).
    """
    op = "accumulate"
    check_tensor(op, "h", h)
    check_dtype(op, "h", h, (torch.float32, torch.float64))
    check_shape(op, "h", h, L=None, T=None, B=None, N=None)
    check_choice(op, "accumulator", accumulator, reference.ACCUMULATORS)
    check_number(op, "eps", eps, above=0, below=1)
    if values_visible(h) and h.numel():
        low, high = float(h.detach().min()), float(h.detach().max())
        if not 0 <= low <= high <= 1:
            raise InvalidValue(f"{op}: h must lie in 0 .. 1, got values in {low} .. {high}")
    return reference.accumulate(h, accumulator, eps)


def ponder_loss(state: HaltingState, *, sizes: Tensor | None = None) -> Tensor:
    """Ponder loss of A-ViT, ``mean over t, k of (D + w[D])``; sizes ``[B, N]`` weigh tokens."""
    if sizes is not None:
        _, B, N = state.depth.shape
        sizes = check_sizes("ponder_loss", sizes, B, N, state.depth)
    return reference.ponder_loss(state.depth, state.remainder, sizes)
