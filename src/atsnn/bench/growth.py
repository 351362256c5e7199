"""How cost grows with tokens, timesteps, batch, channels, depth and the share of active cells."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..checks import BackendError, InvalidValue, check_choice
from ..engine import Engine, engine_of
from ..measure import machine
from ..nn.config import SpikformerConfig
from .halting import Pattern, Pieces, read_clocks
from .subject import RATES, of_config

__all__ = ["AXES", "Fit", "fit", "measure_growth", "peak_memory"]

AXES: dict[str, tuple[float, ...]] = {
    "tokens": (16, 64, 196, 256, 576, 1024),
    "timesteps": (1, 2, 4, 8, 16, 32),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "channels": (64, 128, 256, 384, 512, 768),
    "depth": (1, 2, 4, 8, 12),
    "active": (0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
}
PARTS = ("model", "blocks", "attention", "mlp")  # what the engine's clock tells
OPERATOR = "attention operator"  # q k^T v alone, on floats
MEMORY = "peak memory"


@dataclass(frozen=True)
class Fit:
    """``cost = scale * x ** exponent``, by least squares of the logarithms.

    Attributes
    ----------
    exponent, scale : float
    r2 : float
        Share of the variance of the logarithms that it explains.
    """

    exponent: float
    scale: float
    r2: float


def fit(x: Sequence[float], cost: Sequence[float]) -> Fit:
    """Fit a power law to two or more points, all above zero."""
    u, v = [math.log(value) for value in x], [math.log(value) for value in cost]
    slope, start = statistics.linear_regression(u, v)
    mean = statistics.fmean(v)
    off = sum((b - slope * a - start) ** 2 for a, b in zip(u, v, strict=True))
    spread = sum((b - mean) ** 2 for b in v)
    return Fit(slope, math.exp(start), 1 - off / spread if spread else 1.0)


@dataclass(frozen=True)
class _Point:
    """One network of an axis, ready to run."""

    at: float
    engine: Engine
    images: Tensor
    scores: Tensor | None
    config: SpikformerConfig


def measure_growth(
    name: str,
    config: SpikformerConfig,
    axes: Sequence[str] = tuple(AXES),
    *,
    rates: tuple[float, float] = RATES,
    batch: int = 1,
    values: Mapping[str, Sequence[float]] = AXES,
    rounds: int = 11,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the engine along each axis, everything else as in ``config``.

    Every network is made to fire at the same rates, as the engine's time follows spikes. The points
    of an axis are timed in turns.

    Parameters
    ----------
    name : str
        What the configuration is called.
    config : SpikformerConfig
    axes : sequence of str
        Of ``AXES``.
    rates : tuple of float
        Firing rates, of spikes and of what goes into blocks.
    batch : int
        Images, but on the axis ``batch``.
    values : mapping of str to sequence
        The points of each axis.
    rounds : int

    Returns
    -------
    dict
        ``axes``: a list with the points of each axis (seconds by part, FLOPs, SOPs, rows, peak
        memory in bytes) and the fits.
    """
    # Every token runs the first block, so no smaller share is active.
    least = 1 / config.depth
    values = dict(values)
    if "active" in values:
        values["active"] = sorted({max(share, least) for share in values["active"]})
    for axis in axes:
        check_choice("bench", "--growth", axis, AXES)
        if len(set(values[axis])) < 2:
            raise InvalidValue(
                f"bench: growth with {axis} needs two or more points, got {list(values[axis])}"
            )
    found = []
    for axis in axes:
        points = []
        for at in values[axis]:
            log(f"{axis} {at:g}")
            points.append(_point(axis, at, name, config, rates, batch))
        log(f"{axis}: timing")
        found.append(_measure(axis, points, rates, rounds))
    return {
        "machine": machine(), "subject": {"title": _title(name, rates)}, "batch": batch,
        "model": config.to_dict(), "axes": found,
    }  # fmt: skip


def _title(name: str, rates: tuple[float, float]) -> str:
    return f"{name}, spikes {100 * rates[0]:g} %, block inputs {100 * rates[1]:g} %"


