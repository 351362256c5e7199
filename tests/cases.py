"""What the operators' tests share beside the package's table of cases: layouts, arguments."""

from __future__ import annotations

import hashlib
from functools import partial

import hypothesis.strategies as st
import torch
from test_layout import active_steps

from atsnn import TokenLayout, reference
from atsnn.cases import (
    OPERATIONS,
    Numbers,
    Outputs,
    cells,
    gradients,
    masked,
    plan_of,
    ragged,
    sizes_of,
)
from atsnn.ops.library import SCHEMAS
from atsnn.reference import MergePlan


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
    elif "merge" in name:
        of = after if name in ("merge_tokens", "unmerge_tokens_backward") else layout
        pool["rows"] = None if bare or not packed else of.num_rows
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
