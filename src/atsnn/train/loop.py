"""The training loop, on one process or, under ``accelerate launch``, on several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import data
from ..checkpoint import check_empty_or_ours, from_pretrained
from ..checks import InvalidValue, require
from ..data import Split
from ..nn.model import ATSpikformer, batch_norms
from ..schedule import directed
from .augment import augmented
from .average import moving_average
from .calibration import CALIBRATION, calibrate
from .config import PRECISIONS, TrainConfig
from .evaluation import Evaluation, evaluate, target_of
from .loss import executed_share, training_loss
from .optimizer import optimizer_of, schedule_of
from .state import STATE, Progress, Run
from .statistics import measure_statistics

__all__ = ["splits_of", "train"]

BOARD = "tensorboard"
WHOLE = 0.02  # sum of a token's scores with which the budget begins to fall: nothing halts
STATISTICS = 20  # batches for BatchNorm's statistics after the last epoch; after others a tenth


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    save_every: float = 300.0,
    tensorboard: bool = False,
    progress: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[ATSpikformer, Evaluation]:
    """Train a model, writing a checkpoint to ``folder`` after every epoch.

    Under ``accelerate launch`` it runs on several processes, which average their gradients; each
    takes its part of every batch, and the budget goes by the cells that all of them executed. What
    is evaluated and saved has BatchNorm statistics measured on up to 20 training batches, or with
    ``freeze_norms`` those it began with.

    Parameters
    ----------
    config : TrainConfig
    folder : path
        Receives ``config.json`` and ``model.safetensors`` (the model), ``training.json``
        (settings and history) and ``training.pt`` (what resuming needs).
    resume : bool
        Continue a run that was cut off; it ends with the same weights as an uninterrupted one.
    save_every : float
        Seconds after which what resuming needs is written within an epoch too.
    tensorboard : bool
        Whether to log for TensorBoard, to ``folder/tensorboard``.
    progress : bool
        Whether to show a progress bar.
    log : callable
        Receives one line an epoch.

    Returns
    -------
    model, evaluation
        The trained model in evaluation mode and what it does on the test images, or with
        ``config.validation`` on those that were held out.
    """
    for package in ("accelerate", "tqdm") + (("tensorboard",) if tensorboard else ()):
        require(package, "train", "training")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from tqdm import tqdm

    folder = Path(folder)
    accelerator = Accelerator(
        # A block whose tokens have all halted is skipped, and its weights get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=BOARD if tensorboard else None,
        project_dir=str(folder),
    )
    main, processes = accelerator.is_main_process, accelerator.num_processes
    with accelerator.main_process_first():
        _check_folder(folder, resume, main)
    training, held_out = splits_of(config)

    torch.manual_seed(config.seed)
    model = _model(config)
    optimizer = optimizer_of(model, config)
    batches = len(training) // (config.batch_size * processes)
    steps = config.epochs * batches
    if steps < 2:
        raise InvalidValue(
            f"train: expected at least two batches in the run, got {steps} of "
            f"{config.batch_size * processes} from {len(training)} images and {config.epochs} "
            "epochs"
        )
    schedule = schedule_of(optimizer, config, steps)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    teacher = _teacher(config, accelerator.device)
    run = Run(folder, config, model, moving_average(model, config), optimizer, schedule, Progress())
    if resume:
        run.restore()
        if run.progress.epoch == config.epochs and main:
            log(f"all {config.epochs} epochs of the run are done")
            run.save_checkpoint()  # the state is whole; the files made from it may not be
    if main:
        _make_folder(folder)
    if tensorboard:
        accelerator.init_trackers(BOARD)
    batch = _Batch(config, training, accelerator)
    at = run.progress
    for epoch in range(at.epoch, config.epochs):
        model.train()
        if config.freeze_norms:
            for norm in batch_norms(model):
                norm.eval()
        order = _order(config, epoch, len(training))
        bar = tqdm(
            total=batches, initial=at.batch, desc=f"epoch {epoch + 1}/{config.epochs}",
            unit="batch", disable=not (progress and main), leave=False, dynamic_ncols=True,
        )  # fmt: skip
        saved = time.monotonic()
        while at.batch < batches:
            step = epoch * batches + at.batch
            loss, share = _step(
                run, wrapped, teacher, accelerator, batch(order, step, at.batch), step / steps
            )
            if not math.isfinite(loss):
                raise InvalidValue(
                    f"train: the loss must be finite, got {loss} in epoch {epoch + 1}, "
                    f"batch {at.batch + 1}; a lower learning rate than {config.lr} may help"
                )
            at.loss, at.cells, at.batch = at.loss + loss, at.cells + share, at.batch + 1
            if tensorboard:
                rate = schedule.get_last_lr()[0]
                accelerator.log({"loss": loss, "cells": share, "lr": rate}, step=step + 1)
            bar.set_postfix(loss=f"{at.loss / at.batch:.3f}", cells=f"{at.cells / at.batch:.0%}")
            bar.update()
            if main and time.monotonic() - saved >= save_every:
                run.save_state()
                saved = time.monotonic()
        bar.close()
        if main:
            last = epoch + 1 == config.epochs
            if not config.freeze_norms:
                first = range(min(batches, STATISTICS if last else STATISTICS // 10))
                measure_statistics(
                    run.result, [batch(order, epoch * batches + i, i).images for i in first]
                )
            if config.halts and config.target is not None and last:
                calibrate(run.result, training[:CALIBRATION], config.target)
            found = evaluate(run.result, held_out)
            line = _close_epoch(run, batches, found)
            run.save_state()
            run.save_checkpoint()
            log(line)
            for warning in _warnings(found, config, last):
                log(f"  warning: {warning}")
            if tensorboard:
                values = {f"{_name(config)}/accuracy": found.accuracy,
                          f"{_name(config)}/cells": found.cells}  # fmt: skip
                accelerator.log(values, step=(epoch + 1) * batches)
        else:
            at.next_epoch()
        accelerator.wait_for_everyone()
    accelerator.end_training()
    result = run.result.eval()
    return result, evaluate(result, held_out)


def _check_folder(folder: Path, resume: bool, main: bool) -> None:
    if main:
        # A run that was cut off early has written no checkpoint yet.
        check_empty_or_ours(folder, (STATE, f"{STATE}.tmp", BOARD))
    if not resume and (folder / STATE).exists():
        raise InvalidValue(
            f"train: {folder} holds an earlier run; give --resume to continue it, or another folder"
        )


def _make_folder(folder: Path) -> None:
    """When all else has been checked, which leaves no empty folder behind, and before any work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValue(f"train: expected a folder that can be made, got {error}") from error


