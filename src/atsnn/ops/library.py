"""The operators' schemas, in one place, and the extension that brings their native kernels.

Every operator has the reference as its ``CompositeExplicitAutograd`` kernel and, where the
extension is built, a C++ kernel for ``CPU``. So the package computes without a compiler. The same
operators stand a second time in the namespace ``atsnn_triton``, where Triton computes whatever the
device is; :mod:`.triton` registers those kernels, and for ``CUDA`` under the first name too.

``token [B, N]`` and ``offsets [T * B + 1]`` are those of a :class:`~atsnn.layout.TokenLayout`;
where they are left out the tensors are dense, ``[T, B, N, C]``, and every cell is active.
A gradient that does not exist is an empty tensor. ``rows`` is how many rows the result shall have,
where that is known without looking into the offsets; what is past their end is -1.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout

NEURON = (
    "Tensor x, Tensor? v, Tensor? inv_tau, Tensor? token, Tensor? offsets, str kind, float tau, "
    "float v_threshold, float? v_reset, bool decay_input, bool detach_reset, str surrogate, "
    "float alpha"
)
ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? sizes, Tensor? token, Tensor? offsets, "
    "int num_heads, float scale"
)
SPIKE_DRIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? state, Tensor? sizes, Tensor? token, Tensor? offsets, "
    "float v_threshold, float tau, str surrogate, float alpha"
)
# From one layout to another in which the tokens that merged are gone.
MERGE = (
    "Tensor target, Tensor sizes, Tensor? token, Tensor? offsets, Tensor? to_token, "
    "Tensor? to_offsets"
)
UNMERGE = "Tensor target, Tensor? token, Tensor? offsets, Tensor? to_token, Tensor? to_offsets"
READOUT = "Tensor x, Tensor w, Tensor? sizes, Tensor? token, Tensor? offsets"
LINEAR = (
    "Tensor spikes, Tensor weight, Tensor bias, Tensor? v, Tensor? token, Tensor? offsets, "
    "int outputs, str kind, float tau, float? inv_tau, float v_threshold, float? v_reset, "
    "bool decay_input, bool keep"
)
HALT = "Tensor token, Tensor offsets, str accumulator"

SCHEMAS = f"""
token_layout(Tensor active_steps, int T) -> (Tensor, Tensor)
layout_cells(Tensor token, Tensor offsets, SymInt? rows=None) -> Tensor
moved_rows(Tensor token, Tensor offsets, Tensor to_token, Tensor to_offsets, SymInt? rows=None) \
-> Tensor
neuron({NEURON}) -> (Tensor, Tensor)
neuron_backward(Tensor? grad_spikes, Tensor? grad_v, {NEURON}) -> (Tensor, Tensor, Tensor)
spiking_attention({ATTENTION}) -> Tensor
spiking_attention_backward(Tensor grad, {ATTENTION}) -> (Tensor, Tensor, Tensor)
spike_driven_attention({SPIKE_DRIVEN}) -> (Tensor, Tensor)
spike_driven_attention_backward(Tensor? grad, Tensor? grad_state, {SPIKE_DRIVEN}) \
-> (Tensor, Tensor, Tensor, Tensor)
take_rows(Tensor x, Tensor index) -> Tensor
take_rows_backward(Tensor grad, Tensor index, SymInt rows) -> Tensor
firing_counts(Tensor keys, Tensor? token, Tensor? offsets) -> Tensor
match_tokens(Tensor counts, Tensor active_steps, int? r, float? threshold) -> Tensor
merge_tokens(Tensor x, {MERGE}, int bits, SymInt? rows=None) -> Tensor
merge_tokens_backward(Tensor grad, {MERGE}, SymInt? rows=None) -> Tensor
unmerge_tokens(Tensor y, {UNMERGE}, SymInt? rows=None) -> Tensor
unmerge_tokens_backward(Tensor grad, {UNMERGE}, SymInt? rows=None) -> Tensor
halting_scores(Tensor x, Tensor weight, Tensor bias, str score) -> Tensor
halting_scores_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, str score) \
-> (Tensor, Tensor, Tensor)
halt(Tensor h, Tensor H, {HALT}, float eps, bool final) -> (Tensor, Tensor, Tensor, Tensor)
halt_backward(Tensor? grad_w, Tensor? grad_H, Tensor last, {HALT}) -> (Tensor, Tensor)
readout({READOUT}) -> Tensor
readout_backward(Tensor grad, {READOUT}) -> (Tensor, Tensor)
pack_spikes(Tensor x) -> Tensor
unpack_spikes(Tensor bits, int channels) -> Tensor
pack_linear(Tensor weight, Tensor? bias) -> (Tensor, Tensor)
spike_linear_lif({LINEAR}) -> (Tensor, Tensor)
"""

# Convolutions and linear maps of bits, for layers that were not made for it (atsnn.dropin): on the
# CPU, in inference. Maps of bits, and of counts as bytes, have their channels last; ``window`` is
# kernel, stride and padding, (y, x).
EVENTS = """
pack_counted(Tensor x) -> (Tensor, int, bool)
pack_maps(Tensor x) -> (Tensor, int, bool)
unpack_maps(Tensor bits, int channels) -> Tensor
count_spikes(Tensor bits) -> int
count_maps(Tensor x) -> Tensor
spike_linear(Tensor spikes, Tensor weight, Tensor bias, int outputs) -> Tensor
spike_conv(Tensor maps, Tensor weight, Tensor bias, int outputs, int[] window) -> Tensor
spike_conv_lif(Tensor maps, Tensor weight, Tensor bias, Tensor? v, int outputs, int[] window, \
bool pool, int still, str kind, float tau, float? inv_tau, float v_threshold, float? v_reset, \
bool decay_input) -> (Tensor, Tensor, int)
pool_spikes(Tensor bits, int[] window) -> (Tensor, int)
attend_lif(Tensor q, Tensor k, Tensor v, Tensor? state, int channels, int num_heads, float? scale, \
str kind, float tau, float? inv_tau, float v_threshold, float? v_reset, bool decay_input) \
-> (Tensor, Tensor, int)
"""

# The library must define its schemas before the extension registers kernels for them.
LIBRARY = torch.library.Library("atsnn", "DEF")
TRITON_LIBRARY = torch.library.Library("atsnn_triton", "DEF")
LIBRARIES = {"atsnn": LIBRARY, "atsnn_triton": TRITON_LIBRARY}
for _schema in SCHEMAS.strip().splitlines():
    for _library in LIBRARIES.values():
        _library.define(_schema)
for _schema in EVENTS.strip().splitlines():
    LIBRARY.define(_schema)
WITHOUT_KERNEL = ("pack_linear",)  # it moves weights once, which PyTorch does
OPERATORS = [_schema.split("(")[0] for _schema in SCHEMAS.strip().splitlines()]

native: Any = None
native_missing = ""
try:
    native = importlib.import_module("atsnn._C")
except ImportError as _error:
    native_missing = f"the extension is not built or does not load: {_error}"


def composite(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the reference of an operator for every device without a kernel of its own."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for library in LIBRARIES.values() if name in WITHOUT_KERNEL else [LIBRARY]:
            kernel = torch.no_grad()(function)
            torch.library.impl(library, name, "CompositeExplicitAutograd")(kernel)
        return function

    return register


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the shapes and dtypes of an operator's results."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for namespace, library in LIBRARIES.items():
            torch.library.register_fake(f"{namespace}::{name}", function, lib=library)
        return function

    return register


def autograd(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
    """Register an operator's gradient, which can be differentiated no further and says so.

    ``backward(operators, ctx, *grads)`` is given the operators of the namespace that ran.
    """
    for namespace, library in LIBRARIES.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", _once(name, getattr(torch.ops, namespace), backward),
            setup_context=setup, lib=library,
        )  # fmt: skip


def _once(name: str, operators: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
    def first_derivative(ctx: Any, *grads: Tensor | None) -> Any:
        found = backward(operators, ctx, *grads)
        if torch.is_grad_enabled():  # create_graph=True
            sources = [t for t in (*ctx.saved_tensors, *grads) if isinstance(t, Tensor)]
            found = tuple(
                _FirstDerivative.apply(name, g, *sources) if isinstance(g, Tensor) else g
                for g in found
            )
        return found

    return first_derivative


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{ctx.name}: the kernels have first derivatives only; backend='reference' has more"
        )


def reference_gradients(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients of a reference for its inputs; an empty tensor for one that is ``None``."""
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = zip(outputs, grads, strict=True)
        pairs = [(o, g) for o, g in given if g is not None and o.requires_grad]
        wanted = [x for x in leaves if x is not None]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
            )
    results = iter(found)
    like = wanted[0]
    out = []
    for x in leaves:
        if x is None:
            out.append(like.new_empty(0))
            continue
        g = next(results)
        # The gradient may be a view of one given, which an operator must not return.
        out.append(
            torch.zeros_like(x) if g is None else g.clone(memory_format=torch.contiguous_format)
        )
    return tuple(out)


def layout_of(token: Tensor | None, offsets: Tensor | None) -> TokenLayout | None:
    if token is None or offsets is None:
        return None
    return TokenLayout.from_parts(token, offsets)


def unpacked(layout: TokenLayout | None, x: Tensor) -> Tensor:
    """Dense form of rows: what the reference computes on."""
    return x if layout is None else layout.unpack(x)


def packed(layout: TokenLayout | None, x: Tensor) -> Tensor:
    """Rows of a dense result."""
    return x if layout is None else layout.pack(x)


def parts(layout: TokenLayout | None) -> tuple[Tensor | None, Tensor | None]:
    """How the operators are given a layout."""
    return (None, None) if layout is None else (layout.token, layout.offsets)
