"""``atsnn sweep``: its options and what it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import data
from ..checkpoint import from_pretrained
from ..checks import check_integer
from ..train.options import add_options as add_train_options
from ..train.options import config_of
from ..train.settings import parse, value_of
from .output import draw, table
from .points import EVALUATED, Point, checkpoint_grid, training_grid
from .run import sweep

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run"]


def add_options(sub: argparse.ArgumentParser) -> None:
    add_train_options(sub, of_checkpoint=True)
    sub.add_argument(
        "--vary", nargs="+", required=True, metavar="NAME=V1,V2,...",
        help="settings to vary, all combinations: of a run (ponder_weight, target, lr, seed, ...) "
        "or of the model (eps, halting, score, readout, merge_r, depth, T, ...)",
    )  # fmt: skip
    sub.add_argument(
        "--checkpoint", metavar="NAME",
        help=f"train nothing: run this checkpoint with other {', '.join(EVALUATED)}",
    )  # fmt: skip
    sub.add_argument(
        "--out", type=Path, default=Path("runs/sweep"),
        help="folder for runs and results; a sweep that was cut off goes on in it",
    )  # fmt: skip
    sub.add_argument("--test", action="store_true",
                     help="with --validation: measure on the test images after all")  # fmt: skip
    sub.add_argument("--batch", type=int, nargs="*", default=[1, 16], metavar="SIZE",
                     help="batch sizes to time; none: no timing")  # fmt: skip
    sub.add_argument("--rounds", type=int, default=11, help="interleaved rounds of the timing")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw it, .png or .svg "
                     "(default: sweep.png in the folder)")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the sweep and print its table; what ``--json`` writes."""
    plot = args.plot or args.out / "sweep.png"
    for size in args.batch:
        check_integer("sweep", "--batch", size, at_least=1, at_most=1024)
    vary = _vary(args)
    points: list[Point]
    split = training = None
    name = "test"
    if args.checkpoint is None:
        points = training_grid(config_of(args), vary)
    else:
        points = checkpoint_grid(vary)
        model = from_pretrained(args.checkpoint)
        splits = data.load(args.data, model.config.image_size, args.data_dir)
        split, training = splits["test"], splits["train"]
        if args.validation:
            training, held_out = training.held_out(args.validation)
            if not args.test:
                split, name = held_out, "validation"
        if args.limit is not None:
            split = split[: check_integer("sweep", "--limit", args.limit, at_least=1)]
    result = sweep(
        points, args.out, checkpoint=args.checkpoint, split=split, split_name=name,
        training=training, test=args.test, batches=args.batch, rounds=args.rounds,
        progress=sys.stderr.isatty(), log=console.print,
    )  # fmt: skip
    on = "" if args.checkpoint is None else f" of {args.checkpoint} on {args.data}"
    sheet = table(result, f"Sweep{on}")
    console.print()
    console.print(sheet.rich())
    console.print(sheet.note)
    draw(result, plot)
    console.print(f"wrote {plot}")
    return result


def _vary(args: argparse.Namespace) -> dict[str, list[Any]]:
    return {
        name: [value_of(text) for text in _separated(values)]
        for name, values in parse("sweep", "--vary", args.vary).items()
    }


def _separated(text: str) -> list[str]:
    """At commas outside brackets; policies, which have commas of their own, at semicolons."""
    sign = ";" if ":" in text or ";" in text else ","
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == sign and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]
