"""Operators: ``torch.library`` schemas, fake kernels, autograd, and the choice of backend.

Every operator has the reference as its ``CompositeExplicitAutograd`` kernel and, where the
extension is built, a C++ kernel for ``CPU``. So the package computes without a compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import BackendError, check_choice

BACKENDS = ("auto", "native", "triton", "reference")

# The library must define its schemas before the extension registers kernels for them.
_library = torch.library.Library("atsnn", "DEF")
_neuron_args = (
    "Tensor x, Tensor? v, Tensor? inv_tau, str kind, float tau, float v_threshold, "
    "float? v_reset, bool decay_input, bool detach_reset, str surrogate, float alpha"
)
_library.define(f"neuron({_neuron_args}) -> (Tensor, Tensor)")
_library.define(
    f"neuron_backward(Tensor? grad_spikes, Tensor? grad_v, {_neuron_args}) "
    "-> (Tensor, Tensor, Tensor)"
)

_native: Any = None
_native_missing = ""
try:
    _native = importlib.import_module("atsnn._C")
except ImportError as error:
    _native_missing = f"the extension is not built or does not load: {error}"


# -- backends -------------------------------------------------------------------------------------

# A plain global, which torch.compile guards on; a context variable it would silently ignore.
_chosen = "auto"


def native_level() -> str | None:
    """Instruction set of the native kernels in use (``"avx512"``, ...), None if not built."""
    return _native.level() if _native is not None else None


def available_backends() -> dict[str, bool | str]:
    """Each backend, with ``True`` or the reason why it cannot be used here."""
    return {
        "native": True if _native is not None else _native_missing,
        "triton": "this version has no Triton kernels yet",
        "reference": True,
    }


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Use ``backend`` for every call inside that does not name one itself, in every thread."""
    global _chosen
    check_choice("use_backend", "backend", backend, BACKENDS)
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


_warned: set[str] = set()


def resolve_backend(op: str, backend: str, device: torch.device, native: bool = True) -> str:
    """The backend that serves the call: ``"native"`` or ``"reference"``.

    A backend that was named and cannot serve raises; ``auto`` falls back to the reference and
    warns once why, unless the operation has no native kernel in this version (``native`` false).
    """
    check_choice(op, "backend", backend, BACKENDS)
    if backend == "auto":
        backend = _chosen
    if backend == "reference":
        return "reference"
    if backend == "triton":
        raise BackendError(
            f"{op}: backend 'triton' cannot serve the call: {available_backends()['triton']}"
        )
    if not native:
        reason = "the operation has no native kernel in this version"
    elif device.type not in ("cpu", "meta"):
        reason = f"the native kernels run on CPU tensors, got a tensor on {device}"
    elif _native is None:
        reason = _native_missing
    else:
        return "native"
    if backend == "native":
        raise BackendError(f"{op}: backend 'native' cannot serve the call: {reason}")
    if native and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"atsnn computes with the reference: {reason}", stacklevel=4)
    return "reference"


# -- neuron ---------------------------------------------------------------------------------------


@torch.library.impl(_library, "neuron", "CompositeExplicitAutograd")
def _neuron(x, v, inv_tau, *settings):
    with torch.no_grad():
        s, v_final = reference.neuron(x, v, inv_tau, *settings)
        # An operator must not return one of its inputs, which v is where T = 0.
        return s, v_final.clone() if v_final is v else v_final


@torch.library.impl(_library, "neuron_backward", "CompositeExplicitAutograd")
def _neuron_backward(grad_spikes, grad_v, x, v, inv_tau, *settings):
    dtype = reference.arithmetic_dtype(x.dtype)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_()]
        rest = settings[3] or 0.0
        state = x.new_full(x.shape[1:], rest, dtype=dtype) if v is None else v.detach()
        inputs.append(state.requires_grad_())
        factor = None
        if inv_tau is not None:
            factor = inv_tau.detach().requires_grad_()
            inputs.append(factor)
        outputs = reference.neuron(inputs[0], inputs[1], factor, *settings)
        given = zip(outputs, (grad_spikes, grad_v), strict=True)
        pairs = [(o, g) for o, g in given if g is not None and o.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
            )
    grads = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]
    # The gradient may be a view of grad_v itself (T = 0).
    return (
        grads[0].contiguous(),
        grads[1].clone() if v is not None else x.new_empty(0, dtype=dtype),
        grads[2] if inv_tau is not None else x.new_empty(0, dtype=dtype),
    )


@torch.library.register_fake("atsnn::neuron", lib=_library)
def _neuron_fake(x, v, inv_tau, *settings):
    state = x.new_empty(x.shape[1:], dtype=reference.arithmetic_dtype(x.dtype))
    return x.new_empty(x.shape), state


@torch.library.register_fake("atsnn::neuron_backward", lib=_library)
def _neuron_backward_fake(grad_spikes, grad_v, x, v, inv_tau, *settings):
    dtype = reference.arithmetic_dtype(x.dtype)
    state = x.new_empty(0 if v is None else v.shape, dtype=dtype)
    factor = x.new_empty(0, dtype=dtype) if inv_tau is None else torch.empty_like(inv_tau)
    return x.new_empty(x.shape), state, factor


def _neuron_setup(ctx, inputs, output):
    x, v, inv_tau, *settings = inputs
    # Only the inputs are saved: the backward makes the potentials again from them.
    ctx.save_for_backward(x, v, inv_tau)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that can be differentiated no further, and says so."""

    @staticmethod
    def forward(ctx, grad, *sources):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "neuron: the native kernels have first derivatives only; backend='reference' has more"
        )


def _neuron_grad(ctx, grad_spikes, grad_v):
    x, v, inv_tau = ctx.saved_tensors
    nothing = (None,) * (3 + len(ctx.settings))
    if grad_spikes is None and grad_v is None:
        return nothing
    grad_x, grad_state, grad_factor = torch.ops.atsnn.neuron_backward(
        grad_spikes, grad_v, x, v, inv_tau, *ctx.settings
    )
    grads = [
        grad_x,
        None if v is None else grad_state,
        None if inv_tau is None else grad_factor,
    ]
    if torch.is_grad_enabled():  # create_graph=True
        sources = [t for t in (x, v, inv_tau, grad_spikes, grad_v) if t is not None]
        grads = [None if g is None else _FirstDerivative.apply(g, *sources) for g in grads]
    return (*grads, *nothing[3:])


torch.library.register_autograd(
    "atsnn::neuron", _neuron_grad, setup_context=_neuron_setup, lib=_library
)


def neuron(backend: str, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The ``neuron`` operator by the chosen backend; arguments as in the schema."""
    if resolve_backend("neuron", backend, x.device) == "reference":
        return reference.neuron(x, *arguments)
    return torch.ops.atsnn.neuron(x, *arguments)
