"""Training and evaluation of AT-Spikformers on images."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import data
from .checkpoint import check_empty_or_ours, save_pretrained
from .checks import (
    CheckpointError,
    InvalidValue,
    check_choice,
    check_integer,
    check_number,
    require,
)
from .data import Split
from .nn.config import SpikformerConfig
from .nn.model import ATSpikformer, evaluating
from .nn.trace import Trace

__all__ = ["Evaluation", "TrainConfig", "evaluate", "train", "training_loss"]

STATE, LOG = "training.pt", "training.json"


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
    epochs, batch_size : int
    lr : float
        Peak learning rate of AdamW (one cycle); ``alpha`` and ``beta`` of the halting learn at
        ten times it, without weight decay.
    weight_decay, label_smoothing, clip : float
        ``clip`` is the largest gradient norm.
    shift : int
        Training images are shifted by up to this many pixels.
    ponder_weight : float
        Weight of the ponder loss.
    target : float, optional
        Share of cells to execute. Given, the loss adds ``ponder_weight * (share - target) *
        ponder`` with the detached share of the batch; ``None``: ``ponder_weight * ponder``.
    seed : int
    limit : int, optional
        Train on the first ``limit`` images only.
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

    def __post_init__(self) -> None:
        op = "TrainConfig"
        check_choice(op, "data", self.data, data.DATASETS)
        check_integer(op, "epochs", self.epochs, at_least=1)
        check_integer(op, "batch_size", self.batch_size, at_least=2)
        check_integer(op, "shift", self.shift, at_least=0, at_most=self.model.image_size // 2)
        check_integer(op, "seed", self.seed, at_least=0, at_most=2**31 - 1)
        check_number(op, "lr", self.lr, above=0)
        check_number(op, "weight_decay", self.weight_decay, at_least=0)
        check_number(op, "label_smoothing", self.label_smoothing, at_least=0, below=1)
        check_number(op, "clip", self.clip, above=0)
        check_number(op, "ponder_weight", self.ponder_weight, at_least=0)
        if self.limit is not None:
            check_integer(op, "limit", self.limit, at_least=self.batch_size)
        if self.target is not None and self.model.halting is not None:
            floor = 1 / (
                self.model.depth * (self.model.T if self.model.halting == "sequential" else 1)
            )
            check_number(op, "target", self.target, at_least=floor, at_most=1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and executed cells of a model on a split.

    Attributes
    ----------
    accuracy : float
        Share of images classified right.
    cells : float
        Share of the ``L * T * N`` cells of an image that were executed.
    images : int
    cells_by_block, cells_by_timestep : list of float
        The same share for each block and for each timestep.
    loss : float
        Mean cross-entropy.
    """

    accuracy: float
    cells: float
    images: int
    cells_by_block: list[float]
    cells_by_timestep: list[float]
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate(model: ATSpikformer, split: Split, batch_size: int = 128) -> Evaluation:
    """Accuracy and executed cells of ``model``, in evaluation mode, on ``split``."""
    if len(split) == 0:
        raise InvalidValue("evaluate: expected at least one image, got none")
    device = next(model.parameters()).device
    right, loss, cells = 0, 0.0, torch.zeros(model.config.depth, model.config.T)
    with evaluating(model):
        for start in range(0, len(split), batch_size):
            images = split.images[start : start + batch_size].to(device)
            labels = split.labels[start : start + batch_size].to(device)
            trace = model(images, return_trace=True, firing_rates=False)
            right += int((trace.logits.argmax(1) == labels).sum())
            loss += float(nnf.cross_entropy(trace.logits.float(), labels, reduction="sum"))
            cells += trace.active.sum((2, 3)).cpu()
    share = cells / (len(split) * model.config.grid**2)
    return Evaluation(
        accuracy=right / len(split),
        cells=float(share.mean()),
        images=len(split),
        cells_by_block=share.mean(1).tolist(),
        cells_by_timestep=share.mean(0).tolist(),
        loss=loss / len(split),
    )


