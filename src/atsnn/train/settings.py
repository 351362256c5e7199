"""Settings by name: those of a run and those of its model, side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..checks import InvalidValue
from ..nn.config import SpikformerConfig
from .config import TrainConfig

__all__ = ["MODEL", "RUN", "parse", "with_settings"]

MODEL = tuple(field.name for field in dataclasses.fields(SpikformerConfig))
RUN = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.name != "model")


def with_settings(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """``config`` with values changed, of the run or of its model, whichever has the name."""
    unknown = sorted(set(changes) - {*MODEL, *RUN})
    if unknown:
        raise InvalidValue(
            f"expected settings among {', '.join(sorted({*MODEL, *RUN}))}; got {', '.join(unknown)}"
        )
    model = config.model.replace(**{k: v for k, v in changes.items() if k in MODEL})
    run = {k: v for k, v in changes.items() if k in RUN}
    return dataclasses.replace(config, model=model, **run)


def parse(op: str, option: str, texts: Iterable[str]) -> dict[str, str]:
    """``NAME=TEXT`` each, as a mapping."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name or name in found:
            raise InvalidValue(f"{op}: {option} must be name=value, each name once, got {text!r}")
        found[name] = value
    return found


def value_of(text: str) -> Any:
    """A value as it is written in JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "none" else text
