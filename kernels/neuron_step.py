"""One step of a spiking neuron, the twin of ``csrc/cpu/neuron_step-inl.h`` and ``neuron-inl.h``.

Formulas: :func:`atsnn.reference.neuron` and :data:`atsnn.reference.SURROGATES`. Kernels that use
these are launched with :data:`.launch.EXACT`, so that each operation is rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from ..checks import InvalidValue
from ..reference import SURROGATES

KINDS = ("lif", "if", "plif")
PI_HALF = tl.constexpr(math.pi / 2)
SQRT_PI = tl.constexpr(math.sqrt(math.pi))


@triton.jit
def divide(a, b, EXACT_INVERSE: tl.constexpr):
    """``a / b``, correctly rounded; a multiplication where ``1 / b`` is exact."""
    # One chain and one return: the compiler reads on after a return in a branch it takes.
    if EXACT_INVERSE:
        quotient = a * (1.0 / b)
    elif a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, tl.full(a.shape, b, a.dtype))
    return quotient


@triton.jit
def charge(
    v, x, factor,
    KIND: tl.constexpr, TAU: tl.constexpr, EXACT_INVERSE: tl.constexpr, REST: tl.constexpr,
    DECAY_INPUT: tl.constexpr,
):  # fmt: skip
    """The potential before the threshold; ``factor`` is a PLIF's ``1 / tau``."""
    if KIND == "if":
        return v + x
    drive = v - REST
    if DECAY_INPUT:
        drive = x - drive
    drive = drive * factor if KIND == "plif" else divide(drive, TAU, EXACT_INVERSE)
    if DECAY_INPUT:
        return v + drive
    return v - drive + x


@triton.jit
def reset(u, fired, V_THRESHOLD: tl.constexpr, REST: tl.constexpr, HARD: tl.constexpr):
    """The potential after it; ``fired`` is ``u >= V_THRESHOLD``."""
    if HARD:
        return tl.where(fired, REST, u)
    return tl.where(fired, u - V_THRESHOLD, u)


@triton.jit
def surrogate_derivative(z, SURROGATE: tl.constexpr, ALPHA: tl.constexpr):
    """``sigma'(z)`` at ``z = u - v_threshold``."""
    # One chain and one return: the compiler reads on after a return in a branch it takes.
    if SURROGATE == "sigmoid":
        e = tl.exp(-ALPHA * tl.abs(z))  # s (1 - s) is even in z, so that nothing overflows
        slope = ALPHA * e / ((1.0 + e) * (1.0 + e))
    elif SURROGATE == "atan":
        a = PI_HALF * ALPHA * z
        slope = (ALPHA / 2) / (1.0 + a * a)
    elif SURROGATE == "piecewise_quadratic":
        size = tl.abs(z)
        slope = tl.where(size > 1 / ALPHA, 0.0, ALPHA - ALPHA * ALPHA * size)
    elif SURROGATE == "piecewise_exp":
        slope = (ALPHA / 2) * tl.exp(-ALPHA * tl.abs(z))
    elif SURROGATE == "soft_sign":
        a = 1 / ALPHA + tl.abs(z)
        slope = 1.0 / (2 * ALPHA * (a * a))
    elif SURROGATE == "super_spike":
        a = tl.abs(z) + 1.0
        slope = ALPHA / (a * a)
    else:
        tl.static_assert(SURROGATE == "erf")
        a = ALPHA * z
        slope = (ALPHA / SQRT_PI) * tl.exp(-(a * a))
    return slope


@triton.jit
def step_back(
    grad_s, grad_v, u, v, x, factor,
    KIND: tl.constexpr, TAU: tl.constexpr, REST: tl.constexpr, DECAY_INPUT: tl.constexpr,
    V_THRESHOLD: tl.constexpr, HARD: tl.constexpr, DETACH_RESET: tl.constexpr,
    SURROGATE: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Gradients of one step for its input, the potential before it, and a PLIF's ``1 / tau``.

    ``grad_s``, ``grad_v`` are those of the spike and of the potential after the step, ``u`` and
    ``v`` the potentials before the threshold and before the step.
    """
    slope = surrogate_derivative(u - V_THRESHOLD, SURROGATE, ALPHA)
    fired = u >= V_THRESHOLD
    through = grad_v  # to u, past the reset
    at_reset = 0.0 - V_THRESHOLD
    if HARD:
        through = tl.where(fired, 0.0, grad_v)
        at_reset = REST - u
    grad_u = grad_s * slope + through
    if not DETACH_RESET:
        grad_u += grad_v * (at_reset * slope)
    grad_factor = grad_u * 0.0
    if KIND == "if":
        return grad_u, grad_u, grad_factor
    if KIND == "plif":
        leak = grad_u * factor
        drive = v - REST
        drive = x - drive if DECAY_INPUT else -drive
        grad_factor = grad_u * drive
    else:
        leak = grad_u * (1.0 / TAU)
    grad_x = leak if DECAY_INPUT else grad_u
    return grad_x, grad_u - leak, grad_factor


def step_settings(
    op: str, kind: str, tau: float, v_threshold: float, v_reset: float | None, decay_input: bool
) -> dict[str, Any]:
    """The compile-time settings of :func:`charge` and :func:`reset`, checked.

    A model has few of them; what varies from call to call is never among them.
    """
    if kind not in KINDS:
        raise InvalidValue(f"{op}: unknown kind {kind!r}, must be one of {', '.join(KINDS)}")
    tau = float(tau) if kind == "lif" else 1.0
    return dict(
        KIND=kind, TAU=tau, EXACT_INVERSE=math.frexp(tau)[0] == 0.5,
        REST=0.0 if v_reset is None else float(v_reset), DECAY_INPUT=bool(decay_input),
        V_THRESHOLD=float(v_threshold), HARD=v_reset is not None,
    )  # fmt: skip


def surrogate_settings(op: str, surrogate: str, alpha: float, detach_reset: bool) -> dict[str, Any]:
    """The compile-time settings of :func:`surrogate_derivative` and of the backward, checked."""
    if surrogate not in SURROGATES:
        raise InvalidValue(f"{op}: unknown surrogate {surrogate!r}")
    return dict(SURROGATE=surrogate, ALPHA=float(alpha), DETACH_RESET=bool(detach_reset))
