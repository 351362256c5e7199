"""Neurons of other libraries behind the signature of :func:`atsnn.functional.neuron`.

They show the conformance kit on kernels that are not ours: ``atsnn check --kernel
atsnn.adapters:snntorch_leaky``. Each takes what its library can express and says by
``NotImplementedError`` what it cannot; where its rule is another one, the kit says how the
numbers differ. Libraries are imported when they are called.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from .checks import MissingDependency, require
from .reference import SURROGATE_CLASSES, SURROGATES, arithmetic_dtype

__all__ = ["norse_lif", "snntorch_leaky", "spikingjelly_neuron"]


def spikingjelly_neuron(
    x: Tensor,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """SpikingJelly's LIF and IF, multi-step (``activation_based.functional``).

    The same rule as ours, in the same order of operations, for float32 and float64. In half
    precision it accumulates in half precision; its PLIF takes ``w`` where ``1 / tau =
    sigmoid(w)``. Neither can be expressed here.
    """
    functional = _library("spikingjelly", "spikingjelly.activation_based.functional")
    derivatives = _library("spikingjelly", "spikingjelly.activation_based.surrogate")
    _expressible(kind in ("lif", "if"), f"SpikingJelly's PLIF takes w, not 1/tau (kind={kind!r})")
    _expressible(
        x.dtype in (torch.float32, torch.float64),
        f"SpikingJelly keeps its membrane in the type of x, {x.dtype}",
    )
    derivative = getattr(derivatives, SURROGATE_CLASSES[surrogate])(alpha=_alpha(surrogate, alpha))
    v = _start(x, v, v_reset)
    _expressible(len(x) > 0, "SpikingJelly needs at least one timestep")
    last = (v_threshold, v_reset, derivative, detach_reset, False)
    if kind == "if":
        return functional.if_multi_step(x, v, *last)[:2]
    return functional.lif_multi_step(x, v, tau, decay_input, *last)[:2]


def snntorch_leaky(
    x: Tensor,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    reset_delay: bool = True,
) -> tuple[Tensor, Tensor]:
    """snnTorch's ``Leaky`` with ``beta = 1 - 1 / tau`` (1 for an IF).

    Its rule, of which ``reset_delay=False`` does the reset in the timestep of the spike::

        r = 1 if v > v_threshold else 0             of the membrane of the timestep before
        v = beta * v + x - r * v_threshold          "subtract", for v_reset=None
        v = beta * (1 - r) * v + x                  "zero", for v_reset=0
        s = 1 if v > v_threshold else 0

    So it fires above the threshold and not at it; what it subtracts does not leak; the membrane
    returned is that before the reset; and a membrane given above the threshold is reset. It does
    not decay its input: ``x / tau`` is handed over for ``decay_input``. The reset is always
    detached.
    """
    snntorch = _library("snntorch", "snntorch")
    _expressible(kind in ("lif", "if"), f"Leaky has a number beta, no learnt 1/tau (kind={kind!r})")
    _expressible(v_reset in (None, 0.0), f"Leaky resets to 0 or by subtraction, not to {v_reset}")
    derivative = None
    if _differentiated(x, v):
        _expressible(detach_reset, "Leaky always detaches its reset")
        derivative = _snntorch_surrogate(surrogate, _alpha(surrogate, alpha))
    neuron = snntorch.Leaky(
        beta=1.0 if kind == "if" else 1 - 1 / tau, threshold=v_threshold, spike_grad=derivative,
        reset_mechanism="subtract" if v_reset is None else "zero", reset_delay=reset_delay,
    ).to(x.device)  # fmt: skip
    neuron.instances.remove(neuron)  # a list of the class, which would hold it for ever
    v = _start(x, v, v_reset)
    spikes = []
    for x_t in x / tau if decay_input and kind == "lif" else x:
        s, v = neuron(x_t, v)
        spikes.append(s)
    return _stacked(spikes, x), v


def norse_lif(
    x: Tensor,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    tau_syn: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Norse's LIF (``lif_feed_forward_step``) with ``dt = 1``, ``tau_mem_inv = 1 / tau``.

    Its rule, with a current ``i`` that starts at 0 and ``v_leak = v_reset``::

        i = i + x
        v = v + 1 / tau * ((v_leak - v) + i)
        i = i - 1 / tau_syn * i                     with tau_syn = 1 nothing is left of it
        s = 1 if v > v_threshold else 0
        v = (1 - s) * v + s * v_reset

    So it fires above the threshold and not at it, and multiplies by ``1 / tau``. The reset is
    never detached. Of the surrogates ``sigmoid``, ``erf``, ``piecewise_quadratic`` and
    ``super_spike`` are in it at their default ``alpha``.
    """
    lif = _library("norse", "norse.torch.functional.lif")
    _expressible(kind == "lif", f"Norse's LIF is no other kind (kind={kind!r})")
    _expressible(v_reset is not None, "Norse's LIF has no soft reset")
    _expressible(decay_input, "Norse's LIF always decays its input")
    method, steepness = "heaviside", 0.0
    if _differentiated(x, v):
        _expressible(not detach_reset, "Norse's LIF never detaches its reset")
        method, steepness = _norse_surrogate(surrogate, _alpha(surrogate, alpha))
    number = x.new_tensor
    parameters = lif.LIFParameters(
        tau_syn_inv=number(1 / tau_syn), tau_mem_inv=number(1 / tau), v_leak=number(v_reset),
        v_th=number(v_threshold), v_reset=number(v_reset), method=method, alpha=steepness,
    )  # fmt: skip
    v = _start(x, v, v_reset)
    state = lif.LIFFeedForwardState(v=v, i=torch.zeros_like(v))
    spikes = []
    for x_t in x:
        s, state = lif.lif_feed_forward_step(x_t, state, parameters, dt=1.0)
        spikes.append(s)
    return _stacked(spikes, x), state.v


