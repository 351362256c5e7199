"""The tasks of the study, and the methods that are compared on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atsnn import SpikformerConfig
from atsnn.sweep import Point
from atsnn.train import TrainConfig
from atsnn.train.settings import MODEL, with_settings

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
        Of a plain network from scratch: the first phase, or all there is.
    second : dict, optional
        Settings of the second phase, in which methods go on from it; ``None``: there is no such
        phase, and every method is trained from scratch.
    methods : dict
        By label the settings that differ from the second phase's, or from the base's.
    seeds : int
        How many the study runs; ``more`` of them for the methods named in ``headline``.
    once : tuple of str
        Methods that seed 0 alone runs: candidates, of which its validation images choose, and
        ablations.
    pairs : tuple of (str, str)
        Methods whose difference answers the question: one that halts, and what it has to beat.
    """

    title: str
    about: str
    base: TrainConfig
    second: dict[str, Any] | None
    methods: dict[str, dict[str, Any]]
    seeds: int = 3
    headline: tuple[str, ...] = ()
    more: int = 0
    once: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    def runs_on(self, label: str, seed: int) -> bool:
        """Whether the study has that method for that seed."""
        if label in self.once:
            return seed == 0
        return seed < (self.more if label in self.headline else self.seeds)

    @property
    def labels(self) -> list[str]:
        """Of everything that is trained, the first phase too."""
        return [FIRST] * (self.second is not None) + list(self.methods)

    @property
    def network(self) -> SpikformerConfig:
        """The full one, of whose cells the shares are."""
        second = {name: value for name, value in (self.second or {}).items() if name in MODEL}
        return self.base.model.replace(**second, **PLAIN)

    def folder(self, seed: int, runs: Path) -> Path:
        """Of a seed's runs: one for all parts with the same images, which share plain networks."""
        return runs / f"{self.base.data}-{seed}"

    def points(self, seed: int, runs: Path) -> dict[str, Point]:
        """The runs of a seed by label; what others go on from comes first."""
        base = with_settings(self.base, {"seed": seed, "target": None})
        found, shared = {}, {}
        if self.second is not None:
            found = {FIRST: Point("plain", config=base)}
            shared = {**self.second, "init": str(self.folder(seed, runs) / found[FIRST].key)}
        return found | {
            label: Point(label, config=with_settings(base, {**shared, **changes}))
            for label, changes in self.methods.items()
            if self.runs_on(label, seed)
        }


def _fashion_network(epochs: int) -> TrainConfig:
    return TrainConfig(
        SpikformerConfig(image_size=28, in_channels=1, embed_dim=48, num_heads=3, T=2),
        data="fashion-mnist", validation=5000, epochs=epochs, lr=0.01, shift=0, flip=True,
        precision="bf16", target=None,
    )  # fmt: skip


FASHION = "55,000 training and 10,000 test images, 28x28, 49 tokens"
LEARNED = {**HALTING, "score": "linear", "target": 0.565}
GRADUAL = {**LEARNED, "target_anneal": 0.5}
SEQUENTIAL = {**LEARNED, "halting": "sequential"}
UNBUDGETED = {
    f"halting, ponder weight {weight:g}": {**LEARNED, "target": None, "ponder_weight": weight}
    for weight in (0.01, 0.1, 1.0)
}
TAUGHT = {"lr": 0.003, "warmup": 0.1, "distill": 0.5, "freeze_norms": True}
MERGED = {"merge_r": (12, 6, 3)}  # with halting


def _fashion() -> Part:
    return Part(
        "Fashion-MNIST", FASHION, _fashion_network(3), None,
        {
            "plain": PLAIN,
            "halting": LEARNED,
            "1 block": {**PLAIN, "depth": 1},
            "2 blocks": {**PLAIN, "depth": 2},
            "3 blocks": {**PLAIN, "depth": 3},
            "1 timestep": {**PLAIN, "T": 1},
            "4 timesteps": {**PLAIN, "T": 4},
        },
        pairs=(("halting", "plain"), ("plain", "1 block"), ("plain", "2 blocks"),
               ("plain", "1 timestep"), ("4 timesteps", "plain")),
    )  # fmt: skip


def _fashion_long() -> Part:
    return Part(
        "Fashion-MNIST, trained longer", FASHION,
        _fashion_network(6), {**TAUGHT, "epochs": 2},
        {"plain": PLAIN, "halting": GRADUAL, "static 2,2": static(2, 2)},
        headline=("plain", "halting", "static 2,2"), more=5,
        pairs=(("halting", "plain"), ("halting", "static 2,2")),
    )  # fmt: skip


