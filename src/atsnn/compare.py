"""Two executions of one model, compared spike by spike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TokenLayout
from .nn.model import ATSpikformer, evaluating
from .nn.trace import FiringRates, Trace

__all__ = ["Difference", "compare_executions"]


@dataclass(frozen=True)
class Difference:
    """How far the packed execution is from the masked one.

    Attributes
    ----------
    images : int
    spikes : int
        Spikes of the blocks in the masked execution.
    flipped : int
        Neurons that fire at a timestep in one execution and not in the other. Sums of floats come
        in another order where a matrix has other rows, so a potential next to its threshold can
        fall on the other side; from there on values really differ.
    cells : int
        Cells executed in one and not in the other.
    classes : int
        Images put in another class.
    logits : float
        Largest difference of a logit.
    """

    images: int
    spikes: int
    flipped: int
    cells: int
    classes: int
    logits: float

    def __str__(self) -> str:
        if not self.flipped:
            same = "bit for bit" if self.logits == 0 else f"logits within {self.logits:.1e}"
            return f"packed = masked on {self.images} images ({same}, no flipped spike)"
        return (
            f"packed ~ masked on {self.images} images: {self.flipped} of {self.spikes} spikes "
            f"flipped by float32 rounding, {self.cells} cells and {self.classes} classes differ, "
            f"logits within {self.logits:.1e}"
        )


class _Spikes(FiringRates):
    """Keeps every spike, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, spikes: Tensor, layout: TokenLayout | None) -> None:
        super().__call__(name, spikes, layout)
        if name.endswith("lif"):
            dense = layout.unpack(spikes) if layout is not None and spikes.dim() == 2 else spikes
            # A layer that runs timestep by timestep comes several times.
            before = self.kept.get(name)
            self.kept[name] = dense if before is None else torch.cat([before, dense])


def compare_executions(model: ATSpikformer, images: Tensor, batch: int = 32) -> Difference:
    """Run ``images`` packed and masked, in evaluation mode, and count what differs."""
    total = Difference(0, 0, 0, 0, 0, 0.0)
    chosen = model.execution
    with torch.no_grad(), evaluating(model):
        try:
            for part in images.split(batch):
                tokens = model.embed(part)
                found: dict[str, tuple[Trace, _Spikes]] = {}
                for execution in ("packed", "masked"):
                    model.execution = execution
                    spikes = _Spikes()
                    trace = model.forward_tokens(tokens, True, spikes)
                    assert isinstance(trace, Trace)
                    found[execution] = trace, spikes
                total = _add(total, *found["packed"], *found["masked"])
        finally:
            model.execution = chosen
    return total


def _add(
    total: Difference, packed: Trace, ours: _Spikes, masked: Trace, theirs: _Spikes
) -> Difference:
    flipped = spikes = 0
    for name in ours.kept.keys() | theirs.kept.keys():
        a, b = ours.kept.get(name), theirs.kept.get(name)
        spikes += 0 if b is None else int(b.count_nonzero())
        if a is None or b is None:  # a block that only one of them ran
            flipped += int((a if b is None else b).count_nonzero())  # type: ignore[union-attr]
        else:
            flipped += int((a != b).sum())
    classes = int((packed.logits.argmax(1) != masked.logits.argmax(1)).sum())
    logits = float((packed.logits - masked.logits).abs().max()) if len(packed.logits) else 0.0
    return Difference(
        total.images + len(packed.logits), total.spikes + spikes, total.flipped + flipped,
        total.cells + int((packed.active != masked.active).sum()), total.classes + classes,
        max(total.logits, logits),
    )  # fmt: skip
