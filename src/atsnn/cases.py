"""The operations as a table of cases: inputs for each, dense and packed, and their gradients.

Spikes, sizes and residual rows are whole numbers and weights dyadic, so that results are exact and
can be compared bit for bit. All numbers are NumPy's: torch's depend on the instruction set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import functional as F
from . import reference
from .layout import TokenLayout
from .reference import MergePlan

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Arguments = dict[str, Any]


class Numbers:
    """Seeded numbers of the kinds that the operations take."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integers(self, low: int, high: int, shape: Sequence[int], bits: int = 0) -> Tensor:
        """Multiples of ``2^-bits``, from ``low`` to ``high`` of them; float64, exact in float16."""
        return torch.from_numpy(self.rng.integers(low, high + 1, shape) / 2.0**bits)

    def spikes(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy((self.rng.random(shape) < 0.4).astype(np.float64))

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.asarray(self.rng.normal(0.3, 1.2, shape)))


@dataclass(frozen=True)
class Operation:
    """One operation in its two forms, both from dense inputs whose inactive cells are zero.

    ``make(numbers, layout, C, dtype)`` gives the inputs by name; ``packed(backend, layout,
    **inputs)`` packs them and calls with the layout; ``dense(backend, layout, **inputs)`` calls
    without and packs what comes out. ``leaves`` are the inputs with a gradient. ``function`` of
    :mod:`atsnn.functional` is what they call, with ``arguments(layout, packed, **inputs)``;
    ``forms`` are those in which it can be called.
    """

    make: Callable[[Numbers, TokenLayout, int, torch.dtype], Inputs]
    packed: Callable[..., Outputs]
    dense: Callable[..., Outputs]
    leaves: tuple[str, ...] = ()
    heads: int = 1
    function: str = ""
    arguments: Callable[..., Arguments] = lambda layout, packed, **inputs: inputs
    forms: tuple[str, ...] = ("dense", "packed")

    def channels(self, per_head: int) -> int:
        return per_head * self.heads


def takes(*rows: str, **settings: Any) -> Callable[..., Arguments]:
    """Arguments of a call: these inputs as rows of the layout and the layout, or all as it is."""

    def arguments(layout: TokenLayout, packed: bool, **inputs: Any) -> Arguments:
        if packed:
            inputs |= {name: layout.pack(inputs[name]) for name in rows}
            inputs["layout"] = layout
        return inputs | settings

    return arguments


def results(value: Any) -> Outputs:
    """The tensors that a call gave."""
    if isinstance(value, MergePlan):
        return (value.target,)
    return value if isinstance(value, tuple) else (value,)


def operation(
    function: str, make: Callable[..., Inputs], arguments: Callable[..., Arguments],
    *,
    dense: Callable[..., Outputs] | None = None,
    rows_of: Callable[..., TokenLayout | None] = lambda layout, inputs: None,
    **fields: Any,
) -> Operation:  # fmt: skip
    """An operation that is one call; ``rows_of`` is the layout that a dense result is packed in.

    Where the dense form is more than that call, or is not one, it is given as ``dense``.
    """

    def call(backend: str, layout: TokenLayout, packed: bool, inputs: Inputs) -> Outputs:
        given = arguments(layout, packed, **inputs)
        return results(getattr(F, function)(**given, backend=backend))

    def packed_form(backend: str, layout: TokenLayout, **inputs: Tensor) -> Outputs:
        return call(backend, layout, True, inputs)

    def dense_form(backend: str, layout: TokenLayout, **inputs: Tensor) -> Outputs:
        first, *rest = call(backend, layout, False, inputs)
        rows = rows_of(layout, inputs)
        return (first if rows is None else rows.pack(first), *rest)

    return Operation(
        make, packed_form, dense or dense_form, function=function, arguments=arguments, **fields
    )


def same_rows(layout: TokenLayout, inputs: Inputs) -> TokenLayout:
    return layout


def cells(layout: TokenLayout, *channels: int) -> tuple[int, ...]:
    return (layout.T, layout.B, layout.N, *channels)


def masked(layout: TokenLayout, x: Tensor) -> Tensor:
    """Zero in cells that are not active."""
    return x * layout.mask.view(*layout.mask.shape, *[1] * (x.dim() - 3))


