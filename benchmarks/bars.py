"""What the suite is held to: each bar once, and what limits the work where it is missed.

A benchmark hands the ``bar`` fixture a name of :data:`BARS`, what the case is and what was
measured. ``make bars`` runs the suite and writes ``docs/results/performance.md`` and ``.json``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

COMMANDS = {
    "lif": "make bench-neuron", "linear": "make bench-linear", "attention": "make bench-attention",
    "network": "make bench-model", "halting": "make bench-halting",
    "training": "make bench-training", "growth": "make bench-growth", "gpu": "make gpu-report",
}  # fmt: skip
SIGNS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Bar:
    """One number to reach.

    Attributes
    ----------
    work : str
        What is measured, and in terms of what.
    sign : {">=", "<="}
    value : float
    percent : bool
        Whether it is a share, written in per cent.
    limits : str
        What limits it where it is missed.
    """

    work: str
    sign: str
    value: float
    percent: bool = False
    limits: str = ""

    def met(self, measured: float) -> bool:
        return bool(SIGNS[self.sign](measured, self.value))

    def written(self, measured: float) -> str:
        return f"{100 * measured:.2f} %" if self.percent else f"{measured:.3f}"

    @property
    def text(self) -> str:
        return (
            f"{self.sign} {100 * self.value:g} %" if self.percent else f"{self.sign} {self.value:g}"
        )


ADDITIONS = (
    "additions: at a given rate of firing they are a given number, and the kernel does 0.6 to 0.9 "
    "of those it can do on weights in the first cache at 5 and 10 %, a quarter at 1 %, where a row "
    "has but four to fifteen; at higher rates it already shares sums (of limit, in the suite's "
    "table; docs/engine.md)"
)
COPY = (
    "memory: it moves bytes at the rate of a copy (bytes/clone 1.0 and more in the suite's table), "
    "and so, without AVX-512, does the peer; its times spread by a third in this run"
)
LAYER = (
    f"{ADDITIONS}; at two threads the smallest layer takes some tens of microseconds, of which the "
    "call is eleven"
)

BARS = {
    "lif_of_clone": Bar(
        "LIF forward: its time over that of a copy of the input", "<=", 1.15, limits=COPY
    ),
    "lif_compiled": Bar(
        "LIF forward: times as fast as SpikingJelly compiled", ">=", 1.2, limits=COPY
    ),
    "lif_training": Bar(
        "LIF forward + backward: times as fast as SpikingJelly compiled",
        ">=",
        2.0,
        limits="arithmetic: the backward evaluates an exponential and a division an element, 29 "
        "operations and a division a vector, while the peer's is bound by its own memory traffic",
    ),
    "lif_saved": Bar("LIF: bytes kept for the backward over those of the input", "<=", 1.0),
    "linear_dense": Bar(
        "spike linear + BatchNorm + LIF at 20, 30, 40 %: times as fast as PyTorch's product alone",
        ">=",
        2.0,
        limits=LAYER,
    ),
    "linear_ten": Bar(
        "spike linear + BatchNorm + LIF at 5, 10 %: times as fast as PyTorch's product alone",
        ">=",
        5.0,
        limits=LAYER,
    ),
    "linear_one": Bar(
        "spike linear + BatchNorm + LIF at 1 %: times as fast as PyTorch's product alone",
        ">=",
        12.0,
        limits=LAYER,
    ),
    "attention_dense": Bar(
        "spiking attention: times as fast as PyTorch's two products, the faster order",
        ">=",
        5.0,
        limits="on AVX-512 memory: it reads and writes float32 at 0.4 to 1.1 of a copy's rate, "
        "at which 5x cannot be reached; on AVX2 arithmetic, ours and the peer's: 0.5 to 0.7 of "
        "the FLOP/s of a large product, 0.2 to 0.5 of the bytes; not taken apart further",
    ),
    "attention_active": Bar(
        "spiking attention: share of time saved over share of tokens left out",
        ">=",
        0.95,
        limits="at 64 tokens what a call costs at any number, not taken apart; below 32 the "
        "products run in the other order, which has no tables yet",
    ),
    "network_five": Bar(
        "Spikformer-4-384, spikes 5 %, block inputs 15 %: times as fast as SpikingJelly compiled",
        ">=",
        8.0,
        limits=ADDITIONS,
    ),
    "network_five_eager": Bar(
        "Spikformer-4-384, spikes 5 %, block inputs 15 %: times as fast as SpikingJelly eager",
        ">=",
        15.0,
        limits=ADDITIONS,
    ),
    "network_ten": Bar(
        "Spikformer-4-384, spikes 10 %, block inputs 28 %: times as fast as SpikingJelly compiled",
        ">=",
        4.5,
        limits=ADDITIONS,
    ),
    "halting_realized": Bar(
        "halting: realized fraction of the blocks, synthetic patterns at equal firing rates",
        ">=",
        0.95,
    ),
    "halting_off": Bar(
        "halting on, nothing halts: time of blocks over halting off",
        "<=",
        1.02,
        limits="not the pieces that halting adds, 0.2 to 0.5 % by the engine's clock (next bar): "
        "in turns with two engines that do not halt it took 1.003 to 1.005 of the first, and the "
        "second of them up to 1.03",
    ),
    "halting_own": Bar(
        "halting and merging: their own cost as a share of block time",
        "<=",
        0.02,
        percent=True,
        limits="merging: a boundary matches the tokens of an image on one thread and turns bytes "
        "into floats, four times as many, which it then moves; halting alone is below",
    ),
    "training_realized": Bar(
        "training step, packed, 40 % of cells saved: realized fraction",
        ">=",
        0.9,
        limits="noise: the run spread by a fifth, and 0.97 and 1.00 were measured on AVX-512 "
        "(README.md beside this page)",
    ),
    "training_memory": Bar(
        "training step, packed, 40 % of cells saved: share of the blocks' activations saved over "
        "share of cells saved",
        ">=",
        0.95,
    ),
    "growth_attention": Bar(
        "spiking attention in tokens, 64 to 1024: fitted exponent of its time",
        "<=",
        1.1,
        limits="likely memory: 64 tokens read and write 1.6 MB, 1024 of them 25 MB, next to a last "
        "cache of 32 MB that neighbours share",
    ),
    "growth_cells": Bar("blocks in active cells: fitted exponent of their time", "<=", 1.1),
    "growth_memory": Bar("blocks in rows: fitted exponent of peak memory", "<=", 1.1),
    "gpu_spills": Bar(
        "Triton kernels compiled for the GPU that spill registers",
        "<=",
        0,
        limits="one launch, the gradient of spike-driven attention on packed float32 rows of 512 "
        "channels, keeps 8 bytes of registers in memory",
    ),
    "gpu_narrow": Bar("Triton kernels of float32 rows, widest access below 128 bits", "<=", 0),
}


def command(name: str) -> str:
    """What measures a bar alone."""
    return COMMANDS[name.split("_")[0]]


def on_threads(number: int) -> str:
    """What a case is called that runs on so many threads."""
    return f"{number} thread{'s' * (number > 1)}"


def row(name: str, case: str, measured: float) -> dict[str, object]:
    """A line of ``performance.json``."""
    bar = BARS[name]
    return {
        "row": f"{bar.work}; {case}", "measured": measured, "bar": bar.text,
        "met": bar.met(measured), "name": name,
    }  # fmt: skip