def _name(config: TrainConfig) -> str:
    """Of the split that is evaluated after every epoch."""
    return "validation" if config.validation else "test"


def splits_of(config: TrainConfig) -> tuple[Split, Split]:
    """The images to train on and those to evaluate."""
    splits = data.load(config.data, config.model.image_size, config.data_dir)
    training, held_out = splits["train"], splits["test"]
    if config.validation:
        training, held_out = training.held_out(config.validation)
    if config.limit is not None:
        training = training[: config.limit]
    c = config.model
    channels = training.pixels.shape[1]
    if channels != c.in_channels:
        raise InvalidValue(
            f"train: {config.data} has {channels} channels, "
            f"got a model with in_channels = {c.in_channels}"
        )
    target_of(training, c.task)
    classes = training.classes if c.task == "classes" else training.pixel_classes
    if classes > c.num_classes:
        raise InvalidValue(
            f"train: {config.data} has {classes} classes, "
            f"got a model with num_classes = {c.num_classes}"
        )
    return training, held_out


def _model(config: TrainConfig) -> ATSpikformer:
    model = ATSpikformer(config.model)
    if config.init is not None:
        _begin_with(model, config.init)
    if config.target_anneal and model.halting is not None:
        score = WHOLE / (config.model.depth * config.model.T)
        nn.init.constant_(model.halting.beta, math.log(score / (1 - score)))
    return directed(model, config.policy)


def _begin_with(model: ATSpikformer, name: str) -> None:
    """Take the weights of a checkpoint; halting that it has none of begins as it would."""
    theirs = from_pretrained(name).state_dict()
    ours = model.state_dict()
    halting = {key for key in ours if key.startswith("halting.")}
    missing = sorted(set(ours) - set(theirs) - halting)
    foreign = sorted(key for key in set(theirs) - set(ours) if not key.startswith("halting."))
    shapes = [key for key in ours if key in theirs and theirs[key].shape != ours[key].shape]
    if missing or foreign or shapes:
        raise InvalidValue(
            f"train: --init expected the network of the run, got {name} with {len(missing)} "
            f"tensors missing {missing[:3]}, {len(foreign)} foreign {foreign[:3]} and "
            f"{len(shapes)} of another shape {shapes[:3]}"
        )
    model.load_state_dict(ours | {key: theirs[key] for key in ours if key in theirs})


