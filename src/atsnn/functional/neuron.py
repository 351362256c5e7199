"""Spiking neurons."""

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
    check_number,
    check_shape,
    check_tensor,
    shape_of,
)
from ..layout import TokenLayout
from .tokens import check_rows

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
    check_choice(op, "surrogate", surrogate, reference.SURROGATES)
    if not isinstance(detach_reset, bool):
        raise InvalidType(f"{op}: detach_reset must be True or False, got {detach_reset!r}")
    if x.layout != torch.strided:
        raise InvalidType(f"{op}: x must be a dense tensor, got layout {x.layout}")
    if alpha is None:
        alpha = reference.SURROGATES[surrogate].alpha
    check_number(op, "alpha", alpha, above=0)
    check_neuron(op, x, kind, tau, inv_tau, v_threshold, v_reset, decay_input)
    if layout is not None:
        check_rows(op, "x", x, layout)
    if v is not None:
        shape = x.shape[1:] if layout is None else (layout.B, layout.N, x.shape[1])
        names = "x[0]" if layout is None else "(B, N, C)"
        check_state(op, v, tuple(shape), names, reference.arithmetic_dtype(x.dtype), x)
    return ops.neuron(
        backend, layout, x, v, inv_tau, kind, tau if kind == "lif" else 1.0, float(v_threshold),
        None if v_reset is None else float(v_reset), decay_input, detach_reset, surrogate,
        float(alpha),
    )  # fmt: skip


def check_neuron(
    op: str,
    x: Tensor,
    kind: str,
    tau: float,
    inv_tau: Tensor | None,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
) -> None:
    """Check the settings of neurons on the device of ``x``."""
    check_choice(op, "kind", kind, KINDS)
    if not isinstance(decay_input, bool):
        raise InvalidType(f"{op}: decay_input must be True or False, got {decay_input!r}")
    check_number(op, "v_threshold", v_threshold)
    if v_reset is not None:
        check_number(op, "v_reset", v_reset)
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


def check_state(
    op: str, v: Tensor, shape: tuple[int, ...], names: str, dtype: torch.dtype, x: Tensor
) -> None:
    """Check an initial membrane potential; ``names`` says what its shape is that of."""
    check_tensor(op, "v", v)
    if v.shape != torch.Size(shape):
        raise InvalidValue(
            f"{op}: v must have the shape of {names}, {shape_of(shape)}, got {shape_of(v)}"
        )
    check_dtype(op, "v", v, (dtype,))
    check_device(op, "v", v, "x", x)
