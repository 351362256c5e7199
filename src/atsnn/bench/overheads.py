"""What halting and merging cost themselves, taken apart, and from where on they pay."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch

from ..checks import BackendError, InvalidValue, check_integer
from ..engine import PIECES, Engine, engine_of
from ..measure import machine
from ..schedule import undirected
from .gate import check_gate
from .halting import Pattern, Pieces, measure_batch, read_clocks
from .subject import Subject, resized, with_changes

__all__ = ["OWN_PIECES", "TOKENS", "break_even", "measure_overheads"]

OWN_PIECES = PIECES[2:]
TOKENS = (16, 64, 196, 256)
SHARES = (0.0, 0.2, 0.4, 0.6)  # of cells halted, from which the break-even is told
MERGED = 8  # one pair of so many tokens merges at each boundary, where the model merges none


@torch.no_grad()
def measure_overheads(
    subject: Subject,
    *,
    halted: float = 0.4,
    batches: Sequence[int] = (1, 4, 16),
    tokens: Sequence[int] = TOKENS,
    rounds: int = 15,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The engine's time for scores, accumulators, readout, moves, matching and merging.

    Parameters
    ----------
    subject : Subject
        A model that merges no tokens is given merging, one pair of eight tokens at a boundary.
    halted : float
        Share of cells that halt, by a synthetic pattern.
    batches, tokens : sequence of int
        Batch sizes at the model's own number of tokens; numbers of tokens, squares, at the first
        batch size. Blocks are told at the first batch size.
    rounds : int
        Interleaved rounds.

    Returns
    -------
    dict
        ``rows``: seconds of each piece and its share of block time, by batch without merging
        (``alone``), then with it by batch, by block and by tokens. ``break_even``: for each batch
        and backend the cost with nothing halted, and the share of halted cells from which halting
        pays (without merging).
    """
    for size in batches:
        check_integer("bench", "batch", size, at_least=1)
    for number in tokens:
        if number < 1 or isqrt(number) ** 2 != number:
            raise InvalidValue(f"bench: tokens must be squares, got {number}")
    c = subject.model.config
    pattern = Pattern(halted)
    rows = []
    first = batches[0]
    log("checking the native kernels against the reference, packed against masked")
    gate = check_gate(subject.model, subject.images(min(first, 2)))
    for size in batches:
        log(f"taking apart batch {size}, halting alone")
        rows.append(_row("alone", size, *_pieces(subject, size, pattern, rounds, False), size,
                         c.grid**2))  # fmt: skip
    for size in batches:
        log(f"taking apart batch {size}")
        blocks, off = _pieces(subject, size, pattern, rounds)
        rows.append(_row("batch", size, blocks, off, size, c.grid**2))
        if size == first:
            rows += [
                _row("block", number, [block], [plain], size, c.grid**2)
                for number, (block, plain) in enumerate(zip(blocks, off, strict=True), 1)
            ]
    for number in tokens:
        log(f"taking apart {number} tokens")
        one = subject if number == c.grid**2 else resized(subject, isqrt(number) * c.patch)
        rows.append(_row("tokens", number, *_pieces(one, first, pattern, rounds), first, number))
    even = []
    for size in batches:
        log(f"looking for the break-even of batch {size}")
        even += _break_evens(subject, size, rounds)
    return {
        "machine": machine(), "gate": gate, "rounds": rounds, "halted": halted,
        "rows": rows, "break_even": even,
        "merges": subject.model.config.merging, "model": c.to_dict(),
        "subject": {"title": subject.title, "trained": subject.trained, "rates": subject.rates},
    }  # fmt: skip


def _pieces(
    subject: Subject, B: int, pattern: Pattern, rounds: int, merging: bool = True
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Seconds of each block's pieces, with halting and merging and without."""
    model = subject.model
    if not merging:
        model = with_changes(model, merge_r=0, merge_threshold=None)
    elif not model.config.merging:
        model = with_changes(model, merge_r=max(1, model.config.grid**2 // MERGED))
    images = subject.images(B)
    engines = [engine_of(one) for one in (undirected(model), model.without_halting())]
    clocks = []
    for engine, given in zip(engines, (pattern.scores(model, images), None), strict=True):
        if not isinstance(engine, Engine):
            raise BackendError(f"bench: overheads are told by the engine's clock, but {engine}")
        clocks.append(Pieces(engine, images, given))
    read_clocks({"on": clocks[0], "off": clocks[1]}, rounds)
    return clocks[0].blocks, clocks[1].blocks


def _row(
    axis: str, at: int, blocks: list[dict[str, float]], off: list[dict[str, float]], B: int, N: int
) -> dict[str, Any]:
    seconds = {k: sum(block[k] for block in blocks) for k in blocks[0]}
    total = sum(seconds.values())
    # The readout is there without halting too, after the last block: of one block it is not told.
    own = sum(seconds[k] - sum(block[k] for block in off) for k in OWN_PIECES) / total
    return {
        "axis": axis, "at": at, "batch": B, "tokens": N, "block_s": total, "seconds": seconds,
        "shares": {k: seconds[k] / total for k in OWN_PIECES},
        "own": None if axis == "block" else own,
        "off_s": sum(sum(block.values()) for block in off),
    }  # fmt: skip


def _break_evens(subject: Subject, B: int, rounds: int) -> list[dict[str, Any]]:
    c = subject.model.config
    shares = [s for s in SHARES if s <= 1 - 1 / c.depth]
    patterns = [Pattern(s) for s in shares]
    one = measure_batch(subject, B, patterns, ("engine", "native"), rounds)
    found = []
    for backend in ("engine", "native"):
        rows = [row["blocks"] for row in one["latency"] if row["backend"] == backend]
        if rows:
            times = [row["on"]["median_s"] / row["off"]["median_s"] for row in rows]
            saved = [row["flops_saved"] for row in rows]
            found.append(
                {"batch": B, "backend": backend, "nothing_halted": times[0],
                 "saved": saved, "times": times, "break_even": break_even(saved, times)}
            )  # fmt: skip
    return found


def break_even(saved: Sequence[float], times: Sequence[float]) -> float | None:
    """The share of work saved from which halting pays.

    The line of least squares through the times, told in those of halting off, over the shares
    saved; where it reaches 1. None where time does not fall.

    Parameters
    ----------
    saved, times : sequence of float
        Two or more measurements.
    """
    slope, start = statistics.linear_regression(saved, times)
    return None if slope >= 0 else max(0.0, (1 - start) / slope)