def _teacher(config: TrainConfig, device: torch.device) -> ATSpikformer | None:
    """The network whose answers are asked for."""
    if not config.distill or config.init is None:
        return None
    return from_pretrained(config.init).to(device).eval()


def _order(config: TrainConfig, epoch: int, images: int) -> torch.Tensor:
    return torch.randperm(
        images, generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch)
    )


class _Batch:
    """A process's part of a batch, augmented.

    All that is random is seeded by the step: a resumed run sees what an uninterrupted one would,
    and several processes see together what one would with all of the batch.
    """

    def __init__(self, config: TrainConfig, split: Split, accelerator: Any) -> None:
        self.config, self.split, self.accelerator = config, split, accelerator

    def __call__(self, order: torch.Tensor, step: int, number: int) -> Split:
        a, size = self.accelerator, self.config.batch_size
        whole = size * a.num_processes
        seed = (self.config.seed * 1_000_003 + step) % 2**31
        torch.manual_seed(seed)  # of what is drawn inside the model
        index = order[number * whole : (number + 1) * whole]
        batch = augmented(self.split[index], self.config, torch.Generator().manual_seed(seed))
        part = batch[a.process_index * size : (a.process_index + 1) * size]
        maps = None if part.maps is None else part.maps.to(a.device)
        return Split(part.pixels.to(a.device), part.labels.to(a.device), maps)


def _step(
    run: Run,
    wrapped: Any,
    teacher: ATSpikformer | None,
    accelerator: Any,
    batch: Split,
    progress: float,
) -> tuple[float, float]:
    """One step of the optimiser; the loss and the share of cells over all processes."""
    config = run.config
    dtype = PRECISIONS[config.precision]
    with torch.autocast(accelerator.device.type, dtype, enabled=dtype != torch.float32):
        trace = wrapped(batch.images, return_trace=True, firing_rates=False)
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(batch.images).float().softmax(1)
    share = float(accelerator.reduce(executed_share(trace).float(), "mean"))
    target = target_of(batch, config.model.task).long()
    loss = training_loss(trace, target, config, share, progress, taught)
    run.optimizer.zero_grad()
    accelerator.backward(loss)
    halting = run.model.halting
    early = config.init is None and progress < 0.5
    if early and halting is not None and halting.weight is not None:
        halting.weight.grad = None  # from scratch it is learned late: earlier it costs accuracy
    accelerator.clip_grad_norm_(run.model.parameters(), config.clip)
    run.optimizer.step()
    run.schedule.step()
    if run.average is not None:
        run.average.update_parameters(run.model)
    return float(accelerator.reduce(loss.detach(), "mean")), share


def _close_epoch(run: Run, batches: int, found: Evaluation) -> str:
    """Write the epoch into the history and go on to the next; a line that tells of it."""
    at, config, name = run.progress, run.config, _name(run.config)
    loss, cells = at.loss / batches, at.cells / batches
    entry = {
        "loss": loss, "cells": cells, f"{name}_accuracy": found.accuracy,
        f"{name}_cells": found.cells,
    }  # fmt: skip
    line = (
        f"epoch {at.epoch + 1:>3}/{config.epochs}  loss {loss:6.3f}  cells {cells:6.1%}  "
        f"{name} accuracy {found.accuracy:6.2%}  {name} cells {found.cells:6.1%}"
    )
    if found.mean_iou is not None:
        entry[f"{name}_mean_iou"] = found.mean_iou
        line += f"  mean IoU {found.mean_iou:6.2%}"
    at.history.append(entry)
    at.next_epoch()
    return line


def _warnings(found: Evaluation, config: TrainConfig, last: bool) -> list[str]:
    if not config.halts or config.model.depth == 1:
        return []
    later = found.cells_by_block[1:]
    if max(later) == 0:
        return [f"every token stops after block 1{_way_out(config, last)}"]
    return [f"block {n} is never executed" for n, share in enumerate(later, 2) if share == 0]


def _way_out(config: TrainConfig, last: bool) -> str:
    """Why every token stops after block 1, as far as it is known, and what may help."""
    if config.target is None:
        return (
            ", where scores have no gradient; a smaller --ponder-weight, a longer --ponder-warmup "
            "or a budget, --target without --no-budget, may help"
        )
    if last:  # it was calibrated
        return (
            f": beta is set for --target {config.target:g}, and with a lower one more cells run "
            "than that; a larger --target lets tokens go on"
        )
    return (
        ", where scores have no gradient; at the end beta is set for --target, but blocks that "
        "do not run learn nothing until then; --target-anneal, a smaller --ponder-weight or a "
        "larger --target may help"
    )
