"""Sweeps: many runs, or one checkpoint run in many ways, in one table and one picture."""

from __future__ import annotations

from .output import draw, table
from .points import EVALUATED, Point, checkpoint_grid, training_grid
from .run import sweep

__all__ = [
    "EVALUATED",
    "Point",
    "checkpoint_grid",
    "draw",
    "sweep",
    "table",
    "training_grid",
]
