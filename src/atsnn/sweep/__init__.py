"""Sweeps: many runs, or one checkpoint run in many ways, in one table and one picture."""

from __future__ import annotations

from .output import draw, table
from .points import EVALUATED, Point, checkpoint_grid, training_grid
from .run import load_run, sweep

__all__ = [
    "EVALUATED",
    "Point",
    "checkpoint_grid",
    "draw",
    "load_run",
    "sweep",
    "table",
    "training_grid",
]
