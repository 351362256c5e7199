"""What a run writes: a checkpoint, a log, and the state from which it can be resumed."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from ..checkpoint import read_config, save_pretrained, write_card
from ..checks import CheckpointError, InvalidValue
from ..nn.model import ATSpikformer
from .config import TrainConfig
from .options import command_of

__all__ = ["Progress", "Run"]

STATE, LOG = "training.pt", "training.json"


@dataclass
class Progress:
    """How far a run is.

    Attributes
    ----------
    epoch, batch : int
        The epoch at hand, from 0, and how many of its batches are done.
    loss, cells : float
        Sums over those batches.
    history : list of dict
        One entry an epoch that is done.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    cells: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def next_epoch(self) -> None:
        self.epoch, self.batch, self.loss, self.cells = self.epoch + 1, 0, 0.0, 0.0


@dataclass
class Run:
    """A run's folder and all that changes as it goes on."""

    folder: Path
    config: TrainConfig
    model: ATSpikformer
    average: AveragedModel | None
    optimizer: Any
    schedule: Any
    progress: Progress

    @property
    def result(self) -> ATSpikformer:
        """The model to evaluate and to save: the average, if there is one."""
        return self.model if self.average is None else cast(ATSpikformer, self.average.module)

    def save_state(self) -> None:
        """Write all that resuming needs, beside and moved into place: a cut leaves the last one."""
        state = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress),
            "config": self.config.to_dict(),
        }
        temporary = self.folder / f"{STATE}.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / STATE)

    def save_checkpoint(self) -> None:
        """Write the model and the history of the epochs that are done."""
        c, history = self.config, self.progress.history
        extra: dict[str, Any] = {"data": c.data, "epochs": len(history), "seed": c.seed}
        extra |= {name: getattr(c, name) for name in ("policy", "init") if getattr(c, name)}
        begun = _command_behind(c.init)
        extra |= {"init_command": begun} if begun else {}
        measured = {k: v for k, v in history[-1].items() if k not in ("loss", "cells")}
        extra |= {"command": command_of(c)} | measured
        save_pretrained(self.result, self.folder, extra)
        write_card(c.model, extra, self.folder)
        log = {"config": c.to_dict(), "history": history}
        (self.folder / LOG).write_text(json.dumps(log, indent=2) + "\n")

    def restore(self) -> None:
        """Take up the state in the folder; refuse one of other settings."""
        path = self.folder / STATE
        if not path.is_file():
            raise InvalidValue(f"train: --resume expected a file {path}, got none")
        try:
            # weights_only: tensors and plain containers, nothing that could run code.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a file that is refused anyway
                state = torch.load(path, weights_only=True)
            kept, progress = state["config"], Progress(**state["progress"])
        except Exception as error:  # torch.load raises many unrelated types on a damaged file
            raise CheckpointError(
                f"{path}: expected the state of an atsnn training run, got: "
                f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            ) from error
        _check_same(self.folder, kept, self.config.to_dict())
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = progress


def _command_behind(init: str | None) -> str | None:
    """What made the checkpoint that the run began with, as far as it is there and says so."""
    if init is None:
        return None
    try:
        extra = read_config(init).get("extra")
    except CheckpointError:
        return None
    return extra.get("command") if isinstance(extra, dict) else None


def _check_same(folder: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    kept, now = (json.loads(json.dumps(config)) for config in (kept, now))
    if kept == now:
        return
    ran, wanted = _flat(kept), _flat(now)
    differ = [
        f"{name} = {wanted.get(name)!r} (the run has {ran.get(name)!r})"
        for name in sorted(wanted)
        if wanted.get(name) != ran.get(name)
    ]
    raise InvalidValue(
        f"train: --resume expected the settings of the run in {folder}, got {', '.join(differ)}"
    )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, those of the model as ``model.NAME``."""
    model = {f"model.{name}": value for name, value in config["model"].items()}
    return {name: value for name, value in config.items() if name != "model"} | model
