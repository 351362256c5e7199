"""Operations on tensors, differentiable, checked: dense ``[T, B, N, C]`` or packed ``[R, C]``.

With a ``layout`` tensors hold the rows of its active cells alone.

Formulas live in :mod:`atsnn.reference`; this module checks arguments and chooses the backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference
from .checks import (
    InvalidType,
    InvalidValue,
    check_choice,
    check_device,
    check_dtype,
    check_finite,
    check_integer,
    check_like,
    check_number,
    check_shape,
    check_tensor,
    shape_of,
)
from .layout import TokenLayout
from .reference import HaltingState, MergePlan

__all__ = [
    "HaltingState",
    "MergePlan",
    "accumulate",
    "firing_counts",
    "halt",
    "halting_scores",
    "match_tokens",
    "merge_tokens",
    "neuron",
    "ponder_loss",
    "readout",
    "spike_driven_attention",
    "spiking_attention",
    "take_rows",
    "unmerge_tokens",
]

KINDS = ("lif", "if", "plif")


def neuron(
    x: Tensor,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    inv_tau: Tensor | None = None,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Spiking neurons (LIF, IF or PLIF) over the timesteps of ``x``.

    Parameters
    ----------
    x : Tensor
        ``[T, ...]`` input current; float32, float64, bfloat16 or float16. Any strides. Finite,
        which is not checked: from infinite input backends may differ.
    v : Tensor, optional
        ``x.shape[1:]`` membrane potential to begin with, float32 (float64 for a float64 ``x``).
        Default: ``v_reset``, or 0 under a soft reset.
    kind : {"lif", "if", "plif"}
        Leaky integrate-and-fire, without leak, or with the learnable leak ``inv_tau``.
    tau : float
        Membrane time constant of a LIF in timesteps, greater than 1.
    inv_tau : Tensor
        0-d, ``1 / tau`` of a PLIF (``sigmoid(w)``); its gradient flows.
    v_threshold : float
        Potential at which the neuron fires.
    v_reset : float, optional
        Potential after a spike; ``None`` subtracts ``v_threshold`` instead (soft reset).
    decay_input : bool
        Whether the input is divided by ``tau`` too.
    detach_reset : bool
        Whether the reset is left out of the backward.
    surrogate : str
        Derivative of the firing: ``sigmoid``, ``atan``, ``piecewise_quadratic``,
        ``piecewise_exp``, ``soft_sign``, ``super_spike`` or ``erf``.
    alpha : float, optional
        Steepness of the surrogate. Default: that of SpikingJelly for the surrogate.
    layout : TokenLayout, optional
        ``x`` then holds the rows ``[R, C]`` of its active cells, and ``v`` is ``[B, N, C]``.
    backend : {"auto", "native", "triton", "reference"}
        Who computes.

    Returns
    -------
    s : Tensor
        Spikes, 0 or 1, in the shape and dtype of ``x``.
    v : Tensor
        ``x.shape[1:]`` final membrane potential, float32 (float64 for a float64 ``x``). With a
        layout ``[B, N, C]`` in token order: after each token's last active timestep, the initial
        potential of a token that has none.

    Notes
    -----
    Arithmetic is float32 (float64 for float64), each operation rounded once in this order, so
    every backend fires the same spikes bit for bit, and the same as SpikingJelly 2.0::

        charge   lif, decay_input:       u = v + (x - (v - v_reset)) / tau
                 lif, not decay_input:   u = v - (v - v_reset) / tau + x
                 if:                     u = v + x
                 plif:                   as lif, with * inv_tau for / tau
        fire     s = 1 if u >= v_threshold else 0
        reset    v = v_reset where s, else u         (v = u - s * v_threshold if v_reset is None)

    For the backward only ``x``, ``v`` and ``inv_tau`` are kept; potentials are computed again.

    Examples
    --------
    >>> s, v = neuron(torch.ones(4, 2), tau=2.0)
    >>> s[:, 0].tolist(), v.tolist()
    ([0.0, 0.0, 0.0, 0.0], [0.9375, 0.9375])
    """
    op = "neuron"
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if x.dim() < 1:
        raise InvalidValue(f"{op}: x must have shape (T, ...), got a 0-d tensor")
    check_choice(op, "kind", kind, KINDS)
    check_choice(op, "surrogate", surrogate, reference.SURROGATES)
    for name, flag in (("decay_input", decay_input), ("detach_reset", detach_reset)):
        if not isinstance(flag, bool):
            raise InvalidType(f"{op}: {name} must be True or False, got {flag!r}")
    if x.layout != torch.strided:
        raise InvalidType(f"{op}: x must be a dense tensor, got layout {x.layout}")
    check_number(op, "v_threshold", v_threshold)
    if v_reset is not None:
        check_number(op, "v_reset", v_reset)
    if alpha is None:
        alpha = reference.SURROGATES[surrogate].alpha
    check_number(op, "alpha", alpha, above=0)
    if kind == "plif":
        if inv_tau is None:
            raise InvalidValue(f"{op}: kind='plif' needs inv_tau, a 0-d tensor, got None")
        check_tensor(op, "inv_tau", inv_tau)
        check_dtype(op, "inv_tau", inv_tau)
        check_device(op, "inv_tau", inv_tau, "x", x)
        if inv_tau.dim() != 0:
            check_shape(op, "inv_tau", inv_tau)
    elif inv_tau is not None:
        raise InvalidValue(f"{op}: inv_tau belongs to kind='plif', got it with kind={kind!r}")
    if kind == "lif":
        check_number(op, "tau", tau, above=1)
    if layout is not None:
        _check_rows(op, "x", x, layout)
    if v is not None:
        check_tensor(op, "v", v)
        shape = x.shape[1:] if layout is None else (layout.B, layout.N, x.shape[1])
        if v.shape != torch.Size(shape):
            names = "x[0]" if layout is None else "(B, N, C)"
            raise InvalidValue(
                f"{op}: v must have the shape of {names}, {shape_of(shape)}, got {shape_of(v)}"
            )
        check_dtype(op, "v", v, (reference.arithmetic_dtype(x.dtype),))
        check_device(op, "v", v, "x", x)
    return ops.neuron(
        backend, layout, x, v, inv_tau, kind, tau if kind == "lif" else 1.0, float(v_threshold),
        None if v_reset is None else float(v_reset), decay_input, detach_reset, surrogate,
        float(alpha),
    )  # fmt: skip