def _point(
    axis: str, at: float, name: str, config: SpikformerConfig, rates: tuple[float, float], B: int
) -> _Point:
    changes: dict[str, Any] = {}
    if axis == "tokens":
        changes = {"image_size": isqrt(int(at)) * config.patch}
    elif axis == "timesteps":
        changes = {"T": int(at)}
    elif axis == "channels":
        # Heads keep their width.
        wide = config.embed_dim // config.num_heads
        changes = {"embed_dim": int(at), "num_heads": max(1, int(at) // wide)}
    elif axis == "depth":
        changes = {"depth": int(at)}
    c = config.replace(merge_r=0, merge_threshold=None, halting="rectangle", **changes)
    subject = of_config(name, c, rates)
    B = int(at) if axis == "batch" else B
    halts = axis == "active"
    engine = engine_of(subject.model if halts else subject.model.without_halting())
    if not isinstance(engine, Engine):
        raise BackendError(f"bench: growth is told by the engine's clock, but {engine}")
    images = subject.images(B)
    scores = Pattern(1 - at).scores(subject.model, images) if halts else None
    return _Point(at, engine, images, scores, c)


def _measure(
    axis: str, points: list[_Point], rates: tuple[float, float], rounds: int
) -> dict[str, Any]:
    memory = [
        peak_memory(partial(p.engine, p.images, scores=p.scores)) for p in points
    ]  # of the first call, in which the engine reserves what it needs
    clocks = [Pieces(p.engine, p.images, p.scores) for p in points]
    work: dict[str, Callable[[], object]] = {}
    if axis == "tokens":
        work = {f"{OPERATOR} {i}": _operator(p, rates[0]) for i, p in enumerate(points)}
    times = read_clocks({str(i): c for i, c in enumerate(clocks)}, rounds, work)
    rows: list[dict[str, Any]] = []
    for i, (p, clock) in enumerate(zip(points, clocks, strict=True)):
        parts = clock.parts
        total = sum(parts.values())
        seconds = {"model": total, "blocks": total - parts["stem"] - parts["head"],
                   "attention": parts["attention"], "mlp": parts["mlp"]}  # fmt: skip
        if axis == "tokens":
            seconds[OPERATOR] = times[f"{OPERATOR} {i}"].median
        cost = clock.traces[0].cost
        rows.append(
            {"at": p.at, "seconds": seconds, "spread": times[str(i)].spread,
             "flops": cost.flops.total, "sops": cost.sops.total, "rows": sum(clock.traces[0].rows),
             "peak_memory": memory[i], "image_size": p.config.image_size}
        )  # fmt: skip
    # Cells that ran stand for the share asked for, which a pattern meets nearly.
    x = [row["rows"] if axis == "active" else row["at"] for row in rows]
    costs = {part: [row["seconds"][part] for row in rows] for part in rows[0]["seconds"]}
    costs |= {q: [row[q] for row in rows] for q in ("flops", "sops")}
    if all(memory):
        costs[MEMORY] = [float(m or 0) for m in memory]
    fits = {name: vars(fit(x, cost)) for name, cost in costs.items()}
    # Without the small ones, whose fixed costs bend the line.
    late = {name: vars(fit(x[1:], cost[1:])) for name, cost in costs.items() if len(x) > 2}
    return {"axis": axis, "points": rows, "x": x, "fits": fits, "late_fits": late}


def _operator(p: _Point, rate: float) -> Callable[[], Tensor]:
    c = p.config
    generator = torch.Generator().manual_seed(0)
    shape = (c.T, len(p.images), c.grid**2, c.embed_dim)
    q, k, v = ((torch.rand(shape, generator=generator) < rate).float() for _ in range(3))

    def run() -> Tensor:
        with torch.no_grad():
            return F.spiking_attention(q, k, v, num_heads=c.num_heads)

    return run


def peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes by which the process was larger, at most, while ``function`` ran.

    Resident memory as Linux tells it, after free memory was given back; None elsewhere.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")
        before = _resident(status, "VmRSS")
        function()
        return max(0, _resident(status, "VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(status: Path, what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{status}: expected a line {what}, got none")
    return 1024 * int(found[1])
