"""The main job: what halting saves on a trained model and real images, counted and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import AtsnnError, check_integer
from .compare import compare_engine, compare_executions
from .cost import Cost, cost
from .data import Split
from .engine import Engine, freeze
from .measure import Timing, interleaved, machine, realized_fraction
from .nn.model import ATSpikformer
from .ops import available_backends, use_backend
from .train import evaluate

__all__ = ["GateFailed", "bench"]


class GateFailed(AtsnnError, AssertionError):
    """A result was wrong, so no timing of it is reported."""


def check_gate(model: ATSpikformer, images: Tensor) -> list[str]:
    """Compare the native backend with the reference, and packed with masked execution.

    Returns
    -------
    list of str
        What was found, one line a comparison.
    """
    found = []
    if model.config.adaptive:
        difference = compare_executions(model, images)
        if difference.flipped == 0 and difference.cells > 0:
            raise GateFailed(
                f"bench: expected packed execution to run the cells of the masked one where no "
                f"spike differs, got {difference.cells} others"
            )
        found.append(str(difference))
    if available_backends()["native"] is not True:
        return ["native kernels not built: the reference is timed", *found]
    with torch.no_grad():
        native = model(images, return_trace=True)  # each operation that has a native kernel
        with use_backend("reference"):
            reference = model(images, return_trace=True)
    for name in ("logits", "scores", "active", "depth"):
        ours, theirs = getattr(native, name), getattr(reference, name)
        if not torch.equal(ours, theirs):
            raise GateFailed(
                f"bench: expected the native backend to give the reference's {name} bit for bit, "
                f"got {int((ours != theirs).sum())} of {ours.numel()} different"
            )
    engine = engine_of(model)
    found.append(engine if isinstance(engine, str) else str(compare_engine(model, images)))
    return [
        f"native = reference bit for bit on {len(images)} images (logits, scores, depths)",
        *found,
    ]


def engine_of(model: ATSpikformer) -> Engine | str:
    """The model's engine, or why it has none."""
    try:
        return freeze(model)
    except AtsnnError as error:
        return f"no engine: {error}"


@torch.no_grad()
def bench(
    model: ATSpikformer,
    split: Split,
    *,
    controls: dict[str, ATSpikformer] | None = None,
    batches: Sequence[int] = (1, 32),
    rounds: int = 15,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Accuracy, executed cells, cost by part and latency of ``model``, halting off and on.

    Parameters
    ----------
    model : ATSpikformer
    split : Split
        Real images; all of them for accuracy and cells, the first ones for latency.
    controls : dict of str to ATSpikformer, optional
        Further models whose accuracy and cells stand beside those of ``model``.
    batches : sequence of int
        Batch sizes to time.
    rounds : int
        Interleaved rounds; medians are reported.
    log : callable
        Told what is being done.

    Returns
    -------
    dict
        Plain numbers, as ``atsnn bench --json`` writes them.
    """
    for size in batches:
        check_integer("bench", "batch", size, at_least=1, at_most=len(split))
    model = model.eval()
    plain = model.without_halting()
    log("checking the native kernels against the reference, packed against masked")
    gate = check_gate(model, split.images[:32])
    log(f"evaluating {len(split)} images")
    models = {"this model": model, "this model, halting off": plain, **(controls or {})}
    accuracy = {}
    for name, candidate in models.items():
        c = candidate.config
        accuracy[name] = evaluate(candidate, split).to_dict() | {
            "halting": c.halting, "score": c.score if c.halting else None, "merging": c.merging,
        }  # fmt: skip
    log("counting")
    # Counted on the images that are timed too, the largest batch.
    counted = cost(model, split.images[: max(batches)])
    latency = []
    for size in batches:
        log(f"timing batch {size}")
        latency.append(_latency(model, plain, split.images[:size], rounds))
    return {
        "machine": machine(),
        "execution": model.execution,
        "model": model.config.to_dict(),
        "gate": gate,
        "accuracy": accuracy,
        "cost_images": max(batches),
        "cost": counted.to_dict(),
        "latency": latency,
    }


def _latency(
    model: ATSpikformer, plain: ATSpikformer, images: Tensor, rounds: int
) -> dict[str, Any]:
    """Latency of the whole model, of the blocks alone and of the engine, halting off and on."""
    tokens = model.embed(images)
    work: dict[str, Callable[[], object]] = {
        "model off": lambda: plain(images),
        "model on": lambda: model(images),
        "blocks off": lambda: plain.forward_tokens(tokens),
        "blocks on": lambda: model.forward_tokens(tokens),
    }
    engines = engine_of(plain), engine_of(model)
    for name, engine in zip(("engine off", "engine on"), engines, strict=True):
        if isinstance(engine, Engine):
            work[name] = partial(engine, images)
    times = interleaved(work, rounds=rounds)
    counted = cost(model, images)
    dense = counted.dense
    assert dense is not None
    out: dict[str, Any] = {"batch": len(images)}
    for scope in ("blocks", "model", "engine"):
        if f"{scope} on" not in times:
            continue
        off, on = times[f"{scope} off"], times[f"{scope} on"]
        out[scope] = _compare(off, on, _flops(dense, scope), _flops(counted, scope))
    return out


def _flops(counted: Cost, scope: str) -> float:
    """FLOPs of the blocks (readout and head with them, as they are timed) or of everything."""
    total = counted.flops.total
    return total - counted.flops.stem if scope == "blocks" else total


def _compare(off: Timing, on: Timing, dense_flops: float, flops: float) -> dict[str, Any]:
    return {
        "off": off.to_dict(),
        "on": on.to_dict(),
        "latency_saved": 1 - on.median / off.median,
        "flops_saved": 1 - flops / dense_flops,
        "realized_fraction": realized_fraction(off.median, on.median, dense_flops, flops),
    }
