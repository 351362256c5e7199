"""The tasks of the study, and the methods that are compared on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atsnn import SpikformerConfig
from atsnn.sweep import Point
from atsnn.train import TrainConfig
from atsnn.train.settings import with_settings

FIRST = "pretrained"  # the plain network that the others go on from

PLAIN: dict[str, Any] = {"halting": None}
HALTING: dict[str, Any] = {"halting": "rectangle"}


def static(*blocks: int) -> dict[str, Any]:
    """The settings of a schedule that runs ``blocks[t]`` blocks at timestep ``t + 1``."""
    return {"halting": "depth", "policy": "static:" + ",".join(map(str, blocks))}


@dataclass(frozen=True)
class Part:
    """One task with its methods.

    Attributes
    ----------
    title, about : str
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
    candidates : tuple of str
        Methods that seed 0 alone runs: what is chosen among them, is chosen by its validation
        images.
    pairs : tuple of (str, str)
        Methods whose difference answers the question: one that halts, and what it has to beat.
    """

    title: str
    about: str
    base: TrainConfig
    second: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: int = 3
    headline: tuple[str, ...] = ()
    more: int = 0
    candidates: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    def runs_on(self, label: str, seed: int) -> bool:
        """Whether the study has that method for that seed."""
        if label in self.candidates:
            return seed == 0
        return seed < (self.more if label in self.headline else self.seeds)

    def points(self, seed: int, runs: Path) -> tuple[Point, list[Point]]:
        """The first phase's run and those of all methods, for a seed."""
        base = with_settings(self.base, {"seed": seed, "target": None})
        first = Point(FIRST, config=base)
        init = str(runs / first.key)
        found = [
            Point(label, config=with_settings(base, {**self.second, "init": init, **changes}))
            for label, changes in self.methods.items()
        ]
        epochs = self.base.epochs + self.second["epochs"]
        found += [
            Point(label, config=with_settings(base, {"epochs": epochs, **changes}))
            for label, changes in self.alone.items()
        ]
        return first, [point for point in found if self.runs_on(point.label, seed)]


def _fashion() -> Part:
    model = SpikformerConfig(image_size=28, in_channels=1, embed_dim=48, num_heads=3, T=2)
    base = TrainConfig(
        model, data="fashion-mnist", validation=5000, epochs=4, lr=0.01, flip=True,
        precision="bf16", target=None,
    )  # fmt: skip
    halting = {**HALTING, "score": "linear", "target": 0.55}
    return Part(
        "Fashion-MNIST",
        "55,000 training and 10,000 test images, 28x28, 49 tokens",
        base, {"epochs": 2, "lr": 0.005, "ema": 0.998},
        {
            "plain": PLAIN,
            "halting": halting,
            "merging": {**PLAIN, "merge_r": (24, 4, 4)},
            "halting + merging": {**halting, "merge_r": (12, 6, 3)},
            "static 3,1": static(3, 1),
            "static 2,2": static(2, 2),
            "halting, 40 %": {**HALTING, "target": 0.4},
            "merging, random pairs": {**PLAIN, "merge_r": (24, 4, 4), "merge_match": "random"},
            "halting, depth (A-ViT at each t)": {**halting, "halting": "depth"},
            "halting, sequential": {**halting, "halting": "sequential"},
            "constant score": {**halting, "score": "constant"},
            "random halting": {"halting": "depth", "policy": "random:0.55"},
            "top tokens by firing": {"halting": "depth", "policy": "top:0.6,0.4,0.25"},
        },
        {
            "1 block": {**PLAIN, "depth": 1},
            "2 blocks": {**PLAIN, "depth": 2},
            "3 blocks": {**PLAIN, "depth": 3},
            "1 timestep": {**PLAIN, "T": 1},
        },
        headline=("plain", "halting", "static 2,2"), more=10, candidates=("static 3,1",),
        pairs=(("halting", "plain"), ("halting", "static 2,2")),
    )  # fmt: skip


def _scenes(epochs: int, **model: Any) -> TrainConfig:
    """The first phase of scenes: small networks, as there are 256 tokens."""
    return TrainConfig(
        SpikformerConfig(
            image_size=64, in_channels=1, embed_dim=32, num_heads=2, mlp_ratio=2, T=2, **model
        ),
        data="cluttered-digits", validation=2000, epochs=epochs, batch_size=32, lr=0.01,
        precision="bf16", target=None,
    )  # fmt: skip


def _cluttered() -> Part:
    return Part(
        "Cluttered digits",
        "one handwritten digit at a random place and scale among pieces of others; 18,000 training "
        "and 5,000 test images, 64x64, 256 tokens",
        _scenes(6), {"epochs": 2, "lr": 0.005, "warmup": 0.1},
        {
            "plain": PLAIN,
            "halting 37 %": {**HALTING, "target": 0.365},
            "static 2,1": static(2, 1),
            "halting 25 %": {**HALTING, "target": 0.25},
            "static 1,1": static(1, 1),
            "halting 50 %": {**HALTING, "target": 0.49},
            "static 2,2": static(2, 2),
            "static 3,1": static(3, 1),
        },
        {
            "1 block": {**PLAIN, "depth": 1},
            "2 blocks": {**PLAIN, "depth": 2},
            "3 blocks": {**PLAIN, "depth": 3},
            "1 timestep": {**PLAIN, "T": 1},
        },
        pairs=(("halting 37 %", "plain"), ("halting 37 %", "static 2,1")),
    )  # fmt: skip


def _pixels() -> Part:
    return Part(
        "Cluttered digits, pixel by pixel",
        "the same scenes; for every pixel the class of the digit it is of, or background. The "
        "first phase has 2 timesteps, the second 4",
        _scenes(4, num_classes=11, task="pixels", depth=2),
        {"epochs": 2, "lr": 0.005, "warmup": 0.1, "T": 4},
        {
            "plain": PLAIN,
            "halting": {"halting": "sequential", "score": "linear", "target": 0.36},
            # A timestep without a block does not exist: the network has one fewer.
            "static 1,1,1,0": {**static(1, 1, 1), "T": 3},
            "static 2,1,0,0": {**static(2, 1), "T": 2},
            "static 1,1,0,0": {**static(1, 1), "T": 2},
            "static 1,1,1,1": static(1, 1, 1, 1),
            "merging": {**PLAIN, "merge_r": 128},
            "merging, random pairs": {**PLAIN, "merge_r": 128, "merge_match": "random"},
        },
        candidates=("static 2,1,0,0",),
        pairs=(("halting", "plain"), ("halting", "static 1,1,1,0")),
    )  # fmt: skip


PARTS: dict[str, Callable[[], Part]] = {
    "fashion": _fashion,
    "cluttered": _cluttered,
    "pixels": _pixels,
}
