"""Running a sweep: train what is not yet trained, measure what is not yet measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import data
from ..bench.subject import with_changes
from ..checkpoint import load_trained, read_config
from ..checks import CheckpointError, InvalidValue
from ..measure import machine
from ..nn.model import ATSpikformer
from ..train import CALIBRATION, TrainConfig, calibrate, train
from ..train.loop import splits_of
from ..train.state import STATE
from .measure import counted, timed
from .points import Point, check_changes

__all__ = ["sweep"]

ROWS = "rows.json"
Log = Callable[[str], None]


def sweep(
    points: Sequence[Point],
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    split: data.Split | None = None,
    split_name: str = "test",
    training: data.Split | None = None,
    test: bool = False,
    batches: Sequence[int] = (1, 16),
    rounds: int = 11,
    progress: bool = False,
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Measure every point; a sweep that was cut off goes on where it stopped.

    Parameters
    ----------
    points : sequence of Point
    folder : path
        Receives a folder a run and ``rows.json``, which grows with every point.
    checkpoint : str or path, optional
        What points without a run change, on the images of ``split``.
    split_name : str
        What these images are called in the rows: ``"test"`` or ``"validation"``.
    training : Split, optional
        Images on which the share of cells is counted where such a point has a ``target``.
    test : bool
        Whether runs are measured on the test images; otherwise on those that were held out, where
        there are such.
    batches : sequence of int
        Batch sizes to time; empty: nothing is timed. All points are timed in turns at the end.
    rounds : int
        Rounds of the timing.
    progress : bool
        Whether to show a progress bar for each run.
    log : callable
        Receives lines that tell how far it is.

    Returns
    -------
    dict
        ``"machine"`` and ``"rows"``: of each point its label, seed, settings and what was measured.
    """
    folder = Path(folder)
    keys = [point.key for point in points]
    if len(set(keys)) < len(keys):
        twice = next(p.label for p, key in zip(points, keys, strict=True) if keys.count(key) > 1)
        raise InvalidValue(f"sweep: every point must differ from the others, got {twice!r} twice")
    if checkpoint is not None:  # all of them, before the first one takes its time
        trained = load_trained(checkpoint)
        for point in points:
            check_changes(point, trained)
    rows = _read(folder / ROWS)
    models, images = {}, None
    for number, point in enumerate(points, 1):
        seed = "" if point.seed is None else f", seed {point.seed}"
        log(f"{number}/{len(points)}  {point.label}{seed}")
        if point.config is None:
            model = _changed(point, checkpoint, training, log)
            if split is None:
                raise InvalidValue(f"sweep: point {point.label!r} expects images, got split=None")
            measured_on, name = split, split_name
        else:
            model, measured_on, name = _trained(
                point.config, folder / point.key, test, progress, log
            )
        row = rows.get(point.key)
        of = {"split": name, "digest": _digest(measured_on)}
        if checkpoint is not None:
            of["checkpoint"] = str(checkpoint)
        # One of other images, or of another checkpoint, is not this one.
        if row is None or any(row.get(key) != value for key, value in of.items()):
            row = {"label": point.label, "seed": point.seed, **of,
                   "settings": point.settings} | counted(model, measured_on)  # fmt: skip
            rows[point.key] = row
            _write(folder / ROWS, rows)
        models[point.key] = model
        if images is None:
            images = measured_on[: max((*batches, 16))].images
    if batches and images is not None:
        log("timing")
        # Those that take the same images, in turns.
        alike = {key: m for key, m in models.items() if m.config.image_size == images.shape[-1]}
        for key, latency in timed(alike, images, batches, rounds).items():
            rows[key]["latency_ms"] = latency
        _write(folder / ROWS, rows)
    return {"machine": machine(), "rows": [rows[key] for key in keys]}


def _changed(
    point: Point, checkpoint: str | Path | None, training: data.Split | None, log: Log
) -> ATSpikformer:
    """A checkpoint as a point runs it."""
    if checkpoint is None:
        raise InvalidValue(f"sweep: point {point.label!r} expects a checkpoint, got None")
    changes = dict(point.changes or {})
    target = changes.pop("target", None)
    model = with_changes(load_trained(checkpoint), **changes)
    if target is not None:
        if training is None:
            raise InvalidValue(f"sweep: point {point.label!r} expects training images, got None")
        share = calibrate(model, training[:CALIBRATION], target)
        if share > target:
            log(f"  warning: {target:.0%} of the cells is out of reach; left at {share:.0%}")
    return model


def _trained(
    c: TrainConfig, place: Path, test: bool, progress: bool, log: Log
) -> tuple[ATSpikformer, data.Split, str]:
    """The model of a run, the images it is measured on, and what they are called."""
    if not _done(place, c):
        train(c, place, resume=(place / STATE).exists(), progress=progress, log=log)
    _, held_out = splits_of(c)
    if test and c.validation:
        held_out = data.load(c.data, c.model.image_size, c.data_dir)["test"]
    return load_trained(place), held_out, "test" if test or not c.validation else "validation"


def _digest(split: data.Split) -> str:
    """Which images these are, as far as their number, their labels and the first one tell."""
    parts = (split.labels, split.pixels[:1])
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()[:8]


def _done(place: Path, config: TrainConfig) -> bool:
    try:
        return read_config(place)["extra"]["epochs"] == config.epochs
    except (CheckpointError, KeyError):
        return False


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected the rows of a sweep, got: {error}") from error


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved into place: a cut leaves what was there.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    temporary.replace(path)
