"""Timing: interleaved, warm, medians; realized fraction."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_integer
from .ops import native_level

__all__ = [
    "Timing",
    "interleaved",
    "kept_bytes",
    "machine",
    "realized_fraction",
    "threads",
    "version",
]


LONG = 0.5  # seconds


def kept_bytes(function: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps of what ``function`` computes, for its backward.

    Each storage counts once, those of ``parameters`` do not.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no address comes twice.
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # the graph lives until the end
    del result
    return sum(storage.nbytes() for at, storage in held.items() if at not in own)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round.

    Attributes
    ----------
    seconds : tuple of float
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def to_dict(self) -> dict[str, float | int]:
        return {"median_s": self.median, "spread": self.spread, "rounds": len(self.seconds)}


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 3,
    least_seconds: float = 2e-3,
    wait: Callable[[], object] | None = None,
    taken: Callable[[str, Any], object] | None = None,
) -> dict[str, Timing]:
    """Time functions in turns (A B C A B C ...), so that a noisy neighbour meets them all.

    Each turn begins with one call that is not timed, so that every function is timed warm; but for
    those of ``LONG`` seconds, whose own beginning is too short a part of them to tell.

    Parameters
    ----------
    functions : mapping of str to callable
    rounds : int
        Timed rounds; each gives one value a function.
    warmup : int
        Rounds before, not timed.
    least_seconds : float
        A value is the mean of as many calls as take about this long.
    wait : callable, optional
        Called before a clock is read: ``torch.cuda.synchronize`` where work is queued for a GPU.
    taken : callable, optional
        Called once a turn, off the clock, with the name of the function and what its last timed
        call returned.
    """
    wait = wait or (lambda: None)
    check_integer("interleaved", "rounds", rounds, at_least=1)
    check_integer("interleaved", "warmup", warmup, at_least=1)
    once, calls = {}, {}
    for name, function in functions.items():
        for _ in range(warmup):
            wait()
            start = time.perf_counter()
            function()
            wait()
            once[name] = time.perf_counter() - start
        calls[name] = max(1, round(least_seconds / max(once[name], 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            # Untimed: the caches and the allocator are as the other function left them.
            if once[name] < LONG:
                function()
            wait()
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = function()
            wait()
            seconds[name].append((time.perf_counter() - start) / calls[name])
            if taken is not None:
                taken(name, result)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def realized_fraction(
    before_s: float, after_s: float, before_flops: float, after_flops: float
) -> float | None:
    """Share of latency saved over share of FLOPs saved; None where no FLOPs were saved."""
    saved = 1 - after_flops / before_flops
    return None if saved <= 0 else (1 - after_s / before_s) / saved


@contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Run with ``number`` threads (None: as many as now), and restore them."""
    now = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(
            check_integer("threads", "--threads", number, at_least=1, at_most=1024)
        )
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(now)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What was measured on: processor, cores, threads, instruction set, versions."""
    import os

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": native_level() or "none",
        "pytorch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "atsnn": metadata.version("atsnn"),
        "triton": version("triton"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