def training_loss(
    trace: Trace, labels: Tensor, config: TrainConfig, halts: bool
) -> tuple[Tensor, float]:
    """Loss of a batch and the share of cells it executed.

    Cross-entropy, plus with halting the ponder loss: ``ponder_weight * (share - target) *
    ponder`` towards a budget, or ``ponder_weight * ponder``.
    """
    loss = nnf.cross_entropy(trace.logits, labels, label_smoothing=config.label_smoothing)
    share = float(trace.active.double().mean())
    if halts:
        pull = 1.0 if config.target is None else share - config.target
        loss = loss + config.ponder_weight * pull * trace.ponder_loss
    return loss, share


def _optimizer(model: ATSpikformer, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; ``alpha`` and ``beta`` learn ten times as fast, without weight decay."""
    halting = [] if model.halting is None else [model.halting.alpha, model.halting.beta]
    fast = {id(p) for p in halting}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in fast]},
    ]
    if halting:
        groups.append({"params": halting, "lr": config.lr * 10, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``shift`` pixels each way, zeros coming in."""
    if shift == 0:
        return images
    M, _, H, W = images.shape
    padded = nnf.pad(images, (shift, shift, shift, shift))
    dy, dx = torch.randint(0, 2 * shift + 1, (2, M, 1), generator=generator)
    rows, columns = dy + torch.arange(H), dx + torch.arange(W)
    picked = padded[torch.arange(M)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[ATSpikformer, Evaluation]:
    """Train a model, writing a checkpoint to ``folder`` after every epoch.

    Parameters
    ----------
    config : TrainConfig
    folder : path
        Receives ``config.json`` and ``model.safetensors`` (the model), ``training.json``
        (settings and history) and ``training.pt`` (what resuming needs).
    resume : bool
        Continue a run that was cut off; it ends with the same weights as an uninterrupted one.
    progress : bool
        Whether to show a progress bar.
    log : callable
        Receives one line an epoch.

    Returns
    -------
    model, evaluation
        The trained model in evaluation mode and what it does on the test split.
    """
    for package in ("accelerate", "tqdm"):
        require(package, "train", "training")
    from accelerate import Accelerator
    from tqdm import tqdm

    folder = Path(folder)
    check_empty_or_ours(folder)
    try:  # now, not after the first epoch
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"train: expected a folder that can be made, got {error}") from error
    if not resume and (folder / STATE).exists():
        raise InvalidValue(
            f"train: {folder} holds an earlier run; give --resume to continue it, or another folder"
        )
    splits = data.load(config.data, config.model.image_size, config.data_dir)
    images, labels = splits["train"].images, splits["train"].labels
    if config.limit is not None:
        images, labels = images[: config.limit], labels[: config.limit]
    if images.shape[1] != config.model.in_channels:
        raise InvalidValue(
            f"train: {config.data} has {images.shape[1]} channels, "
            f"got a model with in_channels = {config.model.in_channels}"
        )
    if int(labels.max()) >= config.model.num_classes:
        raise InvalidValue(
            f"train: {config.data} has {int(labels.max()) + 1} classes, "
            f"got a model with num_classes = {config.model.num_classes}"
        )

    accelerator = Accelerator()
    torch.manual_seed(config.seed)
    model = ATSpikformer(config.model)
    optimizer = _optimizer(model, config)
    batches = len(labels) // config.batch_size
    steps = config.epochs * batches
    if steps < 2:
        raise InvalidValue(
            f"train: expected at least two batches in the run, got {steps} of {config.batch_size} "
            f"from {len(labels)} images and {config.epochs} epochs"
        )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups],
        total_steps=steps, pct_start=max(0.1, 1.5 / steps),
    )  # fmt: skip
    model, optimizer = accelerator.prepare(model, optimizer)
    plain: ATSpikformer = accelerator.unwrap_model(model)
    history: list[dict[str, float]] = []
    if resume:
        history = _restore(folder, config, plain, optimizer, schedule)
        if len(history) == config.epochs:
            log(f"all {config.epochs} epochs of the run are done")
            # The state is whole; the files made from it may not be.
            _save(folder, config, plain, optimizer, schedule, history)

    for epoch in range(len(history), config.epochs):
        model.train()
        _warm_up_linear_score(plain, config, epoch)
        # Seeded by the epoch, so that a resumed run sees what an uninterrupted one would.
        torch.manual_seed(config.seed * 100_003 + epoch)
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        order = torch.randperm(len(labels), generator=generator)
        losses, shares = 0.0, 0.0
        bar = tqdm(
            total=batches, desc=f"epoch {epoch + 1}/{config.epochs}", unit="batch",
            disable=not progress, leave=False, dynamic_ncols=True,
        )  # fmt: skip
        for batch in range(batches):
            index = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            x = _shifted(images[index], config.shift, generator).to(accelerator.device)
            trace = model(x, return_trace=True, firing_rates=False)
            loss, share = training_loss(
                trace, labels[index].to(accelerator.device), config, plain.halting is not None
            )
            if not math.isfinite(loss.item()):
                raise InvalidValue(
                    f"train: the loss must be finite, got {loss.item()} in epoch {epoch + 1}, "
                    f"batch {batch + 1}; a lower learning rate than {config.lr} may help"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            losses, shares = losses + loss.item(), shares + share
            bar.set_postfix(loss=f"{losses / (batch + 1):.3f}", cells=f"{shares / (batch + 1):.0%}")
            bar.update()
        bar.close()
        test = evaluate(plain, splits["test"])
        history.append(
            {"loss": losses / batches, "cells": shares / batches, "test_accuracy": test.accuracy,
             "test_cells": test.cells}
        )  # fmt: skip
        _save(folder, config, plain, optimizer, schedule, history)
        log(
            f"epoch {epoch + 1:>3}/{config.epochs}  loss {losses / batches:6.3f}  "
            f"cells {shares / batches:6.1%}  test accuracy {test.accuracy:6.2%}  "
            f"test cells {test.cells:6.1%}"
        )
        for warning in _warnings(test, config):
            log(f"  warning: {warning}")
    plain.eval()
    return plain, evaluate(plain, splits["test"])


def _warm_up_linear_score(model: ATSpikformer, config: TrainConfig, epoch: int) -> None:
    """The linear score learns in the second half only: earlier it costs accuracy."""
    if model.halting is not None and model.halting.weight is not None:
        model.halting.weight.requires_grad_(epoch >= (config.epochs + 1) // 2)


def _warnings(test: Evaluation, config: TrainConfig) -> list[str]:
    if config.model.halting is None or config.model.depth == 1:
        return []
    found = []
    if max(test.cells_by_block[1:]) == 0:
        found.append("every token stops after block 1; no gradient can undo that")
    for number, share in enumerate(test.cells_by_block[1:], 2):
        if share == 0:
            found.append(f"block {number} is never executed")
    return found


def _save(folder, config, model, optimizer, schedule, history) -> None:
    last = history[-1]
    extra = {
        "data": config.data,
        "test_accuracy": last["test_accuracy"],
        "test_cells": last["test_cells"],
        "epochs": len(history),
        "seed": config.seed,
    }
    save_pretrained(model, folder, extra)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "history": history,
        "config": config.to_dict(),
    }
    # Written beside and moved into place: an interrupted save leaves the last epoch whole.
    torch.save(state, folder / f"{STATE}.tmp")
    (folder / f"{STATE}.tmp").replace(folder / STATE)
    log = {"config": config.to_dict(), "history": history}
    (folder / LOG).write_text(json.dumps(log, indent=2) + "\n")


def _restore(folder: Path, config: TrainConfig, model, optimizer, schedule) -> list:
    path = folder / STATE
    if not path.is_file():
        raise InvalidValue(f"train: --resume expected a file {path}, got none")
    try:
        # weights_only: tensors and plain containers, nothing that could run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is refused anyway
            state = torch.load(path, weights_only=True)
        kept = state["config"]
    except Exception as error:  # torch.load raises many unrelated types on a damaged file
        raise CheckpointError(
            f"{path}: expected the state of an atsnn training run, got: "
            f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        ) from error
    now = json.loads(json.dumps(config.to_dict()))
    kept = json.loads(json.dumps(kept))
    if kept != now:
        ran, wanted = _flat(kept), _flat(now)
        differ = [
            f"{name} = {wanted.get(name)!r} (the run has {ran.get(name)!r})"
            for name in sorted(wanted)
            if wanted.get(name) != ran.get(name)
        ]
        raise InvalidValue(
            f"train: --resume expected the settings of the run in {folder}, got {', '.join(differ)}"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return list(state["history"])


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, those of the model as ``model.NAME``."""
    model = {f"model.{name}": value for name, value in config["model"].items()}
    return {name: value for name, value in config.items() if name != "model"} | model