def sizes_of(numbers: Numbers, layout: TokenLayout) -> Tensor:
    return numbers.integers(1, 4, (layout.B, layout.N)).float()


# -- neurons --------------------------------------------------------------------------------------


def make_neuron(kind, has_v, numbers, layout, C, dtype):
    out = {"x": masked(layout, numbers.normal(cells(layout, C))).to(dtype)}
    arithmetic = reference.arithmetic_dtype(dtype)
    if has_v:
        out["v"] = numbers.normal((layout.B, layout.N, C)).to(arithmetic)
    if kind == "plif":
        out["inv_tau"] = torch.tensor(0.4, dtype=arithmetic)
    return out


def dense_neuron(settings, backend, layout, x, v=None, inv_tau=None):
    call: Any = partial(F.neuron, v=v, inv_tau=inv_tau, backend=backend, **settings)
    # The potential after each number of timesteps; a token's is that after its last active one.
    after = torch.stack([call(x[:n])[1] for n in range(layout.T + 1)])
    last = layout.active_steps[None, :, :, None].expand(after[:1].shape)
    return layout.pack(call(x)[0]), after.gather(0, last)[0]


def neuron_operation(has_v: bool, **settings) -> Operation:
    kind = settings["kind"]
    leaves = ["x", *["v"] * has_v, *["inv_tau"] * (kind == "plif")]
    return operation(
        "neuron", partial(make_neuron, kind, has_v), takes("x", **settings),
        dense=partial(dense_neuron, settings), leaves=tuple(leaves),
    )  # fmt: skip


# -- attention ------------------------------------------------------------------------------------


def make_attention(sized, stateful, numbers, layout, C, dtype):
    out = {name: masked(layout, numbers.spikes(cells(layout, C))).to(dtype) for name in "qkv"}
    if stateful:
        state = numbers.integers(-4, 4, (layout.B, 1, C), bits=3)
        out["state"] = state.to(reference.arithmetic_dtype(dtype))
    if sized:
        out["sizes"] = sizes_of(numbers, layout)
    return out


def attention_operation(function, heads, sized, stateful=False, **settings) -> Operation:
    if function == "spike_driven_attention":
        settings["return_state"] = True
    return operation(
        function, partial(make_attention, sized, stateful),
        takes("q", "k", "v", num_heads=heads, **settings), rows_of=same_rows,
        leaves=("q", "k", "v", *["state"] * stateful), heads=heads,
    )  # fmt: skip


# -- halting --------------------------------------------------------------------------------------


def make_scores(score, numbers, layout, C, dtype):
    x = masked(layout, numbers.integers(-3, 9, cells(layout, C), bits=1)).to(dtype)
    weight = numbers.normal((C,) if score == "linear" else ()) * 0.5
    bias = numbers.normal(()) - 1.5
    return {"x": x, "weight": weight.float(), "bias": bias.float()}


def scores_operation(score: str) -> Operation:
    reaches = {"first": "x weight bias", "mean": "x weight bias", "linear": "weight bias"}

    def arguments(layout, packed, x, **rest):
        return {"x": layout.pack(x) if packed else x, **rest, "score": score}

    return operation(
        "halting_scores", partial(make_scores, score), arguments, rows_of=same_rows,
        leaves=tuple(reaches.get(score, "bias").split()),
    )  # fmt: skip


