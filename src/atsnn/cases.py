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
    without and packs what comes out. ``leaves`` are the inputs with a gradient.
    """

    make: Callable[[Numbers, TokenLayout, int, torch.dtype], Inputs]
    packed: Callable[..., Outputs]
    dense: Callable[..., Outputs]
    leaves: tuple[str, ...] = ()
    heads: int = 1

    def channels(self, per_head: int) -> int:
        return per_head * self.heads


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


def packed_neuron(settings, backend, layout, x, v=None, inv_tau=None):
    return F.neuron(layout.pack(x), v, inv_tau=inv_tau, layout=layout, backend=backend, **settings)


def dense_neuron(settings, backend, layout, x, v=None, inv_tau=None):
    call: Any = partial(F.neuron, v=v, inv_tau=inv_tau, backend=backend, **settings)
    # The potential after each number of timesteps; a token's is that after its last active one.
    after = torch.stack([call(x[:n])[1] for n in range(layout.T + 1)])
    last = layout.active_steps[None, :, :, None].expand(after[:1].shape)
    return layout.pack(call(x)[0]), after.gather(0, last)[0]


def neuron_operation(has_v: bool, **settings) -> Operation:
    kind = settings["kind"]
    leaves = ["x", *["v"] * has_v, *["inv_tau"] * (kind == "plif")]
    return Operation(
        partial(make_neuron, kind, has_v), partial(packed_neuron, settings),
        partial(dense_neuron, settings), tuple(leaves),
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
    if function is F.spike_driven_attention:
        settings["return_state"] = True
    call = partial(function, num_heads=heads, **settings)

    def packed(backend, layout, q, k, v, **rest):
        out = call(*map(layout.pack, (q, k, v)), layout=layout, backend=backend, **rest)
        return out if isinstance(out, tuple) else (out,)

    def dense(backend, layout, q, k, v, **rest):
        out = call(q, k, v, backend=backend, **rest)
        out, *state = out if isinstance(out, tuple) else (out,)
        return (layout.pack(out), *state)

    return Operation(
        partial(make_attention, sized, stateful), packed, dense,
        ("q", "k", "v", *["state"] * stateful), heads,
    )  # fmt: skip


# -- halting --------------------------------------------------------------------------------------


def make_scores(score, numbers, layout, C, dtype):
    x = masked(layout, numbers.integers(-3, 9, cells(layout, C), bits=1)).to(dtype)
    weight = numbers.normal((C,) if score == "linear" else ()) * 0.5
    bias = numbers.normal(()) - 1.5
    return {"x": x, "weight": weight.float(), "bias": bias.float()}


def scores_operation(score: str) -> Operation:
    call = partial(F.halting_scores, score=score)
    reaches = {"first": "x weight bias", "mean": "x weight bias", "linear": "weight bias"}
    return Operation(
        partial(make_scores, score),
        lambda backend, layout, x, **rest: (call(layout.pack(x), backend=backend, **rest),),
        lambda backend, layout, x, **rest: (layout.pack(call(x, backend=backend, **rest)),),
        tuple(reaches.get(score, "bias").split()),
    )  # fmt: skip


def make_halt(numbers, layout, C, dtype):
    shape, bits = cells(layout), reference.SCORE_BITS
    h = numbers.integers(0, 2**bits // 2, shape, bits)
    # Accumulators below 1 - eps in active cells, growing with time as those of a rectangle do.
    H = numbers.integers(0, 2**bits // 4, shape, bits).cumsum(0).clamp(max=0.75)
    return {"h": masked(layout, h).float(), "H": masked(layout, H).float()}


def halt_operation(accumulator: str, final: bool) -> Operation:
    call = partial(F.halt, accumulator=accumulator, final=final)

    def packed(backend, layout, h, H):
        return call(layout.pack(h), layout.pack(H), layout, backend=backend)

    def dense(backend, layout, h, H):
        *out, steps = reference.halt(h, H, layout.mask, accumulator, 0.01, final)
        return (*map(layout.pack, out), steps)

    return Operation(make_halt, packed, dense, ("h", "H"))


def make_readout(sized, numbers, layout, C, dtype):
    out = {
        "x": masked(layout, numbers.integers(-40, 40, cells(layout, C), bits=3)).to(dtype),
        "w": masked(layout, numbers.integers(0, 2**18, cells(layout), bits=18)).float(),
    }
    if sized:
        out["sizes"] = sizes_of(numbers, layout)
    return out


def readout_operation(sized: bool) -> Operation:
    def packed(backend, layout, x, w, **rest):
        x, w = layout.pack(x), layout.pack(w)
        return (F.readout(x, w, layout=layout, backend=backend, **rest),)

    def dense(backend, layout, x, w, **rest):
        return (F.readout(x, w, backend=backend, **rest),)

    return Operation(partial(make_readout, sized), packed, dense, ("x", "w"))


# -- merging --------------------------------------------------------------------------------------


def make_keys(numbers, layout, C, dtype):
    return {"keys": masked(layout, numbers.spikes(cells(layout, C))).to(dtype)}


COUNTS = Operation(
    make_keys,
    lambda backend, layout, keys: (
        F.firing_counts(layout.pack(keys), layout=layout, backend=backend),
    ),
    lambda backend, layout, keys: (F.firing_counts(keys, backend=backend),),
)


def match_operation(**settings) -> Operation:
    def make(numbers, layout, C, dtype):
        counts = numbers.integers(0, 3, (layout.B, layout.N, C)).to(dtype)
        return {"counts": counts, "active_steps": layout.active_steps}

    def call(backend, layout, **inputs):
        return (F.match_tokens(backend=backend, **inputs, **settings).target,)

    return Operation(make, call, call)


def make_fewer(numbers, layout, C, dtype):
    x = masked(layout, numbers.normal(cells(layout, C))).to(dtype)
    share = torch.from_numpy(numbers.rng.random((layout.B, layout.N)))
    return {"x": x, "steps": (share * (layout.active_steps + 1)).long()}


def take(backend, layout, x, steps):
    to = TokenLayout.from_active_steps(steps, layout.T)
    return (F.take_rows(layout.pack(x), layout, to, backend=backend),)


TAKE = Operation(
    make_fewer,
    take,
    lambda backend, layout, x, steps: (TokenLayout.from_active_steps(steps, layout.T).pack(x),),
    ("x",),
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


def merge_operation(sized: bool) -> Operation:
    def packed(backend, layout, x, target, **rest):
        plan = MergePlan.of(target)
        return (F.merge_tokens(layout.pack(x), plan, layout=layout, backend=backend, **rest),)

    def dense(backend, layout, x, target, **rest):
        plan = MergePlan.of(target)
        out = F.merge_tokens(x, plan, backend=backend, **rest)
        return (layout.without(plan.merged).pack(out),)

    return Operation(partial(make_merge, sized), packed, dense, ("x",))


def make_unmerge(numbers, layout, C, dtype):
    target = plan_of(numbers, layout)
    after = layout.without(MergePlan.of(target).merged)
    return {"y": masked(after, numbers.normal(cells(layout, C))).to(dtype), "target": target}


def packed_unmerge(backend, layout, y, target):
    plan = MergePlan.of(target)
    rows = layout.without(plan.merged).pack(y)
    return (F.unmerge_tokens(rows, plan, layout=layout, backend=backend),)


UNMERGE = Operation(
    make_unmerge,
    packed_unmerge,
    lambda backend, layout, y, target: (
        layout.pack(F.unmerge_tokens(y, MergePlan.of(target), backend=backend)),
    ),
    ("y",),
)

# -- linear maps ----------------------------------------------------------------------------------


def make_linear(numbers, layout, C, dtype):
    return {
        "x": masked(layout, numbers.spikes(cells(layout, C))).float(),
        "weight": numbers.integers(-8, 8, (70, C), bits=3).float(),
        "bias": numbers.integers(-4, 4, (70,), bits=3).float(),
    }


def linear_operation(bits: bool) -> Operation:
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
    )  # fmt: skip


OPERATIONS: dict[str, Operation] = {
    "neuron": neuron_operation(False, kind="lif"),
    "neuron from v": neuron_operation(True, kind="lif", v_reset=-0.25, surrogate="atan"),
    "neuron soft": neuron_operation(True, kind="if", v_reset=None, detach_reset=True),
    "neuron plif": neuron_operation(True, kind="plif", decay_input=False, surrogate="erf"),
    "attention": attention_operation(F.spiking_attention, 1, False),
    "attention sized": attention_operation(F.spiking_attention, 3, True, scale=0.25),
    "spike-driven": attention_operation(F.spike_driven_attention, 1, False),
    "spike-driven from state": attention_operation(
        F.spike_driven_attention, 2, True, True, v_threshold=1.5, surrogate="super_spike"
    ),
    **{f"score {score}": scores_operation(score) for score in reference.SCORES},
    "halt rectangle": halt_operation("rectangle", False),
    "halt depth": halt_operation("depth", False),
    "halt final": halt_operation("rectangle", True),
    "readout": readout_operation(False),
    "readout sized": readout_operation(True),
    "counts": COUNTS,
    "match r": match_operation(r=2),
    "match threshold": match_operation(threshold=0.5),
    "take": TAKE,
    "merge": merge_operation(False),
    "merge sized": merge_operation(True),
    "unmerge": UNMERGE,
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


def gradients(
    operation: Operation, form: str, backend: str, layout: TokenLayout, inputs: Inputs,
    numbers: Numbers, which: int = 3,
) -> tuple[Outputs, dict[str, Tensor]]:  # fmt: skip
    """Results, and gradients of the leaves from random ones of the results.

    Of several floating-point results only those whose bit is set in ``which`` send one.
    """
    leaves = leaves_of(operation, inputs)
    outputs = getattr(operation, form)(backend, layout, **leaves)
    results = [out for out in outputs if out.is_floating_point()]
    chosen, sent = [], []
    for i, out in enumerate(results):
        grad = numbers.integers(-8, 8, out.shape, bits=2).to(out.dtype)
        if out.requires_grad and (len(results) == 1 or which >> i & 1):
            chosen.append(out)
            sent.append(grad)
    wanted = [leaves[name] for name in operation.leaves]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if chosen:
        found = torch.autograd.grad(chosen, wanted, sent, allow_unused=True)
    grads = {
        name: torch.zeros_like(x) if g is None else g
        for name, x, g in zip(operation.leaves, wanted, found, strict=True)
    }
    return tuple(out.detach() for out in outputs), grads


# -- layouts --------------------------------------------------------------------------------------


def ragged(seed: int, T: int, B: int, N: int) -> TokenLayout:
    n = Numbers(seed).rng.integers(0, T + 1, (B, N))
    return TokenLayout.from_active_steps(torch.from_numpy(n), T)
