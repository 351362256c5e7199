"""What halting saves: counted, and timed off against on, backend by backend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checks import InvalidValue
from ..cost import Cost, cost
from ..engine import Engine, EngineTrace, engine_of
from ..measure import Timing, interleaved, realized_fraction
from ..nn.model import ATSpikformer
from ..ops import use_backend
from ..schedule import policy_scores, scheduled, synthetic_depths, synthetic_scores, undirected
from .subject import Subject

__all__ = ["BACKENDS", "OWN", "Pattern", "Pieces", "measure_batch", "patterns_of", "read_clocks"]

BACKENDS = ("engine", "native", "reference")
OWN = "its own scores"


@dataclass(frozen=True)
class Pattern:
    """Which cells halt: those the model halts itself, or a share by a synthetic pattern."""

    halted: float | None = None

    @property
    def name(self) -> str:
        return OWN if self.halted is None else f"{100 * self.halted:g} %"

    def scores(self, model: ATSpikformer, images: Tensor) -> Tensor | None:
        """``[L, T, B, N]`` scores to go by; None: the model's own."""
        if self.halted is None:
            return policy_scores(model, images)
        c = model.config
        shape = (c.depth, c.T, len(images), c.grid**2)
        if self.halted == 0:
            return torch.zeros(shape)
        # Rounded, it may lie just below the least share there is.
        share = max(1 - self.halted, 1 / c.depth)
        return synthetic_scores(synthetic_depths(*shape, share), c.depth)


def patterns_of(subject: Subject, halted: Sequence[float]) -> list[Pattern]:
    """Synthetic patterns at the shares asked for; without any, what the model itself halts."""
    c = subject.model.config
    most = 1 - 1 / c.depth
    for share in halted:
        if not 0 <= share <= most:
            raise InvalidValue(
                f"bench: --halted must lie in 0 .. 1 - 1 / depth = {most:.3g}, as every token runs "
                f"the first block, got {share}"
            )
    if halted and c.halting not in ("rectangle", "depth"):
        raise InvalidValue(
            f"bench: --halted needs a model that halts by 'rectangle' or 'depth', got halting = "
            f"{c.halting!r}"
        )
    return [Pattern(share) for share in halted] or [Pattern()]


class Pieces:
    """An engine's own clock: seconds by part, medians over the timed turns."""

    def __init__(self, engine: Engine, images: Tensor, scores: Tensor | None) -> None:
        self.run = partial(engine.trace, images, scores=scores)
        self.traces: list[EngineTrace] = []

    @property
    def parts(self) -> dict[str, float]:
        calls = [dict(trace.seconds) for trace in self.traces]
        return {k: statistics.median(call[k] for call in calls) for k in calls[0]}

    @property
    def blocks(self) -> list[dict[str, float]]:
        """The same for each block, halting and merging taken apart."""
        return [
            {k: statistics.median(b[k] for b in calls) for k in calls[0]}
            for calls in zip(*(trace.block_seconds for trace in self.traces), strict=True)
        ]

    @property
    def timing(self) -> Timing:
        """From the first block to the logits, as the modules are timed."""
        return Timing(tuple(trace.seconds.total - trace.seconds.stem for trace in self.traces))