def _check_layout(op: str, layout: TokenLayout, x: Tensor) -> None:
    if not isinstance(layout, TokenLayout):
        raise InvalidType(f"{op}: layout must be a TokenLayout, got {type(layout).__name__}")
    check_device(op, "the layout", layout.token, "the tokens", x)


def _check_rows(op: str, name: str, x: Tensor, layout: TokenLayout) -> None:
    """Check that ``x [R, C]`` holds the rows of ``layout``."""
    _check_layout(op, layout, x)
    check_shape(op, name, x, R=layout.num_rows, C=None)


def _check_tokens(op: str, name: str, x: Tensor, layout: TokenLayout | None) -> None:
    """Check dense tokens ``[T, B, N, C]`` or the rows ``[R, C]`` of a layout."""
    check_tensor(op, name, x)
    check_dtype(op, name, x)
    if layout is None:
        check_shape(op, name, x, T=None, B=None, N=None, C=None)
    else:
        _check_rows(op, name, x, layout)


def _images(x: Tensor, layout: TokenLayout | None) -> tuple[int, int]:
    """``(B, N)`` of dense tokens or of rows."""
    return (x.shape[1], x.shape[2]) if layout is None else (layout.B, layout.N)


def _check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    sizes: Tensor | None,
    layout: TokenLayout | None,
) -> None:
    _check_tokens(op, "q", q, layout)
    for name, other in (("k", k), ("v", v)):
        check_like(op, name, check_tensor(op, name, other), "q", q)
    check_integer(op, "num_heads", num_heads, at_least=1)
    if q.shape[-1] % num_heads:
        raise InvalidValue(
            f"{op}: num_heads must divide the {q.shape[-1]} channels, got {num_heads}"
        )
    if sizes is not None:
        _check_sizes(op, sizes, *_images(q, layout), q)


def _check_sizes(op: str, sizes: Tensor, B: int, N: int, like: Tensor) -> None:
    check_shape(op, "sizes", check_tensor(op, "sizes", sizes), B=B, N=N)
    check_device(op, "sizes", sizes, "the tokens", like)
    check_finite(op, "sizes", sizes)
    if not torch.compiler.is_compiling() and bool((sizes < 0).any()):
        raise InvalidValue(f"{op}: sizes must be at least 0, got {float(sizes.min())}")


