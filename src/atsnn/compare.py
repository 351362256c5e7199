"""Two executions of one model, or a model and its engine, compared spike by spike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import InvalidType, InvalidValue, check_integer, shape_of
from .engine import freeze, layer_name
from .layout import TokenLayout
from .nn.model import ATSpikformer, check_images, evaluating
from .nn.trace import FiringRates, Trace
from .schedule import rule_of, undirected

__all__ = ["Difference", "compare_engine", "compare_executions"]


@dataclass(frozen=True)
class Difference:
    """How far one computation of a model is from another.

    Attributes
    ----------
    images : int
    spikes : int
        Spikes of the second one.
    flipped : int
        Neurons that fire at a timestep in one and not in the other. Sums of floats come in
        another order, so a potential next to its threshold can fall on the other side; from there
        on values really differ.
    cells : int
        Cells executed in one and not in the other.
    classes : int
        Images, or pixels where they are classified, put in another class.
    logits : float
        Largest difference of a logit.
    names : tuple of str
        What the two are called.
    """

    images: int
    spikes: int
    flipped: int
    cells: int
    classes: int
    logits: float
    names: tuple[str, str] = ("packed", "masked")

    def __str__(self) -> str:
        ours, theirs = self.names
        if not self.flipped:
            same = "bit for bit" if self.logits == 0 else f"logits within {self.logits:.1e}"
            return f"{ours} = {theirs} on {self.images} images ({same}, no flipped spike)"
        return (
            f"{ours} ~ {theirs} on {self.images} images: {self.flipped} of {self.spikes} spikes "
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


def compare_engine(model: ATSpikformer, images: Tensor, batch: int = 32) -> Difference:
    """Run ``images`` through ``model`` and its engine, in evaluation mode, and count what differs.

    The engine folds BatchNorm into the weights and adds in another order.

    Parameters
    ----------
    model : ATSpikformer
        Its mode is restored afterwards.
    images : Tensor
        As the model takes them; at least one.
    batch : int
        Images that run together.

    Returns
    -------
    Difference
        Its text says in a line what was found.
    """
    op = "compare_engine"
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"{op}: model must be an ATSpikformer, got {type(model).__name__}")
    check_images(op, model.config, images)
    check_integer(op, "batch", batch, at_least=1)
    if not images.numel():
        raise InvalidValue(f"{op}: images must hold at least one, got {shape_of(images)}")
    total = Difference(0, 0, 0, 0, 0, 0.0, ("engine", "model"))
    with torch.no_grad(), evaluating(model):
        engine = freeze(undirected(model))
        for part in images.split(batch, images.dim() - 4):
            theirs = _Spikes()
            model_trace = model.forward_tokens(model.embed(part, theirs), True, theirs)
            assert isinstance(model_trace, Trace)
            ours = _Spikes()
            kept: list[tuple[Any, ...]] = []
            scores = model_trace.scores if rule_of(model) else None  # a rule it does not know
            trace = engine(part, True, scores=scores, record=kept.append)
            assert isinstance(trace, Trace)
            ours.kept = _dense(kept, model, theirs)
            total = _add(total, trace, ours, model_trace, theirs)
    return total


def _dense(
    kept: list[tuple[Any, ...]], model: ATSpikformer, like: _Spikes
) -> dict[str, Tensor]:  # fmt: skip
    """Spikes the engine recorded, by the model's names, in the model's shapes."""
    found: dict[str, Tensor] = {}
    for block, layer, bits, cells, channels, (T, B, N), first_step, first_image in kept:
        name = layer_name(block, layer)
        words = torch.from_numpy(bits.astype("int64"))
        spikes = (words.unsqueeze(-1) >> torch.arange(64)) & 1
        dense = torch.zeros(T * B * N, channels)
        dense[torch.from_numpy(cells)] = spikes.flatten(1)[:, :channels].float()
        dense = dense.view(T, B, N, channels)
        whole = like.kept.get(name)
        if whole is None:  # a block that only the engine ran
            found[name] = dense
            continue
        if whole.dim() == 5:  # maps [T, B, C, H, W]
            dense = dense.transpose(2, 3).unflatten(3, whole.shape[3:])
        place = found.setdefault(name, torch.zeros_like(whole))
        place[first_step : first_step + T, first_image : first_image + B] = dense
    return found


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
        max(total.logits, logits), total.names,
    )  # fmt: skip
