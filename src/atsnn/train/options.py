"""The options of ``atsnn train``, which ``atsnn sweep`` shares, and the run they describe."""

from __future__ import annotations

import argparse
import dataclasses
import shlex

from ..checks import check_choice
from ..data import DATASETS
from ..nn.config import SpikformerConfig
from ..options import BUDGET
from .config import PRECISIONS, TrainConfig

__all__ = ["USUAL_DATA", "add_data_options", "add_options", "command_of", "config_of", "option_of"]

USUAL_DATA = "digits"  # where nothing says another


def add_data_options(sub: argparse.ArgumentParser, *, of_checkpoint: bool = False) -> None:
    """Which images; ``of_checkpoint``: by default those that the checkpoint was trained on."""
    usual = f"; default: that of the checkpoint, or {USUAL_DATA} where it names none"
    sub.add_argument(
        "--data", default=None if of_checkpoint else USUAL_DATA,
        help=f"data set: {', '.join(DATASETS)}{usual if of_checkpoint else ''}",
    )  # fmt: skip
    sub.add_argument("--data-dir", help="folder with the files of the data set")


def add_options(sub: argparse.ArgumentParser, *, of_checkpoint: bool = False) -> None:
    """Everything a :class:`TrainConfig` says; ``of_checkpoint``: beside a checkpoint to run."""
    add_data_options(sub, of_checkpoint=of_checkpoint)
    sub.add_argument(
        "--validation", type=int, default=0, metavar="IMAGES",
        help="hold out so many training images and leave the test images alone",
    )  # fmt: skip
    sub.add_argument("--limit", type=int, help="train on the first LIMIT images only")
    sub.add_argument(
        "--init", metavar="CHECKPOINT",
        help="begin with the weights of a checkpoint, such as a plain Spikformer's",
    )  # fmt: skip
    sub.add_argument(
        "--distill", type=float, default=0.0, metavar="SHARE",
        help="share of the loss that asks for that checkpoint's answers, not the labels",
    )  # fmt: skip
    sub.add_argument("--freeze-norms", action="store_true",
                     help="keep that checkpoint's BatchNorm statistics throughout")  # fmt: skip
    sub.add_argument("--epochs", type=int, default=20, help="passes over the images")
    sub.add_argument("--batch-size", type=int, default=64, help="images a step, of each process")
    sub.add_argument("--lr", type=float, default=0.02, help="peak learning rate")
    sub.add_argument("--warmup", type=float, default=0.15,
                     help="share of the steps in which the learning rate rises")  # fmt: skip
    sub.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW")
    sub.add_argument("--label-smoothing", type=float, default=0.1, help="of the cross-entropy")
    sub.add_argument("--ema", type=float, default=0.0, metavar="DECAY",
                     help="decay a step of the weights' moving average; 0: none")  # fmt: skip
    sub.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32",
                     help="bf16: autocast")  # fmt: skip
    sub.add_argument("--shift", type=int, default=2, help="random shift of the images in pixels")
    sub.add_argument("--flip", action="store_true", help="mirror half of the images")
    sub.add_argument("--erase", type=float, default=0.0, metavar="SHARE",
                     help="erase a random rectangle in this share of the images")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="of weights and batches")
    sub.add_argument("--threads", type=int, help="threads to use (default: PyTorch's)")
    model = sub.add_argument_group("model")
    model.add_argument(
        "--task", default="classes", choices=("classes", "pixels"),
        help="classify images, or each pixel of data sets with such labels",
    )  # fmt: skip
    model.add_argument("--image-size", type=int, default=32, help="images are resized to this")
    model.add_argument("--embed-dim", type=int, default=64, help="channels of a token")
    model.add_argument("--depth", type=int, default=4, help="blocks")
    model.add_argument("--heads", type=int, default=4, help="attention heads")
    model.add_argument("--timesteps", type=int, default=4, help="timesteps T")
    halting = sub.add_argument_group(
        "halting and merging",
        "After every block each token (a patch of the image) gets a halting score in 0..1. Scores "
        "add up over blocks and timesteps, and once the sum comes close to 1 the token halts: "
        "later blocks do without it. A cell is one token in one block at one timestep; the share "
        "of cells that run is the cost. docs/method.md has the formulas, docs/training.md the "
        "recipes.",
    )
    halting.add_argument(
        "--halting", default="rectangle", choices=("rectangle", "depth", "sequential", "none"),
        help="over what a token's scores add up: blocks and timesteps so far (rectangle), the "
        "blocks of each timestep on its own (depth), all cells one after the other, timestep by "
        "timestep (sequential); none: a plain Spikformer",
    )  # fmt: skip
    halting.add_argument(
        "--score", default="first", choices=("first", "mean", "linear", "constant"),
        help="what a token's score is computed from: its first channel, the mean of its channels, "
        "a learned linear map of them, or nothing (constant: the same for all tokens)",
    )  # fmt: skip
    halting.add_argument(
        "--readout", default="mean-field", choices=("mean-field", "last"),
        help="what the classifier sees of a token: the mean of the blocks it ran, weighted by "
        "their scores, or its last one alone",
    )  # fmt: skip
    halting.add_argument(
        "--eps", type=float, default=0.01,
        help="a token halts once its scores add up to 1 - EPS; larger: earlier",
    )  # fmt: skip
    halting.add_argument(
        "--target", type=float, default=0.6,
        help="the budget: share of cells to run at most, from 1/DEPTH, as block 1 always runs "
        "(sequential: 1/(DEPTH TIMESTEPS)), to 1",
    )  # fmt: skip
    halting.add_argument("--target-anneal", type=float, default=0.0, metavar="SHARE",
                         help="share of the steps in which the budget falls to that")  # fmt: skip
    halting.add_argument(
        "--ponder-weight", type=float, default=1.0,
        help="how hard the loss pulls the number of blocks a token runs towards the budget, or "
        "with --no-budget down",
    )  # fmt: skip
    halting.add_argument("--ponder-warmup", type=float, default=0.0,
                         help="share of the steps in which that weight rises from 0")  # fmt: skip
    halting.add_argument(
        "--no-budget", action="store_true", help="weigh the ponder loss alone, without a target"
    )
    halting.add_argument(
        "--policy", metavar="RULE",
        help="halt by a rule instead: static:4,3,2,1 (blocks at each timestep), random:0.6 (share "
        "of cells), top:0.8,0.6,0.4 (share of tokens that goes on after each block); with "
        "--halting rectangle or depth",
    )  # fmt: skip
    halting.add_argument("--merge-r", type=int, default=0, help="pairs to merge at each boundary")
    halting.add_argument("--merge-threshold", type=float,
                         help="merge all pairs more similar than this instead")  # fmt: skip
    halting.add_argument("--merge-match", default="similar", choices=("similar", "random"),
                         help="how partners are found")  # fmt: skip


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The run that the options describe."""
    check_choice("train", "--data", args.data, DATASETS)
    known = DATASETS[args.data]
    model = SpikformerConfig(
        image_size=args.image_size, in_channels=known.channels,
        num_classes=known.classes + (args.task == "pixels"),  # and the background
        embed_dim=args.embed_dim, depth=args.depth, num_heads=args.heads, T=args.timesteps,
        halting=None if args.halting == "none" else args.halting, score=args.score,
        readout=args.readout, eps=args.eps, merge_r=args.merge_r,
        merge_threshold=args.merge_threshold, merge_match=args.merge_match, task=args.task,
    )  # fmt: skip
    return TrainConfig(
        model, data=args.data, data_dir=args.data_dir, epochs=args.epochs,
        batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing, shift=args.shift, flip=args.flip, erase=args.erase,
        limit=args.limit, validation=args.validation, seed=args.seed, warmup=args.warmup,
        ema=args.ema, precision=args.precision, init=args.init, distill=args.distill,
        freeze_norms=args.freeze_norms,
        policy=args.policy,
        target=None if args.no_budget else args.target, ponder_weight=args.ponder_weight,
        ponder_warmup=args.ponder_warmup, target_anneal=args.target_anneal,
    )  # fmt: skip


# Options by the setting they set, where the name is another or a value is written otherwise.
_NAMES = {"num_heads": "heads", "T": "timesteps"}
_DERIVED = {"in_channels", "num_classes"}  # by the data set


def option_of(name: str) -> str:
    """The option that sets a setting, as ``argparse`` calls it."""
    return _NAMES.get(name, name)


def command_of(config: TrainConfig) -> str:
    """The ``atsnn train`` that makes this run, options at their defaults left out.

    Settings that no option reaches are named behind it.
    """
    parser = argparse.ArgumentParser()
    add_options(parser)
    usual = parser.parse_args([])
    words, beyond = ["atsnn train"], []
    values = {**dataclasses.asdict(config.model), **dataclasses.asdict(config)}
    del values["model"]
    without_effect = () if config.halts else BUDGET
    default = config_of(usual)
    defaults = {**dataclasses.asdict(default.model), **dataclasses.asdict(default)}
    for name, value in values.items():
        if name in _DERIVED or value == defaults[name]:
            continue
        if value is not None and name in without_effect:
            continue
        option = option_of(name)
        if name == "target" and value is None:
            words.append("--no-budget")
        elif not hasattr(usual, option):
            beyond.append(f"{name}={value}")
        elif value is True:
            words.append(f"--{option.replace('_', '-')}")
        else:
            text = "none" if value is None else str(value)
            words.append(f"--{option.replace('_', '-')} {shlex.quote(text)}")
    return " ".join(words) + (f"  # and {', '.join(beyond)}" if beyond else "")
