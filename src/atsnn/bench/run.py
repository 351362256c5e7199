"""The main job: accuracy, cells, cost by part and latency, halting off and on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checks import check_choice, check_integer
from ..cost import PJ_PER_MAC, PJ_PER_SOP
from ..measure import machine
from ..schedule import score_of
from ..train import evaluate
from .gate import check_gate
from .halting import BACKENDS, measure_batch, patterns_of
from .subject import Subject

__all__ = ["bench"]

GATE_IMAGES = 32  # of real ones; an untrained network is checked on as many as are timed, to 2

ENERGY = (
    f"Energy: {PJ_PER_MAC} pJ a multiply-accumulate where the input is not spikes, {PJ_PER_SOP} pJ "
    "a synaptic operation elsewhere (45 nm, Horowitz 2014); memory, neurons and normalization are "
    "not counted. An estimate for neuromorphic hardware, not of this machine."
)


@torch.no_grad()
def bench(
    subject: Subject,
    *,
    halted: Sequence[float] = (),
    batches: Sequence[int] = (1, 32),
    backends: Sequence[str] = ("engine", "native"),
    rounds: int = 15,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """What halting saves of a subject.

    Parameters
    ----------
    subject : Subject
    halted : sequence of float
        Shares of cells that halt by synthetic patterns; empty: by the model's own scores.
    batches : sequence of int
        Batch sizes to time.
    backends : sequence of str
        Of ``BACKENDS``: who computes.
    rounds : int
        Interleaved rounds; medians are reported.
    log : callable
        Told what is being done, once a step; :func:`steps` says how many there are.

    Returns
    -------
    dict
        Plain numbers, as ``atsnn bench --json`` writes them.
    """
    for size in batches:
        check_integer("bench", "batch", size, at_least=1)
        subject.images(size)  # as many there are
    check_integer("bench", "rounds", rounds, at_least=1)
    for backend in backends:
        check_choice("bench", "--backends", backend, BACKENDS)
    patterns = patterns_of(subject, halted)
    model = subject.model
    most = max(batches)
    log("checking the native kernels against the reference, packed against masked")
    split = subject.split
    shown = subject.images(min(most, 2)) if split is None else split.images[:GATE_IMAGES]
    gate = check_gate(model, shown)
    found: dict[str, Any] = {
        "machine": machine(),
        "subject": {"title": subject.title, "trained": subject.trained, "rates": subject.rates},
        "execution": model.execution,
        "model": model.config.to_dict(),
        "gate": gate,
        "accuracy": _accuracy(subject, log),
        "energy_assumptions": ENERGY,
        "latency": [],
        "breakdown": [],
        "rounds": rounds,
    }
    for size in batches:
        one = measure_batch(subject, size, patterns, backends, rounds, log)
        found["latency"] += one["latency"]
        found["breakdown"] += one["breakdown"]
        if size == most:
            # Counted on the images that are timed, the largest batch.
            found["cost_images"] = size
            found["patterns"] = {name: cost.to_dict() for name, cost in one["patterns"].items()}
    return found


def steps(batches: Sequence[int], backends: Sequence[str], trained: bool) -> int:
    """How often :func:`bench` will say what it does."""
    return 1 + trained + len(batches) * (len(backends) + 1)


def _accuracy(subject: Subject, log: Callable[[str], None]) -> dict[str, Any]:
    if subject.split is None:
        return {}
    log(f"evaluating {len(subject.split)} images")
    plain = subject.model.without_halting()
    models = {"this model": subject.model, "this model, halting off": plain, **subject.controls}
    found = {}
    for name, candidate in models.items():
        c = candidate.config
        found[name] = evaluate(candidate, subject.split).to_dict() | {
            "halting": c.halting, "score": score_of(candidate), "merging": c.merging,
        }  # fmt: skip
    return found
