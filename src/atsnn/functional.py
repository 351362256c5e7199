"""Operations on tensors: dense ``[T, B, N, C]``, differentiable, checked.

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
)
from .reference import HaltingState, MergePlan

__all__ = [
    "HaltingState",
    "MergePlan",
    "accumulate",
    "halting_scores",
    "match_tokens",
    "merge_tokens",
    "neuron",
    "ponder_loss",
    "spike_driven_attention",
    "spiking_attention",
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
    backend : {"auto", "native", "triton", "reference"}
        Who computes.

    Returns
    -------
    s : Tensor
        ``[T, ...]`` spikes, 0 or 1, in the dtype of ``x``.
    v : Tensor
        ``x.shape[1:]`` final membrane potential, float32 (float64 for a float64 ``x``).

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
    if v is not None:
        check_tensor(op, "v", v)
        state = torch.empty(
            x.shape[1:], dtype=reference.arithmetic_dtype(x.dtype), device="meta"
        ).expand(x.shape[1:])
        if v.shape != state.shape:
            check_like(op, "v", v, "x[0]", state)
        check_dtype(op, "v", v, (state.dtype,))
        check_device(op, "v", v, "x", x)
    return ops.neuron(
        backend, x, v, inv_tau, kind, tau if kind == "lif" else 1.0, float(v_threshold),
        None if v_reset is None else float(v_reset), decay_input, detach_reset, surrogate,
        float(alpha),
    )  # fmt: skip


def _check_qkv(
    op: str, q: Tensor, k: Tensor, v: Tensor, num_heads: int, sizes: Tensor | None
) -> None:
    check_tensor(op, "q", q)
    check_dtype(op, "q", q)
    check_shape(op, "q", q, T=None, B=None, N=None, C=None)
    for name, other in (("k", k), ("v", v)):
        check_like(op, name, check_tensor(op, name, other), "q", q)
    check_integer(op, "num_heads", num_heads, at_least=1)
    if q.shape[-1] % num_heads:
        raise InvalidValue(
            f"{op}: num_heads must divide the {q.shape[-1]} channels, got {num_heads}"
        )
    if sizes is not None:
        _check_sizes(op, sizes, q.shape[1], q.shape[2], q)


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
    backend: str = "auto",
) -> Tensor:
    """Spiking self-attention: ``scale * q @ (k^T diag(sizes) v)`` for each timestep and head.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes; rows of inactive tokens are zero.
    num_heads : int
        Number of heads; divides ``C``.
    scale : float
        Factor of the result (Spikformer: 0.125).
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for after merging.

    Returns
    -------
    Tensor
        ``[T, B, N, C]``. The sums are integers, exact below 2^24 in float32, so both orders of
        the product and every backend give the same bits; the cheaper order is taken.
    """
    op = "spiking_attention"
    _check_qkv(op, q, k, v, num_heads, sizes)
    check_number(op, "scale", scale)
    ops.resolve_backend(op, backend, q.device, native=False)
    return reference.spiking_attention(q, k, v, num_heads, scale, sizes)


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Spike-driven self-attention (Spike-driven Transformer V1): ``q * LIF(sum_n k * v)``.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes; rows of inactive tokens are zero.
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

    Returns
    -------
    Tensor or (Tensor, Tensor)
        ``[T, B, N, C]``, and ``[B, 1, C]``.
    """
    op = "spike_driven_attention"
    _check_qkv(op, q, k, v, num_heads, sizes)
    check_number(op, "v_threshold", v_threshold)
    check_number(op, "tau", tau, above=1)
    check_choice(op, "surrogate", surrogate, reference.SURROGATES)
    ops.resolve_backend(op, backend, q.device, native=False)
    if state is not None:
        check_shape(op, "state", state, B=q.shape[1], one=1, C=q.shape[3])
    out, state = reference.spike_driven_attention(
        q, k, v, v_threshold, sizes, tau, surrogate, alpha, state
    )
    return (out, state) if return_state else out


def halting_scores(x: Tensor, weight: Tensor, bias: Tensor, *, score: str = "first") -> Tensor:
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
    return reference.halting_scores(x, weight, bias.reshape(()), score)


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
    ops.resolve_backend(op, backend, counts.device, native=False)
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
    return reference.match_tokens(counts, r, threshold, active_steps, match, generator)


def _check_plan(op: str, x: Tensor, plan: MergePlan) -> None:
    check_tensor(op, "x", x)
    if x.dim() != 4 or x.shape[1:3] != plan.shape:
        raise InvalidValue(
            f"{op}: x must have shape (T, B, N, C) with the plan's (B, N) = {tuple(plan.shape)}, "
            f"got {tuple(x.shape)}"
        )
    check_device(op, "x", x, "the plan", plan.target)


def merge_tokens(
    x: Tensor, plan: MergePlan, *, sizes: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Merge tokens into their size-weighted mean, rounded to a multiple of ``2^-8``.

    Parameters
    ----------
    x : Tensor
        ``[T, B, N, C]``.
    plan : MergePlan
        From :func:`match_tokens`.
    sizes : Tensor, optional
        ``[B, N]`` before the merge. Default: ones.

    Returns
    -------
    Tensor
        ``[T, B, N, C]``; rows of tokens that merged into another are zero.
    """
    op = "merge_tokens"
    _check_plan(op, x, plan)
    check_dtype(op, "x", x)
    ops.resolve_backend(op, backend, x.device, native=False)
    if sizes is None:
        sizes = torch.ones(plan.shape, device=x.device)
    _check_sizes(op, sizes, x.shape[1], x.shape[2], x)
    return reference.merge_tokens(x, plan, sizes)


def unmerge_tokens(y: Tensor, plan: MergePlan) -> Tensor:
    """Give every original token the row of the token it was merged into, ``[T, B, N, C]``."""
    _check_plan("unmerge_tokens", y, plan)
    return reference.unmerge_tokens(y, plan.target)
