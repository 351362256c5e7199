"""Every operation with inputs for it, dense and packed: the tables that the operators' tests share.

Spikes, sizes and residual rows are whole numbers and weights dyadic, so that results are exact and
can be compared bit for bit. All numbers are NumPy's: torch's depend on the instruction set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import hypothesis.strategies as st
import numpy as np
import torch
from test_layout import active_steps
from torch import Tensor

import atsnn.functional as F
from atsnn import TokenLayout, reference
from atsnn.ops.library import SCHEMAS
from atsnn.reference import MergePlan

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
    call = partial(F.neuron, v=v, inv_tau=inv_tau, backend=backend, **settings)
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
    settings = dict(accumulator=accumulator, final=final)

    def packed(backend, layout, h, H):
        return F.halt(layout.pack(h), layout.pack(H), layout, backend=backend, **settings)

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
    found = [None] * len(wanted)
    if chosen:
        found = torch.autograd.grad(chosen, wanted, sent, allow_unused=True)
    grads = {
        name: torch.zeros_like(x) if g is None else g
        for name, x, g in zip(operation.leaves, wanted, found, strict=True)
    }
    return tuple(out.detach() for out in outputs), grads


def assert_same(ours: Outputs, theirs: Outputs, what: str = "") -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (what, i, a.dtype, b.dtype, a.shape)
        assert torch.equal(a, b), f"{what}: result {i} differs in {int((a != b).sum())} places"


# -- layouts --------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """Ragged layouts, those without a timestep, image or token, and those all or none of which
    is active, or one image of which has none."""
    n, T = draw(active_steps())
    shape = draw(st.sampled_from(["ragged", "ragged", "all", "none", "an image without"]))
    if shape == "all":
        n = torch.full_like(n, T)
    elif shape == "none":
        n = torch.zeros_like(n)
    elif shape == "an image without" and len(n):
        n[draw(st.integers(0, len(n) - 1))] = 0
    return TokenLayout.from_active_steps(n, T)


def ragged(seed: int, T: int, B: int, N: int) -> TokenLayout:
    n = Numbers(seed).rng.integers(0, T + 1, (B, N))
    return TokenLayout.from_active_steps(torch.from_numpy(n), T)


# -- the operators themselves ---------------------------------------------------------------------

SMALL = TokenLayout.from_active_steps(torch.tensor([[2, 1, 0], [2, 2, 1]]), 2)
OPERATORS = {schema.split("(")[0] for schema in SCHEMAS.strip().splitlines()}
LEAVES = {"x", "v", "inv_tau", "q", "k", "state", "y", "weight", "bias", "h", "H", "w"}
WITHOUT_GRADIENT = {
    "token_layout", "layout_cells", "moved_rows", "firing_counts", "match_tokens",
    "pack_spikes", "unpack_spikes", "pack_linear", "spike_linear_lif",
}  # fmt: skip


def signature(name: str) -> list[str]:
    schema = getattr(torch.ops.atsnn, name).default._schema
    return [argument.name for argument in schema.arguments]


def operator_arguments(
    name: str, layout: TokenLayout | None = SMALL, dtype: torch.dtype = torch.float32,
    C: int = 4, shape: tuple[int, int, int] = (2, 2, 3), bare: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Arguments for ``torch.ops.atsnn.<name>`` that fit, packed or (without a layout) dense.

    ``bare``: what may be left out besides the layout is.
    """
    # A halting step is of rows only.
    packed = layout is not None or name in ("halt", "halt_backward")
    layout = TokenLayout.full(*shape) if layout is None else layout
    T, B, N = layout.T, layout.B, layout.N
    numbers = Numbers(3)
    target = plan_of(numbers, layout)
    after = layout.without(MergePlan.of(target).merged)
    arithmetic = reference.arithmetic_dtype(dtype)

    def rows(make, *channels, of=layout):
        x = masked(of, make(cells(of, *channels)))
        return of.pack(x) if packed else x

    def parts(of):
        return (of.token, of.offsets) if packed else (None, None)

    scores = partial(numbers.integers, 0, 2**15, bits=18)
    fewer = TokenLayout.from_active_steps((layout.active_steps - 1).clamp(min=0), T)
    x = rows(numbers.normal, C).to(dtype)
    grad = rows(numbers.normal, C).to(dtype)
    pool = dict(
        active_steps=layout.active_steps, T=T, x=x, y=rows(numbers.normal, C, of=after).to(dtype),
        **{n: rows(numbers.spikes, C).to(dtype) for n in ("q", "k", "v", "keys")},
        state=numbers.normal((B, 1, C)).to(arithmetic), sizes=sizes_of(numbers, layout),
        num_heads=2, scale=0.125, kind="plif", tau=2.0, v_threshold=1.0, v_reset=0.25,
        decay_input=True, detach_reset=False, surrogate="atan", alpha=2.0,
        inv_tau=torch.tensor(0.4, dtype=arithmetic), counts=numbers.integers(0, 3, (B, N, C)),
        r=2, threshold=None, target=target, bits=8, score="mean", weight=torch.tensor(0.5),
        bias=torch.tensor(-1.0), h=rows(scores).float(), H=rows(scores).float(),
        last=rows(numbers.spikes).bool(), accumulator="rectangle", eps=0.01, final=False,
        w=rows(scores).float(), grad=grad, grad_spikes=grad, grad_w=rows(scores).float(),
        grad_H=rows(scores).float(), grad_state=numbers.normal((B, 1, C)).to(arithmetic),
        rows=x.shape[0], index=torch.arange(x.shape[0] + 3) % max(x.shape[0], 1) // 2,
    )  # fmt: skip
    pool["counts"] = pool["counts"].to(dtype)
    pool["token"], pool["offsets"] = parts(layout)
    pool["to_token"], pool["to_offsets"] = parts(after)
    if name in ("layout_cells", "moved_rows"):
        pool["token"], pool["offsets"] = layout.token, layout.offsets  # never left out
        pool["to_token"], pool["to_offsets"] = fewer.token, fewer.offsets
        pool["rows"] = None if bare else T * B * N
    if name.startswith("neuron"):
        pool["v"] = numbers.normal((B, N, C)).to(arithmetic)
        pool["grad_v"] = numbers.normal((B, N, C)).to(arithmetic)
    elif name.startswith("unmerge"):
        pool["token"], pool["offsets"] = parts(after)
        pool["to_token"], pool["to_offsets"] = parts(layout)
    elif name == "merge_tokens_backward":
        pool["grad"] = rows(numbers.normal, C, of=after).to(dtype)
    elif name == "take_rows_backward":
        pool["grad"] = x[pool["index"]]
    elif name == "halting_scores_backward":
        pool["grad"] = rows(numbers.normal).float()
    elif name == "readout_backward":
        pool["grad"] = numbers.normal((B, C))
    elif name == "pack_linear":
        pool["weight"] = numbers.integers(-4, 4, (5, C), bits=3).float()
        pool["bias"] = numbers.integers(-4, 4, (5,), bits=3).float()
    elif name in ("unpack_spikes", "spike_linear_lif"):
        outputs = 70
        pool["spikes"] = rows(numbers.spikes, C).float()
        pool["bits"] = torch.ops.atsnn.pack_spikes(pool["spikes"])
        pool["weight"], pool["bias"] = torch.ops.atsnn.pack_linear(
            numbers.integers(-8, 8, (outputs, C), bits=3).float(),
            numbers.integers(-4, 4, (outputs,), bits=3).float(),
        )
        pool |= dict(channels=C, outputs=outputs, inv_tau=0.5, keep=not bare)
        pool["v"] = numbers.integers(-4, 4, (B, N, outputs), bits=3).float()
    if bare:
        pool["kind"] = "lif"
        optional = ["inv_tau", "state", "grad_v", "grad_state", "grad_H"]
        optional += ["sizes"] * (not name.startswith("merge"))
        optional += ["v"] * name.startswith(("neuron", "spike_linear"))
        optional += ["bias"] * (name == "pack_linear")
        pool |= dict.fromkeys(optional)
    return {argument: pool[argument] for argument in signature(name)}


def flat(result: object) -> Outputs:
    return result if isinstance(result, tuple) else (result,)


def digest() -> str:
    """A hash of all that the native kernels give, forward and backward."""
    h = hashlib.sha256()
    layout = ragged(5, 4, 3, 21)
    for name, operation in OPERATIONS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            inputs = operation.make(Numbers(6), layout, operation.channels(37), dtype)
            for form in ("packed", "dense") if dtype == torch.float32 else ("packed",):
                out, grads = gradients(operation, form, "native", layout, inputs, Numbers(7))
                for i, x in enumerate((*out, *grads.values())):
                    h.update(f"{name} {dtype} {form} {i} {tuple(x.shape)}".encode())
                    h.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
