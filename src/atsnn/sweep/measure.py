"""What is measured of a model at a point of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cost import Cost, cost
from ..data import Split
from ..engine import Engine, engine_of
from ..measure import interleaved
from ..nn.model import ATSpikformer
from ..schedule import policy_scores, undirected
from ..train import evaluate

__all__ = ["COST_IMAGES", "counted", "timed"]

COST_IMAGES = 64  # over which FLOPs and the like are averaged


def counted(model: ATSpikformer, split: Split) -> dict[str, Any]:
    """Accuracy and executed cells on a split; FLOPs, SOPs and energy an image, and their shares.

    ``flops``, ``sops`` and ``energy_uj`` are means over the first images, of what is timed: the
    engine's pass where the model has an engine; ``flops_share`` and the like are of what the same
    weights cost with nothing halted and nothing merged.
    """
    row: dict[str, Any] = evaluate(model, split).to_dict()
    images = split[:COST_IMAGES].images
    found, whole = _costs(model.eval(), images)
    for name, unit in (("flops", 1.0), ("sops", 1.0), ("energy_pj", 1e-6)):
        here, dense = getattr(found, name).total, getattr(whole, name).total
        kind = name.replace("_pj", "_uj")
        row[kind] = here * unit / len(images)
        # Without a spike anywhere there are no operations to have a share of.
        row[f"{kind.removesuffix('_uj')}_share"] = here / dense if dense else None
    return row


def _costs(model: ATSpikformer, images: Tensor) -> tuple[Cost, Cost]:
    """Of a model, and of its weights with nothing halted and nothing merged."""
    engine, plain = engine_of(undirected(model)), engine_of(model.without_halting())
    if isinstance(engine, str) or isinstance(plain, str):
        found = cost(model, images)
        assert found.dense is not None
        return found, found.dense
    return engine.trace(images, scores=policy_scores(model, images)).cost, plain.trace(images).cost


def timed(
    models: Mapping[str, ATSpikformer], images: Tensor, batches: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each model, by batch size, all of them timed in turns.

    The engine computes. A model that it does not take is not timed, as another form of computing
    says nothing about the method; if it takes none, the modules compute. Each call covers all of
    ``images``, in batches.
    """
    engines = {name: engine_of(undirected(model).eval()) for name, model in models.items()}
    some = {name: engine for name, engine in engines.items() if isinstance(engine, Engine)}
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in batches:
        parts = images.split(size)
        calls = {
            name: _call(model, some.get(name), parts)
            for name, model in models.items()
            if name in some or not some
        }
        for name, timing in interleaved(calls, rounds=rounds, warmup=1).items():
            found[name][str(size)] = 1e3 * timing.median / len(images)
    return found


def _call(
    model: ATSpikformer, engine: Engine | None, parts: Sequence[Tensor]
) -> Callable[[], None]:
    if engine is None:
        return _run(lambda x, scores: model(x), [(part, None) for part in parts])
    given = [(part, policy_scores(model, part)) for part in parts]
    return _run(lambda x, scores: engine(x, scores=scores), given)


def _run(
    function: Callable[[Tensor, Tensor | None], object],
    inputs: Sequence[tuple[Tensor, Tensor | None]],
) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        for x, scores in inputs:
            function(x, scores)

    return call