def _fashion_tuned() -> Part:
    return Part(
        "Fashion-MNIST, going on from a plain network", FASHION,
        _fashion_network(6), {**TAUGHT, "epochs": 1},
        {
            "plain": PLAIN,
            "halting": GRADUAL,
            "halting, 40 %": {**GRADUAL, "target": 0.4},
            "halting, depth (A-ViT at each t)": {**GRADUAL, "halting": "depth"},
            "halting, sequential": {**GRADUAL, "halting": "sequential"},
            "halting, first channel": {**GRADUAL, "score": "first"},
            **UNBUDGETED,
            "static 2,2": static(2, 2),
            "static 3,1": static(3, 1),
            "constant score": {**GRADUAL, "score": "constant"},
            "random halting": {"halting": "depth", "policy": "random:0.565"},
            "top tokens by firing": {"halting": "depth", "policy": "top:0.6,0.4,0.25"},
            "merging": {**PLAIN, "merge_r": (24, 4, 4)},
            "merging, random pairs": {**PLAIN, "merge_r": (24, 4, 4), "merge_match": "random"},
            "halting + merging": {**GRADUAL, **MERGED},
        },
        once=("static 3,1",),
        pairs=(("halting", "plain"), ("halting", "static 2,2"), ("halting", "random halting"),
               ("merging", "merging, random pairs")),
    )  # fmt: skip


def _scenes(epochs: int, **model: Any) -> TrainConfig:
    """The first phase of scenes: small networks, as there are 256 tokens."""
    return TrainConfig(
        SpikformerConfig(
            image_size=64, in_channels=1, embed_dim=32, num_heads=2, mlp_ratio=2, T=2, **model
        ),
        data="cluttered-digits", validation=2000, epochs=epochs, batch_size=32, lr=0.01, shift=0,
        precision="bf16", target=None,
    )  # fmt: skip


def _cluttered() -> Part:
    return Part(
        "Cluttered digits",
        "one handwritten digit at a random place and scale among pieces of others; 18,000 training "
        "and 5,000 test images, 64x64, 256 tokens",
        _scenes(3), None,
        {
            "plain": PLAIN,
            "halting": {**LEARNED, "target": 0.37},
            "static 2,1": static(2, 1),
            "1 block": {**PLAIN, "depth": 1},
            "2 blocks": {**PLAIN, "depth": 2},
            "3 blocks": {**PLAIN, "depth": 3},
            "1 timestep": {**PLAIN, "T": 1},
        },
        pairs=(("halting", "plain"), ("halting", "static 2,1"), ("plain", "1 block"),
               ("plain", "2 blocks"), ("plain", "1 timestep")),
    )  # fmt: skip


def _pixels() -> Part:
    return Part(
        "Cluttered digits, pixel by pixel",
        "the same scenes; for every pixel the class of the digit it is of, or background. The "
        "first phase has 2 timesteps, the second 6",
        _scenes(8, num_classes=11, task="pixels", depth=2),
        {"epochs": 2, "lr": 0.005, "warmup": 0.1, "T": 6},
        {
            # A timestep without a block does not exist: the network has fewer.
            "halting": {**SEQUENTIAL, "target": 0.248},
            "halting, 3 timesteps": {**SEQUENTIAL, "target": 0.498, "T": 3},
            "static 1,1,1": {**static(1, 1, 1), "T": 3},
            "static 2,1": {**static(2, 1), "T": 2},
            # A third of the cells, in about the time that halting takes.
            "static 1,1,1,1": {**static(1, 1, 1, 1), "T": 4},
            "plain": PLAIN,
            "static 1,1,1,1,1,1": static(1, 1, 1, 1, 1, 1),
            # Of 128 pairs that there are; chosen on held-out images, of 32, 64, 96 and 128.
            "merging": {**PLAIN, "merge_r": 96},
            "merging, random pairs": {**PLAIN, "merge_r": 96, "merge_match": "random"},
        },
        headline=("halting", "static 1,1,1", "static 2,1", "static 1,1,1,1"), more=5,
        pairs=(("halting", "plain"), ("halting", "static 1,1,1"), ("halting", "static 2,1"),
               ("halting", "static 1,1,1,1"),
               ("halting, 3 timesteps", "static 1,1,1"),
               ("halting", "static 1,1,1,1,1,1")),
    )  # fmt: skip


PARTS: dict[str, Callable[[], Part]] = {
    "fashion": _fashion,
    "fashion-long": _fashion_long,
    "fashion-tuned": _fashion_tuned,
    "cluttered": _cluttered,
    "pixels": _pixels,
}
