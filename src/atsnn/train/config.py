"""How a model is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .. import data
from ..checks import InvalidType, InvalidValue, check_choice, check_integer, check_number
from ..nn.config import SpikformerConfig
from ..schedule import check_policy

__all__ = ["PRECISIONS", "TrainConfig"]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes
    ----------
    model : SpikformerConfig
    data : str
        Name of the data set; see :mod:`atsnn.data`.
    data_dir : str, optional
        Where its files lie.
    validation : int
        Training images held out, the same ones for every seed. Given, it is they that are
        evaluated after every epoch, and the test images are left alone.
    limit : int, optional
        Train on the first ``limit`` images only.
    epochs, batch_size : int
        ``batch_size`` is that of one process.
    lr : float
        Peak learning rate of AdamW; ``alpha`` and ``beta`` of the halting learn at ten times it,
        without weight decay.
    warmup : float
        Share of the steps in which the learning rate rises from 0, linearly; after it, it falls
        to 0 as a cosine.
    weight_decay, label_smoothing, clip : float
        ``clip`` is the largest gradient norm.
    ema : float
        Decay, per step, of the exponential moving average of the weights, which is what is then
        evaluated and saved; 0: none.
    shift : int
        Training images are shifted by up to this many pixels.
    flip : bool
        Whether every other training image is mirrored.
    erase : float
        Share of training images that lose a random rectangle (random erasing).
    ponder_weight : float
        Weight of the ponder loss.
    ponder_warmup : float
        Share of the steps in which that weight rises from 0, linearly.
    target : float, optional
        Share of cells to execute. Given, the loss adds ``ponder_weight * (share - target) *
        ponder`` with the detached share of the batch, and ``beta`` is set at the end such that
        training images execute no more (:func:`atsnn.train.calibrate`). ``None``: the loss adds
        ``ponder_weight * ponder``.
    target_anneal : float
        Share of the steps in which the budget falls from all cells to ``target``, linearly; the
        run then begins with scores that halt nothing.
    policy : str, optional
        Halting by a rule instead of learned scores; see :func:`atsnn.schedule.directed`.
    init : str, optional
        Checkpoint whose weights training begins with, such as a plain Spikformer's that is to
        learn to halt.
    distill : float
        Share of the cross-entropy that asks for the class probabilities of ``init`` on the same
        image instead of its label (Hinton et al., arXiv 1503.02531, at temperature 1), as
        DynamicViT teaches a network to do without tokens (arXiv 2106.02034, section 3.3).
    freeze_norms : bool
        Whether BatchNorm keeps the statistics of ``init`` throughout, in training as in inference;
        its scale and shift are learned as ever.
    precision : {"fp32", "bf16"}
        ``"bf16"``: autocast.
    seed : int
    """

    model: SpikformerConfig
    data: str = "digits"
    data_dir: str | None = None
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.02
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 1.0
    shift: int = 2
    ponder_weight: float = 1.0
    target: float | None = 0.6
    seed: int = 0
    limit: int | None = None
    validation: int = 0
    warmup: float = 0.15
    ema: float = 0.0
    flip: bool = False
    erase: float = 0.0
    ponder_warmup: float = 0.0
    target_anneal: float = 0.0
    policy: str | None = None
    init: str | None = None
    distill: float = 0.0
    freeze_norms: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        op = "TrainConfig"
        if not isinstance(self.model, SpikformerConfig):
            raise InvalidType(
                f"{op}: model must be a SpikformerConfig, got {type(self.model).__name__}"
            )
        check_choice(op, "data", self.data, data.DATASETS)
        check_choice(op, "precision", self.precision, PRECISIONS)
        check_choice(op, "flip", self.flip, (True, False))
        check_choice(op, "freeze_norms", self.freeze_norms, (True, False))
        check_integer(op, "epochs", self.epochs, at_least=1)
        check_integer(op, "batch_size", self.batch_size, at_least=2)
        check_integer(op, "validation", self.validation, at_least=0)
        check_integer(op, "shift", self.shift, at_least=0, at_most=self.model.image_size // 2)
        check_integer(op, "seed", self.seed, at_least=0, at_most=2**31 - 1)
        for name in ("lr", "clip"):
            check_number(op, name, getattr(self, name), above=0)
        for name in ("weight_decay", "ponder_weight"):
            check_number(op, name, getattr(self, name), at_least=0)
        for name in ("label_smoothing", "warmup", "ema"):
            check_number(op, name, getattr(self, name), at_least=0, below=1)
        for name in ("erase", "ponder_warmup", "target_anneal", "distill"):
            check_number(op, name, getattr(self, name), at_least=0, at_most=1)
        if self.distill and self.init is None:
            raise InvalidValue(
                f"{op}: distill expected init, the checkpoint to learn from, got {self.distill} "
                "and no init"
            )
        if self.freeze_norms and self.init is None:
            raise InvalidValue(
                f"{op}: freeze_norms expected init, the checkpoint whose statistics to keep, "
                "got no init"
            )
        if self.limit is not None:
            check_integer(op, "limit", self.limit, at_least=self.batch_size)
        if self.policy is not None:
            check_policy(op, self.policy, self.model)
        elif self.target is not None and self.model.halting is not None:
            floor = 1 / (
                self.model.depth * (self.model.T if self.model.halting == "sequential" else 1)
            )
            check_number(op, "target", self.target, at_least=floor, at_most=1)

    @property
    def halts(self) -> bool:
        """Whether scores are learned, and a ponder loss is due."""
        return self.model.halting is not None and self.policy is None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
