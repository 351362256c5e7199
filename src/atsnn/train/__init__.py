"""Training and evaluation of AT-Spikformers on images."""

from __future__ import annotations

from .calibration import CALIBRATION, calibrate
from .config import TrainConfig
from .evaluation import Evaluation, evaluate
from .loop import train
from .loss import executed_share, training_loss

__all__ = [
    "CALIBRATION",
    "Evaluation",
    "TrainConfig",
    "calibrate",
    "evaluate",
    "executed_share",
    "train",
    "training_loss",
]
