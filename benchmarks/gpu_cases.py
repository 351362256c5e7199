"""What the GPU report runs: every operator at the shapes of two models, dense and packed.

An operator is one entry of :data:`OPERATIONS`. Its arguments are found by their names in
:data:`ARGUMENTS`; the entry states those that differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from atsnn import TokenLayout, kernels


@dataclass(frozen=True)
class Shape:
    """A block of a model: timesteps, images, tokens, channels, heads, channels of the MLP."""

    name: str
    T: int
    B: int
    N: int
    C: int
    heads: int
    hidden: int


SHAPES = {
    "S4-384": Shape("Spikformer-4-384", 4, 16, 64, 384, 12, 1536),
    "S8-512": Shape("Spikformer-8-512", 4, 16, 196, 512, 8, 2048),
}
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case; without values on the device ``meta``, on which launches are recorded.

    With a layout tokens are active for 1 to T timesteps, every number as often as the others.
    """

    shape: Shape
    dtype: torch.dtype
    packed: bool
    device: str = "meta"

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def floats(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self.dtype
        if self.device == "meta":
            return torch.empty(sizes, device="meta", dtype=wanted)
        return torch.rand(sizes, generator=torch.Generator().manual_seed(len(sizes))).to(wanted)

    def integers(self, *sizes: int) -> Tensor:
        return self.floats(*sizes, dtype=torch.float32).mul(1 << 20).to(torch.int64)

    @cached_property
    def active_steps(self) -> Tensor:
        s = self.shape
        steps = torch.arange(s.B * s.N) % s.T + 1
        order = torch.randperm(s.B * s.N, generator=torch.Generator().manual_seed(0))
        return steps[order].view(s.B, s.N)

    @cached_property
    def target(self) -> Tensor:
        """A quarter of the tokens is held by their neighbours."""
        k = torch.arange(self.shape.N).expand(self.shape.B, -1)
        return torch.where(k % 4 == 1, k - 1, k)

    @cached_property
    def layout(self) -> TokenLayout:
        return TokenLayout.from_active_steps(self.active_steps, self.shape.T)

    @cached_property
    def merged(self) -> TokenLayout:
        return self.layout.without(self.target != torch.arange(self.shape.N))

    def lead(self, layout: TokenLayout | None = None) -> tuple[int, ...]:
        s = self.shape
        return ((layout or self.layout).num_rows,) if self.packed else (s.T, s.B, s.N)

    def rows(self, channels: int | None = None, layout: TokenLayout | None = None) -> Tensor:
        return self.floats(*self.lead(layout), channels or self.shape.C)

    def spikes(self, channels: int | None = None) -> Tensor:
        x = self.rows(channels)
        return x if self.device == "meta" else (x < 0.2).to(x.dtype)

    def put(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def part(self, name: str, merged: bool = False) -> Tensor | None:
        layout = self.merged if merged else self.layout
        return self.put(getattr(layout, name)) if self.packed else None


Value = Callable[[Inputs], Any]


def state(i: Inputs) -> Tensor:
    """A membrane: of the arithmetic type, whatever the storage."""
    return i.floats(i.shape.B, i.shape.N, i.shape.C, dtype=i.arithmetic)


def of_tokens(i: Inputs) -> Tensor:
    return i.floats(i.shape.B, i.shape.N, dtype=torch.float32)


def of_rows(i: Inputs) -> Tensor:
    return i.floats(*i.lead(), dtype=torch.float32)


def of_images(i: Inputs) -> Tensor:
    return i.floats(i.shape.B, 1, i.shape.C, dtype=i.arithmetic)


ARGUMENTS: dict[str, Value] = {
    **dict.fromkeys(("x", "grad", "grad_spikes", "keys"), Inputs.rows),
    **dict.fromkeys(("q", "k"), Inputs.spikes),
    **dict.fromkeys(("state", "inv_tau", "grad_v", "grad_state", "threshold"), lambda i: None),
    **dict.fromkeys(("h", "H", "w", "grad_w", "grad_H"), of_rows),
    "v": lambda i: None,
    "token": lambda i: i.part("token"),
    "offsets": lambda i: i.part("offsets"),
    "to_token": lambda i: i.part("token", merged=True),
    "to_offsets": lambda i: i.part("offsets", merged=True),
    "rows": lambda i: i.layout.num_rows if i.packed else None,
    "active_steps": lambda i: i.put(i.active_steps),
    "target": lambda i: i.put(i.target),
    "index": lambda i: i.put(torch.ops.atsnn.moved_rows(
        i.layout.token, i.layout.offsets, i.merged.token, i.merged.offsets)),
    "sizes": of_tokens,
    "counts": lambda i: i.floats(i.shape.B, i.shape.N, i.shape.C, dtype=torch.float32),
    "last": lambda i: of_rows(i) > 0.5,
    "num_heads": lambda i: i.shape.heads,
    "T": lambda i: i.shape.T,
    "r": lambda i: i.shape.N // 4,
    "bits": lambda i: 8,
}  # fmt: skip
SETTINGS: dict[str, Any] = dict(
    kind="lif", tau=2.0, v_threshold=1.0, v_reset=0.0, decay_input=True, detach_reset=True,
    surrogate="sigmoid", alpha=4.0, scale=0.125, score="linear", accumulator="rectangle", eps=0.01,
    final=False, keep=False, form="float",
)  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """How an operator is called, and in which forms.

    ``given`` are arguments that are not as in :data:`ARGUMENTS` and :data:`SETTINGS`. ``read`` are
    the parts of arguments that have to be read, where that is not all. ``passes`` is how many
    products of the matrix units one product is made of.
    """

    given: dict[str, Any] = field(default_factory=dict)
    forms: tuple[bool, ...] = (False, True)  # packed or not
    types: tuple[str, ...] = ("f32", "bf16")
    read: dict[str, Value] = field(default_factory=dict)
    passes: int = 1

    def call(self, name: str, inputs: Inputs) -> tuple[dict[str, Any], Callable[[], Any]]:
        """The arguments, and the call of the launcher with them."""
        launcher = getattr(kernels, name)
        arguments = {}
        for parameter in inspect.signature(launcher).parameters:
            value = self.given.get(parameter, ARGUMENTS.get(parameter, SETTINGS.get(parameter)))
            arguments[parameter] = value(inputs) if callable(value) else value
        return arguments, lambda: launcher(*arguments.values())


PACKED, DENSE, F32 = (True,), (False,), ("f32",)
PANEL = 64


def panels(outputs: int) -> int:
    return -(-outputs // PANEL)


def packed_weight(i: Inputs) -> Tensor:
    return i.floats(panels(i.shape.hidden), i.shape.C, PANEL)


def packed_bias(i: Inputs) -> Tensor:
    return i.floats(panels(i.shape.hidden), PANEL)


def packed_spikes(i: Inputs) -> Tensor:
    return i.integers(*i.lead(), panels(i.shape.C))


def hidden_state(i: Inputs) -> Tensor:
    return i.floats(i.shape.B, i.shape.N, i.shape.hidden, dtype=torch.float32)


V_ROWS = {"v": Inputs.spikes}
LINEAR = dict(weight=packed_weight, bias=packed_bias, outputs=lambda i: i.shape.hidden)
SCORE = dict(
    weight=lambda i: i.floats(i.shape.C, dtype=torch.float32),
    bias=lambda i: i.floats(dtype=torch.float32),
)
# From the layout after the merge to the one before it.
BACK = dict(
    token=ARGUMENTS["to_token"], offsets=ARGUMENTS["to_offsets"], to_token=ARGUMENTS["token"],
    to_offsets=ARGUMENTS["offsets"],
)  # fmt: skip


def merged_rows(i: Inputs) -> Tensor:
    return i.rows(layout=i.merged)


def merged_count(i: Inputs) -> int | None:
    return i.merged.num_rows if i.packed else None


OPERATIONS: dict[str, Operation] = {
    "neuron": Operation(dict(v=state)),
    "neuron_backward": Operation(dict(v=state, grad_v=state)),
    "spiking_attention": Operation(V_ROWS),
    "spiking_attention_backward": Operation(V_ROWS),
    "spike_driven_attention": Operation(V_ROWS),
    "spike_driven_attention_backward": Operation(V_ROWS),
    "spike_linear_lif bits": Operation(
        LINEAR | dict(spikes=packed_spikes), types=F32, passes=3
    ),
    "spike_linear_lif": Operation(LINEAR | dict(spikes=Inputs.spikes), types=F32, passes=6),
    "pack_spikes": Operation(dict(x=Inputs.spikes), DENSE, F32),
    "unpack_spikes": Operation(
        dict(bits=packed_spikes, channels=lambda i: i.shape.C), DENSE, F32
    ),
    "take_rows": Operation({}, PACKED, read=dict(x=merged_rows)),
    "take_rows_backward": Operation(dict(grad=merged_rows), PACKED),
    "firing_counts": Operation(dict(keys=Inputs.spikes)),
    "match_tokens": Operation({}, DENSE, F32),
    "merge_tokens": Operation(dict(rows=merged_count)),
    "merge_tokens_backward": Operation(dict(grad=merged_rows)),
    "unmerge_tokens": Operation(BACK | dict(y=merged_rows)),
    "unmerge_tokens_backward": Operation(BACK | dict(rows=merged_count)),
    "halting_scores": Operation(SCORE, DENSE),
    "halting_scores_backward": Operation(SCORE | dict(grad=of_rows), DENSE),
    "halt": Operation({}, PACKED, F32),
    "halt_backward": Operation({}, PACKED, F32, read=dict(token=lambda i: None)),
    "readout": Operation({}),
    "readout_backward": Operation(
        dict(grad=lambda i: i.floats(i.shape.B, i.shape.C, dtype=torch.float64))
    ),
    "token_layout": Operation({}, PACKED, F32),
    "layout_cells": Operation({}, PACKED, F32),
    "moved_rows": Operation(dict(rows=merged_count), PACKED, F32),
}  # fmt: skip

# Other settings of the same kernels: compiled where they are asked for by name.
VARIANTS: dict[str, Operation] = {
    "neuron divided": Operation(dict(v=state, tau=3.0)),
    "neuron soft": Operation(dict(v=state, v_reset=None, decay_input=False)),
    "neuron if": Operation(dict(v=state, kind="if")),
    "neuron plif": Operation(
        dict(v=state, kind="plif", inv_tau=lambda i: i.floats(dtype=torch.float32))
    ),
    "neuron_backward plif": Operation(
        dict(v=state, grad_v=state, kind="plif", inv_tau=lambda i: i.floats(dtype=torch.float32))
    ),
    "spike_linear_lif state": Operation(
        LINEAR | dict(spikes=Inputs.spikes, v=hidden_state, keep=True), types=F32, passes=6
    ),
    "spike_linear_lif bits state": Operation(
        LINEAR | dict(spikes=packed_spikes, v=hidden_state, keep=True), types=F32, passes=3
    ),
}


def operation(name: str) -> Operation:
    return OPERATIONS.get(name) or VARIANTS[name]


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    operation: str
    shape: Shape
    dtype: str
    packed: bool

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.form}"

    @property
    def form(self) -> str:
        return f"{self.dtype}, {'packed' if self.packed else 'dense'}"

    @property
    def key(self) -> str:
        return f"{self.name}, {self.shape.name}"

    def inputs(self, device: str) -> Inputs:
        return Inputs(self.shape, TYPES[self.dtype], self.packed, device)

    def call(self, device: str = "meta") -> tuple[dict[str, Any], Callable[[], Any]]:
        return operation(self.operation).call(self.operation.split()[0], self.inputs(device))

    def least_bytes(self, arguments: dict[str, Any], results: Any) -> int:
        """Every argument read once and every result written once."""
        read = operation(self.operation).read
        inputs = self.inputs("meta")
        given = [read[k](inputs) if k in read else x for k, x in arguments.items()]
        made = results if isinstance(results, tuple) else (results,)
        return sum(x.nbytes for x in (*given, *made) if isinstance(x, Tensor))

    def with_sizes(self, **sizes: int) -> Case:
        return replace(self, shape=replace(self.shape, **sizes))


def cases(only: list[str] | None = None, shapes: list[str] | None = None) -> list[Case]:
    """All forms of all operations, or of all whose names begin with one of ``only``."""
    known = OPERATIONS if only is None else OPERATIONS | VARIANTS
    return [
        Case(name, SHAPES[shape], dtype, packed)
        for name, operation in known.items()
        if only is None or name.startswith(tuple(only))
        for shape in shapes or SHAPES
        for dtype in operation.types
        for packed in operation.forms
    ]