def spiking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    scale: float = 0.125,
    sizes: Tensor | None = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Spiking self-attention: ``scale * q @ (k^T diag(sizes) v)`` for each timestep and head.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes, rows of inactive tokens zero; with a layout ``[R, C]``.
    num_heads : int
        Number of heads; divides ``C``.
    scale : float
        Factor of the result (Spikformer: 0.125).
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for after merging; no gradient.
    layout : TokenLayout, optional
        Sums run over the active tokens, and they alone get an output.

    Returns
    -------
    Tensor
        Shaped as ``q``. The sums are integers, exact below 2^24 in float32, so both orders of
        the product and every backend give the same bits; the cheaper order is taken.
    """
    op = "spiking_attention"
    _check_qkv(op, q, k, v, num_heads, sizes, layout)
    check_number(op, "scale", scale)
    return ops.spiking_attention(backend, layout, q, k, v, sizes, num_heads, scale)


def spike_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    v_threshold: float = 0.5,
    sizes: Tensor | None = None,
    tau: float = 2.0,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Spike-driven self-attention (Spike-driven Transformer V1): ``q * LIF(sum_n k * v)``.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes, rows of inactive tokens zero; with a layout ``[R, C]``.
    num_heads : int
        Divides ``C``; the operation acts on each channel by itself, whatever its head.
    v_threshold, tau, surrogate, alpha
        Of the LIF on the sums over tokens (hard reset to 0, ``detach_reset``).
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for after merging.
    state : Tensor, optional
        ``[B, 1, C]`` potentials of that LIF to begin with.
    return_state : bool
        Whether to return the final potentials too.
    layout : TokenLayout, optional
        Sums run over the active tokens, and they alone get an output.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shaped as ``q``, and ``[B, 1, C]``.
    """
    op = "spike_driven_attention"
    _check_qkv(op, q, k, v, num_heads, sizes, layout)
    check_number(op, "v_threshold", v_threshold)
    check_number(op, "tau", tau, above=1)
    check_choice(op, "surrogate", surrogate, reference.SURROGATES)
    alpha = reference.SURROGATES[surrogate].alpha if alpha is None else alpha
    check_number(op, "alpha", alpha, above=0)
    if state is not None:
        check_shape(
            op, "state", check_tensor(op, "state", state),
            B=_images(q, layout)[0], one=1, C=q.shape[-1],
        )  # fmt: skip
        check_dtype(op, "state", state, (reference.arithmetic_dtype(q.dtype),))
    out, state = ops.spike_driven_attention(
        backend, layout, q, k, v, state, sizes, float(v_threshold), float(tau), surrogate,
        float(alpha),
    )  # fmt: skip
    return (out, state) if return_state else out


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
) -> tuple[Tensor, Tensor, Tensor, TokenLayout]:
    """One block's halting step: from scores to accumulators, weights and the next layout.

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
    layout : TokenLayout
        The cells of the next block.

    Notes
    -----
    With ``g[t]`` the sum of ``h`` up to ``t`` (``h[t]`` itself for ``depth``)::

        H' = H + g        a cell goes on where H' < 1 - eps, and did at every earlier timestep
        w  = g where it goes on, the remainder 1 - H where it does not
    """
    op = "halt"
    for name, value in (("h", h), ("H", H)):
        check_tensor(op, name, value)
        _check_layout(op, layout, value)
        check_shape(op, name, value, R=layout.num_rows)
        check_dtype(op, name, value, (torch.float32,))
    check_choice(op, "accumulator", accumulator, ("rectangle", "depth"))
    check_number(op, "eps", eps, above=0, below=1)
    w, last, after, steps = ops.halt(backend, layout, h, H, accumulator, float(eps), final)
    return w, last, after, TokenLayout.from_active_steps(steps, layout.T)


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
    _check_tokens(op, "x", x, layout)
    names = ("T", "B", "N") if layout is None else ("R",)
    check_tensor(op, "w", w)
    check_shape(op, "w", w, **dict(zip(names, x.shape, strict=False)))
    check_dtype(op, "w", w, (torch.float32,))
    if sizes is not None:
        _check_sizes(op, sizes, *_images(x, layout), x)
    return ops.readout(backend, layout, x, w, sizes)


def take_rows(
    x: Tensor, layout: TokenLayout, to: TokenLayout, *, backend: str = "auto"
) -> Tensor:
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
    _check_layout(op, layout, x)
    _check_layout(op, to, x)
    if x.dim() < 1 or x.shape[0] != layout.num_rows:
        raise InvalidValue(f"{op}: x must have {layout.num_rows} rows, got shape {shape_of(x)}")
    if (to.T, to.B, to.N) != (layout.T, layout.B, layout.N):
        raise InvalidValue(
            f"{op}: both layouts must have (T, B, N) = {(layout.T, layout.B, layout.N)}, "
            f"got {(to.T, to.B, to.N)}"
        )
    return ops.take_rows(backend, x, to.rows_in(layout))


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
    if not torch.compiler.is_compiling() and h.numel():
        low, high = float(h.detach().min()), float(h.detach().max())
        if not 0 <= low <= high <= 1:
            raise InvalidValue(f"{op}: h must lie in 0 .. 1, got values in {low} .. {high}")
    return reference.accumulate(h, accumulator, eps)


