"""Training and evaluation of AT-Spikformers on images."""

from __future__ import annotations

from .config import TrainConfig
from .evaluation import Evaluation, evaluate
from .loop import train
from .loss import training_loss

__all__ = ["Evaluation", "TrainConfig", "evaluate", "train", "training_loss"]