def make_halt(numbers, layout, C, dtype):
    shape, bits = cells(layout), reference.SCORE_BITS
    h = numbers.integers(0, 2**bits // 2, shape, bits)
    # Accumulators below 1 - eps in active cells, growing with time as those of a rectangle do.
    H = numbers.integers(0, 2**bits // 4, shape, bits).cumsum(0).clamp(max=0.75)
    return {"h": masked(layout, h).float(), "H": masked(layout, H).float()}


def halt_operation(accumulator: str, final: bool) -> Operation:
    def dense(backend, layout, h, H):
        *out, steps = reference.halt(h, H, layout.mask, accumulator, 0.01, final)
        return (*map(layout.pack, out), steps)

    return operation(
        "halt", make_halt, takes("h", "H", accumulator=accumulator, final=final), dense=dense,
        leaves=("h", "H"), forms=("packed",),
    )  # fmt: skip


def make_readout(sized, numbers, layout, C, dtype):
    out = {
        "x": masked(layout, numbers.integers(-40, 40, cells(layout, C), bits=3)).to(dtype),
        "w": masked(layout, numbers.integers(0, 2**18, cells(layout), bits=18)).float(),
    }
    if sized:
        out["sizes"] = sizes_of(numbers, layout)
    return out


def readout_operation(sized: bool) -> Operation:
    return operation("readout", partial(make_readout, sized), takes("x", "w"), leaves=("x", "w"))


# -- merging --------------------------------------------------------------------------------------


def make_keys(numbers, layout, C, dtype):
    return {"keys": masked(layout, numbers.spikes(cells(layout, C))).to(dtype)}


def match_operation(**settings) -> Operation:
    def make(numbers, layout, C, dtype):
        counts = numbers.integers(0, 3, (layout.B, layout.N, C)).to(dtype)
        return {"counts": counts, "active_steps": layout.active_steps}

    def arguments(layout, packed, **inputs):
        return inputs | settings

    return operation("match_tokens", make, arguments, forms=("dense",))


def make_fewer(numbers, layout, C, dtype):
    x = masked(layout, numbers.normal(cells(layout, C))).to(dtype)
    share = torch.from_numpy(numbers.rng.random((layout.B, layout.N)))
    return {"x": x, "steps": (share * (layout.active_steps + 1)).long()}


def take_operation() -> Operation:
    def arguments(layout, packed, x, steps):
        to = TokenLayout.from_active_steps(steps, layout.T)
        return {"x": layout.pack(x), "layout": layout, "to": to}

    def dense(backend, layout, x, steps):
        return (TokenLayout.from_active_steps(steps, layout.T).pack(x),)

    return operation(
        "take_rows", make_fewer, arguments, dense=dense, leaves=("x",), forms=("packed",)
    )


def plan_of(numbers: Numbers, layout: TokenLayout) -> Tensor:
    """Targets of a merge of some tokens, several into one where their counts are alike."""
    counts = numbers.integers(0, 1, (layout.B, layout.N, 2))
    steps = layout.active_steps
    return reference.match_tokens(counts, max(1, layout.N // 3), None, steps).target


def make_merge(sized, numbers, layout, C, dtype):
    out = {
        "x": masked(layout, numbers.integers(-9, 9, cells(layout, C), bits=1)).to(dtype),
        "target": plan_of(numbers, layout),
    }
    if sized:
        out["sizes"] = sizes_of(numbers, layout)
    return out


def after_merge(layout: TokenLayout, inputs: Inputs) -> TokenLayout:
    return layout.without(MergePlan.of(inputs["target"]).merged)


def merge_operation(sized: bool) -> Operation:
    def arguments(layout, packed, target, **inputs):
        return takes("x", plan=MergePlan.of(target))(layout, packed, **inputs)

    return operation(
        "merge_tokens", partial(make_merge, sized), arguments, rows_of=after_merge, leaves=("x",)
    )


def make_unmerge(numbers, layout, C, dtype):
    target = plan_of(numbers, layout)
    after = layout.without(MergePlan.of(target).merged)
    return {"y": masked(after, numbers.normal(cells(layout, C))).to(dtype), "target": target}


def unmerge_operation() -> Operation:
    def arguments(layout, packed, y, target):
        plan = MergePlan.of(target)
        if not packed:
            return {"y": y, "plan": plan}
        return {"y": layout.without(plan.merged).pack(y), "plan": plan, "layout": layout}

    return operation("unmerge_tokens", make_unmerge, arguments, rows_of=same_rows, leaves=("y",))


# -- linear maps ----------------------------------------------------------------------------------


def make_linear(numbers, layout, C, dtype):
    return {
        "x": masked(layout, numbers.spikes(cells(layout, C))).float(),
        "weight": numbers.integers(-8, 8, (70, C), bits=3).float(),
        "bias": numbers.integers(-4, 4, (70,), bits=3).float(),
    }


def linear_operation(bits: bool) -> Operation:
    def arguments(layout, packed, x, **rest):
        spikes = F.pack_spikes(x, backend="reference") if bits else x
        return takes("spikes")(layout, packed, spikes=spikes, **rest)

    def call(backend, x, weight, bias, **settings):
        x = F.pack_spikes(x, backend=backend) if bits else x
        s = cast(Tensor, F.spike_linear_lif(x, weight, bias, backend=backend, **settings))
        return F.unpack_spikes(s, len(weight), backend=backend) if bits else s

    return Operation(
        make_linear,
        lambda backend, layout, x, **rest: (
            call(backend, layout.pack(x), layout=layout, **rest),
        ),
        lambda backend, layout, x, **rest: (layout.pack(call(backend, x, **rest)),),
        function="spike_linear_lif",
        arguments=arguments,
    )  # fmt: skip


OPERATIONS: dict[str, Operation] = {
    "neuron": neuron_operation(False, kind="lif"),
    "neuron from v": neuron_operation(True, kind="lif", v_reset=-0.25, surrogate="atan"),
    "neuron soft": neuron_operation(True, kind="if", v_reset=None, detach_reset=True),
    "neuron plif": neuron_operation(True, kind="plif", decay_input=False, surrogate="erf"),
    "attention": attention_operation("spiking_attention", 1, False),
    "attention sized": attention_operation("spiking_attention", 3, True, scale=0.25),
    "spike-driven": attention_operation("spike_driven_attention", 1, False),
    "spike-driven from state": attention_operation(
        "spike_driven_attention", 2, True, True, v_threshold=1.5, surrogate="super_spike"
    ),
    **{f"score {score}": scores_operation(score) for score in reference.SCORES},
    "halt rectangle": halt_operation("rectangle", False),
    "halt depth": halt_operation("depth", False),
    "halt final": halt_operation("rectangle", True),
    "readout": readout_operation(False),
    "readout sized": readout_operation(True),
    "counts": operation("firing_counts", make_keys, takes("keys")),
    "match r": match_operation(r=2),
    "match threshold": match_operation(threshold=0.5),
    "take": take_operation(),
    "merge": merge_operation(False),
    "merge sized": merge_operation(True),
    "unmerge": unmerge_operation(),
    "linear": linear_operation(False),
    "linear bits": linear_operation(True),
}  # fmt: skip
DIFFERENTIABLE = [name for name, operation in OPERATIONS.items() if operation.leaves]


# -- results and gradients ------------------------------------------------------------------------


def leaves_of(operation: Operation, inputs: Inputs) -> Inputs:
    """The inputs, those with a gradient as new leaves."""
    return {
        name: x.detach().requires_grad_() if name in operation.leaves else x
        for name, x in inputs.items()
    }


def sent(outputs: Outputs, numbers: Numbers, which: int = 3) -> tuple[Outputs, Outputs]:
    """The results that a gradient comes back to, and random ones for them.

    Of several floating-point results only those whose bit is set in ``which`` send one.
    """
    found = [out for out in outputs if out.is_floating_point()]
    chosen, grads = [], []
    for i, out in enumerate(found):
        grad = numbers.integers(-8, 8, out.shape, bits=2).to(out.device, out.dtype)
        if out.requires_grad and (len(found) == 1 or which >> i & 1):
            chosen.append(out)
            grads.append(grad)
    return tuple(chosen), tuple(grads)


def backward(
    outputs: Outputs, leaves: Inputs, numbers: Numbers, which: int = 3
) -> dict[str, Tensor]:
    """Gradients of the leaves from random ones of the results; zeros where there is none."""
    chosen, grads = sent(outputs, numbers, which)
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if chosen and leaves:
        found = torch.autograd.grad(chosen, list(leaves.values()), grads, allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), found, strict=True)
    }


def gradients(
    operation: Operation, form: str, backend: str, layout: TokenLayout, inputs: Inputs,
    numbers: Numbers, which: int = 3,
) -> tuple[Outputs, dict[str, Tensor]]:  # fmt: skip
    """Results, and gradients of the leaves from random ones of the results; see :func:`sent`."""
    leaves = leaves_of(operation, inputs)
    outputs = getattr(operation, form)(backend, layout, **leaves)
    wanted = {name: leaves[name] for name in operation.leaves}
    grads = backward(outputs, wanted, numbers, which)
    return tuple(out.detach() for out in outputs), grads


# -- layouts --------------------------------------------------------------------------------------


def ragged(seed: int, T: int, B: int, N: int) -> TokenLayout:
    n = Numbers(seed).rng.integers(0, T + 1, (B, N))
    return TokenLayout.from_active_steps(torch.from_numpy(n), T)