def read_clocks(
    clocks: Mapping[str, Pieces],
    rounds: int,
    work: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time engines, whose clocks keep what they said, in turns with other ``work``."""

    def taken(name: str, trace: Any) -> None:
        if name in clocks:
            clocks[name].traces.append(trace)

    runs = {name: clock.run for name, clock in clocks.items()}
    return interleaved({**(work or {}), **runs}, rounds=rounds, taken=taken)


@torch.no_grad()
def measure_batch(
    subject: Subject,
    B: int,
    patterns: Sequence[Pattern],
    backends: Sequence[str],
    rounds: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time one batch, every pattern on every backend, against the same network without halting.

    Returns
    -------
    dict
        ``patterns``: what each executes and costs; ``latency``: a row a pattern and backend;
        ``breakdown``: the engine's time by part; ``off``: the costs with nothing halted.
    """
    model, images = subject.model, subject.images(B)
    plain = model.without_halting()
    scores = {p: p.scores(model, images) for p in patterns}
    engines = (engine_of(plain), engine_of(undirected(model))) if "engine" in backends else ("", "")
    off, on = _counted(plain, model, images, scores, engines)
    work: dict[str, Callable[[], object]] = {}
    clocks: dict[str, Pieces] = {}
    for backend in backends:
        log(f"batch {B}: {backend}")
        if backend == "engine":
            if not isinstance(engines[0], Engine) or not isinstance(engines[1], Engine):
                continue
            clocks["off"] = Pieces(engines[0], images, None)
            work["engine model off"] = partial(engines[0], images)
            for p, given in scores.items():
                clocks[p.name] = Pieces(engines[1], images, given)
                work[f"engine model {p.name}"] = partial(engines[1], images, scores=given)
        else:
            work |= dict(_modules(backend, plain, model, images, scores))
    log(f"batch {B}: timing")
    times = read_clocks(clocks, rounds, work)
    for name, clock in clocks.items():
        times[f"engine blocks {name}"] = clock.timing
    latency = []
    for p in patterns:
        for backend in backends:
            if f"{backend} model off" in times:
                row = {"batch": B, "halted": p.name, "backend": backend}
                for scope in ("blocks", "model"):
                    pair = times[f"{backend} {scope} off"], times[f"{backend} {scope} {p.name}"]
                    row[scope] = _compare(*pair, off, on[p], scope)
                latency.append(row)
    return {
        "latency": latency,
        "breakdown": [
            {"batch": B, "halted": name, "seconds": clock.parts} for name, clock in clocks.items()
        ],
        "patterns": {p.name: on[p] for p in patterns},
        "off": off,
    }


def _counted(
    plain: ATSpikformer, model: ATSpikformer, images: Tensor, scores: dict[Pattern, Tensor | None],
    engines: tuple[Engine | str, Engine | str],
) -> tuple[Cost, dict[Pattern, Cost]]:  # fmt: skip
    """Costs with nothing halted and of each pattern; the engine counts many times faster."""
    if isinstance(engines[0], Engine) and isinstance(engines[1], Engine):
        off = engines[0].trace(images).cost
        on = {p: engines[1].trace(images, scores=given).cost for p, given in scores.items()}
    else:
        off = cost(plain, images)
        on = {p: cost(_going_by(model, given), images) for p, given in scores.items()}
    for found in on.values():
        found.dense = off
    return off, on


def _going_by(model: ATSpikformer, scores: Tensor | None) -> ATSpikformer:
    return model if scores is None else scheduled(model, scores)


def _modules(
    backend: str, plain: ATSpikformer, model: ATSpikformer, images: Tensor,
    scores: dict[Pattern, Tensor | None],
) -> Iterator[tuple[str, Callable[[], object]]]:  # fmt: skip
    """The model's modules, whole and from the blocks on, computed by a backend."""

    def served(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with nullcontext() if backend == "native" else use_backend(backend):
                return function()

        return run

    tokens = model.embed(images)
    models = {"off": plain} | {p.name: _going_by(model, given) for p, given in scores.items()}
    for name, one in models.items():
        yield f"{backend} model {name}", served(partial(one, images))
        yield f"{backend} blocks {name}", served(partial(one.forward_tokens, tokens))


def of_scope(found: Cost, quantity: str, scope: str) -> float:
    """Of the blocks (readout and head with them, as they are timed) or of everything."""
    parts = getattr(found, quantity)
    return parts.total - parts.stem if scope == "blocks" else parts.total


def _compare(off: Timing, on: Timing, dense: Cost, cost: Cost, scope: str) -> dict[str, Any]:
    flops = of_scope(dense, "flops", scope), of_scope(cost, "flops", scope)
    return {
        "off": off.to_dict(),
        "on": on.to_dict(),
        "latency_saved": 1 - on.median / off.median,
        "flops_saved": 1 - flops[1] / flops[0],
        "sops_saved": 1 - of_scope(cost, "sops", scope) / max(of_scope(dense, "sops", scope), 1),
        "realized_fraction": realized_fraction(off.median, on.median, *flops),
    }
