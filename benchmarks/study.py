"""Does halting pay? The runs behind docs/results/study.md.

    python benchmarks/study.py --list                  every part, its runs and their time
    python benchmarks/study.py fashion --seeds 0 1     train and test; goes on where it stopped
    python benchmarks/study.py fashion --latency       time the trained models, on a quiet machine

A part trains a plain Spikformer from scratch and goes on from its weights with every method, the
plain one too, so that all have had the same epochs, images and seeds. What is compared is thus the
method and not the luck of a start. Results are rows of docs/results/study/PART-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atsnn import SpikformerConfig, data
from atsnn.measure import machine
from atsnn.sweep import Point, load_run, sweep
from atsnn.sweep.measure import timed
from atsnn.train import TrainConfig
from atsnn.train.settings import with_settings

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "study"
FIRST = "pretrained"  # the plain network that the others go on from

PLAIN = {"halting": None}
HALTING = {"halting": "rectangle"}


@dataclass(frozen=True)
class Part:
    """One task with its methods.

    Attributes
    ----------
    about : str
    base : TrainConfig
        Of the first phase: a plain network from scratch.
    second : dict
        Settings of the second phase, in which methods go on from it.
    methods : dict
        By label the settings that differ in the second phase.
    alone : dict
        By label the settings of networks of their own, trained from scratch for as many epochs as
        both phases have.
    seeds : int
        How many the study runs; ``more`` of them for the methods named in ``headline``.
    """

    about: str
    base: TrainConfig
    second: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    headline: tuple[str, ...] = ()
    more: int = 0

    def points(self, seed: int, runs: Path) -> tuple[Point, list[Point]]:
        """The first phase's run and those of all methods, for a seed."""
        base = with_settings(self.base, {"seed": seed, "target": None})
        first = Point(FIRST, config=base)
        init = str(runs / first.key)
        found = [
            Point(label, config=with_settings(base, {**self.second, "init": init, **changes}))
            for label, changes in self.methods.items()
            if seed < self.seeds or label in self.headline
        ]
        epochs = self.base.epochs + self.second["epochs"]
        found += [
            Point(label, config=with_settings(base, {"epochs": epochs, **changes}))
            for label, changes in self.alone.items()
            if seed < self.seeds
        ]
        return first, found


def _fashion() -> Part:
    model = SpikformerConfig(image_size=28, in_channels=1, embed_dim=48, num_heads=3)
    base = TrainConfig(
        model, data="fashion-mnist", validation=5000, epochs=4, lr=0.01, flip=True,
        precision="bf16", target=None
    )
    halting = {**HALTING, "target": 0.55}
    return Part(
        "Fashion-MNIST, 55,000 training images, 28x28, 49 tokens",
        base, {"epochs": 2, "lr": 0.005, "warmup": 0.1},
        {
            "plain": PLAIN,
            "halting": halting,
            "static 4,3,1,1": {"halting": "depth", "policy": "static:4,3,1,1"},
            "static 3,3,2,1": {"halting": "depth", "policy": "static:3,3,2,1"},
            "static 3,2,2,2": {"halting": "depth", "policy": "static:3,2,2,2"},
            "halting, 40 %": {**HALTING, "target": 0.4},
            "halting + merging": {**halting, "target": 0.5, "merge_r": 4},
            "merging": {**PLAIN, "merge_r": 8},
            "merging, random pairs": {**PLAIN, "merge_r": 8, "merge_match": "random"},
            "halting, depth (A-ViT at each t)": {**halting, "halting": "depth"},
            "halting, sequential": {**halting, "halting": "sequential"},
            "constant score": {**halting, "score": "constant"},
            "random halting": {"halting": "depth", "policy": "random:0.5625"},
            "top tokens by firing": {"halting": "depth", "policy": "top:0.6,0.4,0.25"},
        },
        {
            "2 blocks": {**PLAIN, "depth": 2},
            "2 timesteps": {**PLAIN, "T": 2},
        },
        headline=("plain", "halting", "halting + merging", "static schedule"), more=5,
    )  # fmt: skip


def _cluttered() -> Part:
    model = SpikformerConfig(
        image_size=64, in_channels=1, embed_dim=32, num_heads=2, mlp_ratio=2, T=2
    )
    base = TrainConfig(
        model, data="cluttered-digits", validation=2000, epochs=6, batch_size=32, lr=0.01,
        precision="bf16", target=None,
    )  # fmt: skip
    return Part(
        "one digit at a random place and scale among strokes of others, 64x64, 256 tokens",
        base, {"epochs": 2, "lr": 0.005, "warmup": 0.1},
        {
            "plain": PLAIN,
            "halting 37 %": {**HALTING, "target": 0.365},
            "static 2,1": {"halting": "depth", "policy": "static:2,1"},
            "halting 25 %": {**HALTING, "target": 0.25},
            "static 1,1": {"halting": "depth", "policy": "static:1,1"},
            "halting 50 %": {**HALTING, "target": 0.49},
            "static 2,2": {"halting": "depth", "policy": "static:2,2"},
            "static 3,1": {"halting": "depth", "policy": "static:3,1"},
        },
        {
            "1 block": {**PLAIN, "depth": 1},
            "2 blocks": {**PLAIN, "depth": 2},
            "3 blocks": {**PLAIN, "depth": 3},
            "1 timestep": {**PLAIN, "T": 1},
        },
    )  # fmt: skip


PARTS: dict[str, Callable[[], Part]] = {"cluttered": _cluttered, "fashion": _fashion}


def run(name: str, seeds: list[int], runs: Path, methods: list[str] | None) -> None:
    """Train and test what is not yet, seed by seed."""
    part = PARTS[name]()
    for seed in seeds:
        folder = runs / f"{name}-{seed}"
        first, points = part.points(seed, folder)
        if methods is not None:
            points = [point for point in points if point.label in methods]
        result = sweep([first, *points], folder, test=True, batches=(), log=_say)
        path = RESULTS / f"{name}-{seed}.json"
        RESULTS.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text())["rows"] if path.is_file() else []
        rows = {row["label"]: row for row in kept} | {
            row["label"]: _short(row) for row in result["rows"]
        }
        path.write_text(
            json.dumps({"part": name, "seed": seed, "rows": list(rows.values())}, indent=1) + "\n"
        )


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the part says already."""
    return {key: value for key, value in row.items() if key != "settings"}


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    run(args.part, args.seeds, args.runs, args.methods)


if __name__ == "__main__":
    main()
