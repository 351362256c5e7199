"""What ``atsnn`` checks of its options before any work: that each has an effect, and its files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from .checks import InvalidValue

__all__ = ["check_effects", "check_files"]

BUDGET = ("target", "target_anneal", "ponder_weight", "ponder_warmup")
OF_CHECKPOINT = ("checkpoint", "data", "data_dir", "limit")
# Of the options of training those that running a checkpoint takes too.
OF_IMAGES = ("data", "data_dir", "validation", "limit", "threads")

ENDINGS = {"plot": (".png", ".svg"), "html": (".html", ".htm"), "out": (".png",), "json": ()}


def check_effects(args: argparse.Namespace, given: Iterable[str], training: Iterable[str]) -> None:
    """Refuse options that another one leaves without effect.

    Parameters
    ----------
    args : argparse.Namespace
    given : iterable of str
        The options that the command line names, as ``args`` calls them.
    training : iterable of str
        The options of ``atsnn train``.
    """
    given = set(given)

    def refuse(options: Iterable[str], why: str) -> None:
        for option in options:
            if option in given:
                raise InvalidValue(
                    f"{args.command}: {why}; expected no --{option.replace('_', '-')} with it"
                )

    if args.command == "bench":
        if args.config is not None:
            refuse(OF_CHECKPOINT, "--config measures an untrained network on random images")
        if args.growth is not None:
            refuse(
                ("halted", "backends", "execution"), "--growth has patterns and backends of its own"
            )
            if args.growth and "tokens" not in args.growth:
                refuse(("tokens",), f"--growth {' '.join(args.growth)} does not vary tokens")
        elif args.overheads:
            refuse(("backends", "execution"), "--overheads has backends of its own")
        else:
            refuse(("tokens",), "only --growth and --overheads vary tokens")
    if args.command == "sweep":
        if args.checkpoint is not None:
            refuse((o for o in training if o not in OF_IMAGES), "--checkpoint trains nothing")
        if args.test and not args.validation:
            raise InvalidValue(
                "sweep: --test belongs to --validation; expected both, got --test alone, without "
                "which it measures on the test images anyway"
            )
    if args.command in ("train", "sweep"):
        if args.policy is not None:
            refuse(BUDGET, "--policy halts by a rule, which learns nothing")
        elif args.command == "train" and args.halting == "none":
            refuse(BUDGET, "--halting none halts nothing")
        if args.no_budget:
            refuse(("target", "target_anneal"), "--no-budget trains towards no share of cells")


def check_files(args: argparse.Namespace) -> None:
    """Before minutes of work: files of the right kind, in folders that can be made.

    Nothing is left of it, as the command may still fail.
    """
    for option, usual in ENDINGS.items():
        path: Path | None = getattr(args, option, None)
        if path is None or (option == "out" and args.command != "show"):
            continue  # of training and sweeps it is a folder, which they check
        endings = (".png",) if (option, args.command) == ("plot", "eval") else usual
        if endings and path.suffix.lower() not in endings:
            raise InvalidValue(
                f"{args.command}: --{option} must end in {' or '.join(endings)}, got {path}"
            )
        if path.is_dir():
            raise InvalidValue(f"{args.command}: --{option} must be a file, got the folder {path}")
        new, made = not path.exists(), [p for p in path.parents if not p.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise InvalidValue(
                f"{args.command}: --{option}: expected a file that can be written, got {error}"
            ) from error
        if new:
            path.unlink()
        for folder in made:
            folder.rmdir()
