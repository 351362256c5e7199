"""What is measured of a model at a point of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cost import cost
from ..data import Split
from ..engine import Engine, freeze
from ..measure import interleaved
from ..nn.model import ATSpikformer
from ..schedule import is_directed
from ..train import evaluate

__all__ = ["COST_IMAGES", "counted", "timed"]

COST_IMAGES = 64  # over which FLOPs and the like are averaged


def counted(model: ATSpikformer, split: Split) -> dict[str, Any]:
    """Accuracy and executed cells on a split; FLOPs, SOPs and energy an image, and their shares.

    ``flops``, ``sops`` and ``energy_uj`` are means over the first images; ``flops_share`` and the
    like are of what the same weights cost with nothing halted and nothing merged.
    """
    row: dict[str, Any] = evaluate(model, split).to_dict()
    images = split[:COST_IMAGES].images
    found = cost(model, images)
    assert found.dense is not None
    for name, unit in (("flops", 1.0), ("sops", 1.0), ("energy_pj", 1e-6)):
        here, dense = getattr(found, name).total, getattr(found.dense, name).total
        kind = name.replace("_pj", "_uj")
        row[kind] = here * unit / len(images)
        # Without a spike anywhere there are no operations to have a share of.
        row[f"{kind.removesuffix('_uj')}_share"] = here / dense if dense else None
    return row


def timed(
    models: Mapping[str, ATSpikformer], images: Tensor, batches: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each model, by batch size, all of them timed in turns.

    The engine computes where it can, the modules do elsewhere; each call covers all of ``images``,
    in batches.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in batches:
        calls = {name: _call(model, images.split(size)) for name, model in models.items()}
        for name, timing in interleaved(calls, rounds=rounds, warmup=1).items():
            found[name][str(size)] = 1e3 * timing.median / len(images)
    return found


def _call(model: ATSpikformer, parts: Sequence[Tensor]) -> Callable[[], None]:
    model.eval()
    if model.config.task != "classes":
        return _run(lambda x, scores: model(x), [(part, None) for part in parts])
    engine: Engine = freeze(model)
    given: list[tuple[Tensor, Tensor | None]] = [(part, None) for part in parts]
    if is_directed(model):
        # The engine knows no policy: it is told which scores the policy gave.
        with torch.no_grad():
            given = [(part, model(part, return_trace=True).scores) for part in parts]
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
