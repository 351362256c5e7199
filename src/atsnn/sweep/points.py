"""The points of a sweep: what is trained, or what a checkpoint is run as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..checks import AtsnnError, InvalidValue, check_number
from ..nn.model import ATSpikformer
from ..schedule import check_policy, rule_of
from ..train import TrainConfig
from ..train.settings import with_settings

__all__ = ["EVALUATED", "Point", "check_changes", "checkpoint_grid", "training_grid"]

# What a trained model can be run with instead of what it was trained with.
EVALUATED = (
    "target", "eps", "halting", "readout", "merge_r", "merge_threshold", "merge_match",
    "merge_sizes",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One thing to measure.

    Attributes
    ----------
    label : str
        What it is called in tables; points that differ in their seed alone share it.
    config : TrainConfig, optional
        A run to train.
    changes : dict, optional
        A checkpoint's configuration with these values instead; with ``target`` its ``beta`` is set
        for that share of cells.
    """

    label: str
    config: TrainConfig | None = None
    changes: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int | None:
        return None if self.config is None else self.config.seed

    @property
    def key(self) -> str:
        """A name for a folder: the label, as far as a folder can be called so, and a digest."""
        what = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.sha256(what.encode()).hexdigest()[:8]
        text = "".join(c if c.isalnum() or c in "-.=" else "_" for c in self.label)
        return f"{text[:60]}-{digest}"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.changes or {}) if self.config is None else self.config.to_dict()


def training_grid(base: TrainConfig, vary: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values, as a run each; seeds do not show in labels."""
    points = []
    for values in _combinations(vary):
        label = _label(values)
        with _refused(label):
            points.append(Point(label, config=with_settings(base, values)))
    return points


def checkpoint_grid(vary: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values, for a checkpoint to be run with."""
    unknown = sorted(set(vary) - set(EVALUATED))
    if unknown:
        raise InvalidValue(
            f"sweep: a checkpoint can be run with other {', '.join(EVALUATED)}; "
            f"got {', '.join(unknown)}, which must be trained"
        )
    return [Point(_label(values), changes=values) for values in _combinations(vary)]


def check_changes(point: Point, model: ATSpikformer) -> None:
    """Refuse what a checkpoint cannot be run with."""
    changes = dict(point.changes or {})
    target = changes.pop("target", None)
    with _refused(point.label):
        changed = model.config.replace(**changes)
        rule = rule_of(model)
        if rule is not None:
            for name in ("target", "eps"):  # a rule's depths stay the same with any
                if name in (point.changes or {}):
                    raise InvalidValue(
                        f"{name} expects a model that halts by its scores, got one that halts by a "
                        f"rule, {rule}"
                    )
            check_policy("policy", rule, changed)
        if target is not None:
            check_number("calibrate", "target", target, above=0, at_most=1)
            if changed.halting is None:
                raise InvalidValue("target expects a model that halts, got halting=None")


@contextmanager
def _refused(label: str) -> Iterator[None]:
    """Name the point that an error is of."""
    try:
        yield
    except AtsnnError as error:
        raise InvalidValue(f"sweep: point {label!r}: {error}") from error


def _combinations(vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    if not vary:
        raise InvalidValue("sweep: expected at least one setting to vary, got none")
    return [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]


def _label(values: Mapping[str, Any]) -> str:
    shown = [f"{name}={_text(value)}" for name, value in values.items() if name != "seed"]
    return " ".join(shown) or "as given"


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
