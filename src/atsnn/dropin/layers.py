"""Modules of PyTorch that look, in inference, whether what they are given is spikes.

The classes stand for PyTorch's: a module becomes one by a change of its class, so that it keeps
its parameters, its place, its hooks and whatever refers to it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .chain import FEW_INPUTS, Chain
from .conditions import events_serve
from .sequence import CONTAINERS, LAYERS, Plan, open_sequential

# Products that dense arithmetic does in the time that a look takes, some 60 microseconds.
LEAST_WORK = 4_000_000


def kept(module: nn.Module, name: str, make: Any) -> Any:
    """What a module carries beside its state: made at the first call, not part of a checkpoint."""
    attributes = module.__dict__
    found = attributes.get(name)
    if found is None:
        found = attributes[name] = make()
    return found


def looked_at(layer: Any, x: Any) -> Tensor | None:
    """The output of a layer for spikes ``x [M, C, ...]`` or ``[..., C]``; ``None``: not spikes."""
    if layer.training or not isinstance(x, Tensor):
        return None
    shape = layer.weight.shape
    taps = math.prod(shape[2:])
    if shape[1] * taps <= FEW_INPUTS or x.numel() * shape[0] * taps < LEAST_WORK:
        return None
    if not events_serve(x):
        return None
    chain = kept(layer, "_atsnn_look", lambda: Chain(layer))
    one = not isinstance(layer, nn.Linear) or x.dim() == 1
    batch = x.unsqueeze(0) if one else x
    if chain.rests() or not chain.ready(batch):
        return None
    y = chain.sums(batch)
    return y if y is None or not one else y.squeeze(0)


class Looks:
    """A layer that looks at its input."""

    how = "inference: adds the weights of what fired, where its input is spikes"

    def seen(self, x: Any) -> Tensor | None:
        """The output for spikes; ``None``: ``x`` is something else."""
        return looked_at(self, x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # whatever the argument is called
        y = self.seen(args[0]) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]


class EventLinear(Looks, nn.Linear):
    """``nn.Linear`` that adds the weights of what fired where its input is spikes."""

    replaces = nn.Linear


class EventConv1d(Looks, nn.Conv1d):
    """``nn.Conv1d`` of one tap that does."""

    replaces = nn.Conv1d


class EventConv2d(Looks, nn.Conv2d):
    """``nn.Conv2d`` that does."""

    replaces = nn.Conv2d


def run_plan(module: nn.Module, x: Tensor) -> Tensor | None:
    """A container's output with its chains as one kernel each; ``None`` if it has none now."""
    if module.training or not events_serve(x):
        return None
    sequence = kept(module, "_atsnn_plan", Plan).of(module)
    return None if sequence is None else sequence(x)


class Plans:
    """A container that runs the chains in it as one kernel each."""

    how = "inference: chains of layer, BatchNorm and neuron as one kernel"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = None
        if len(args) == 1 and not kwargs:
            y = run_plan(self, args[0])  # type: ignore[arg-type]
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]


class EventSequential(Plans, nn.Sequential):
    """``nn.Sequential`` that runs chains of layer, BatchNorm and neuron as one kernel each."""

    replaces = nn.Sequential


CONTAINERS[EventSequential] = open_sequential
LAYERS |= {EventLinear: nn.Linear, EventConv1d: nn.Conv1d, EventConv2d: nn.Conv2d}