def ponder_loss(state: HaltingState, *, sizes: Tensor | None = None) -> Tensor:
    """Ponder loss of A-ViT, ``mean over t, k of (D + w[D])``; sizes ``[B, N]`` weigh tokens."""
    if sizes is not None:
        _, B, N = state.depth.shape
        _check_sizes("ponder_loss", sizes, B, N, state.depth)
    return reference.ponder_loss(state.depth, state.remainder, sizes)


def firing_counts(
    keys: Tensor, *, layout: TokenLayout | None = None, backend: str = "auto"
) -> Tensor:
    """Spikes of each token over the timesteps, what :func:`match_tokens` compares.

    ``keys`` are ``[T, B, N, C]``, with a layout ``[R, C]``; the result is ``[B, N, C]`` float32,
    without a gradient.
    """
    _check_tokens("firing_counts", "keys", keys, layout)
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
        Merge every pair whose cosine similarity exceeds it. Exactly one of ``r``, ``threshold``.
    sizes : Tensor, optional
        ``[B, N]``; accepted for symmetry with :func:`merge_tokens`, checked, not used.
    active_steps : Tensor, optional
        ``[B, N]`` integer; only tokens with equal, non-zero values can merge. Default: all equal.
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
        _check_sizes(op, sizes, B, N, counts)
    if active_steps is not None:
        check_tensor(op, "active_steps", active_steps)
        check_shape(op, "active_steps", active_steps, B=B, N=N)
        check_device(op, "active_steps", active_steps, "counts", counts)
        if active_steps.is_floating_point() or active_steps.is_complex():
            raise InvalidType(
                f"{op}: active_steps must be an integer tensor, got {active_steps.dtype}"
            )
    check_finite(op, "counts", counts)
    if not torch.compiler.is_compiling() and counts.numel():
        bad = (
            (counts < 0) | (counts != counts.round()) if counts.is_floating_point() else counts < 0
        )
        if bool(bad.any()):
            raise InvalidValue(f"{op}: counts must be non-negative integers, got {counts[bad][0]}")
    lifetimes = (
        torch.ones((B, N), dtype=torch.int64, device=counts.device)
        if active_steps is None
        else active_steps.to(torch.int64)
    )
    threshold = None if threshold is None else float(threshold)
    return ops.match_tokens(backend, counts, r, threshold, lifetimes, match, generator)


def _check_plan(op: str, x: Tensor, plan: MergePlan, layout: TokenLayout | None) -> None:
    check_tensor(op, "x", x)
    check_dtype(op, "x", x)
    if layout is None:
        if x.dim() != 4 or x.shape[1:3] != plan.shape:
            raise InvalidValue(
                f"{op}: x must have shape (T, B, N, C) with the plan's (B, N) = "
                f"{shape_of(plan.shape)}, got {shape_of(x)}"
            )
    else:
        _check_layout(op, layout, x)
        if (layout.B, layout.N) != plan.shape:
            raise InvalidValue(
                f"{op}: the layout must have the plan's (B, N) = {shape_of(plan.shape)}, "
                f"got {(layout.B, layout.N)}"
            )
    check_device(op, "x", x, "the plan", plan.target)


def merge_tokens(
    x: Tensor,
    plan: MergePlan,
    *,
    sizes: Tensor | None = None,
    layout: TokenLayout | None = None,
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
    layout : TokenLayout, optional
        The cells before the merge.

    Returns
    -------
    Tensor
        ``[T, B, N, C]``; rows of tokens that merged into another are zero. With a layout the rows
        of ``layout.without(plan.merged)``.
    """
    op = "merge_tokens"
    _check_plan(op, x, plan, layout)
    to = None
    if layout is not None:
        _check_rows(op, "x", x, layout)
        to = layout.without(plan.merged)
    if sizes is None:
        sizes = torch.ones(plan.shape, device=x.device)
    _check_sizes(op, sizes, *plan.shape, x)
    return ops.merge_tokens(backend, layout, to, x, plan, sizes)


def unmerge_tokens(
    y: Tensor, plan: MergePlan, *, layout: TokenLayout | None = None, backend: str = "auto"
) -> Tensor:
    """Give every original token the row of the token it was merged into.

    Parameters
    ----------
    y : Tensor
        ``[T, B, N, C]``; with a layout the rows of ``layout.without(plan.merged)``.
    plan : MergePlan
    layout : TokenLayout, optional
        The cells before the merge.

    Returns
    -------
    Tensor
        ``[T, B, N, C]``; with a layout the rows of ``layout``.
    """
    op = "unmerge_tokens"
    _check_plan(op, y, plan, layout)
    if layout is None:
        return ops.unmerge_tokens(backend, None, None, y, plan)
    after = layout.without(plan.merged)
    _check_rows(op, "y", y, after)
    return ops.unmerge_tokens(backend, after, layout, y, plan)