def _library(package: str, module: str) -> Any:
    """A module of another library; what it warns of on import is its own affair."""
    require(package, "peers", f"the adapter of {package}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(f"the adapter of {package} cannot import it: {error}") from error


def _expressible(can: bool, why: str) -> None:
    if not can:
        raise NotImplementedError(why)


def _differentiated(x: Tensor, v: Tensor | None) -> bool:
    """Whether a gradient is wanted: only then do surrogates and detached resets matter."""
    return x.requires_grad or (v is not None and v.requires_grad)


def _alpha(surrogate: str, alpha: float | None) -> float:
    return SURROGATES[surrogate].alpha if alpha is None else alpha


def _start(x: Tensor, v: Tensor | None, v_reset: float | None) -> Tensor:
    if v is not None:
        return v
    return x.new_full(x.shape[1:], v_reset or 0.0, dtype=arithmetic_dtype(x.dtype))


def _stacked(spikes: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(spikes).to(x.dtype) if spikes else torch.empty_like(x)


def _snntorch_surrogate(name: str, alpha: float) -> Any:
    """The derivative of that name, where snnTorch has it."""
    surrogate = _library("snntorch", "snntorch.surrogate")
    if name == "sigmoid":
        return surrogate.sigmoid(slope=alpha)
    if name == "atan":
        return surrogate.atan(alpha=alpha)
    # fast_sigmoid is 1 / (1 + slope |z|)^2: both of these at one alpha.
    if (name, alpha) in (("soft_sign", 2.0), ("super_spike", 1.0)):
        return surrogate.fast_sigmoid(slope=alpha)
    raise NotImplementedError(f"snnTorch has no surrogate {name} with alpha = {alpha}")


def _norse_surrogate(name: str, alpha: float) -> tuple[str, float]:
    """Norse's method and its alpha, where one is that derivative."""
    methods = {
        ("sigmoid", 4.0): ("tanh", 2.0),
        ("erf", 2.0): ("heavi_erfc", 2.0),
        ("piecewise_quadratic", 1.0): ("triangle", 1.0),
        ("super_spike", 1.0): ("super", 1.0),
    }
    if (name, alpha) not in methods:
        raise NotImplementedError(f"Norse has no surrogate {name} with alpha = {alpha}")
    return methods[name, alpha]
