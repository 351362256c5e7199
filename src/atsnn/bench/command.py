"""What ``atsnn bench`` does with its options."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..checks import InvalidValue, check_choice, check_integer
from ..nn.config import SpikformerConfig
from ..sheets import Sheet
from .growth import AXES, measure_growth
from .halting import BACKENDS
from .overheads import TOKENS, measure_overheads
from .page import page
from .plots import Plot, bench_plots, growth_plots, overhead_plots, save
from .run import bench, steps
from .subject import RATES, Subject, of_checkpoint, of_config, read_config, with_changes
from .tables import bench_sheets, growth_sheets, machine_line, overhead_sheets

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run"]

BATCHES = {"bench": (1, 32), "overheads": (1, 4, 16), "growth": (1,)}
UNTRAINED_HALTED = (0.2, 0.4, 0.6)
Log = Callable[[str], None]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print, and write pictures and page; returns what ``--json`` writes."""
    if args.growth is not None:
        result, head, sections, lines = _growth(args, console)
    elif args.overheads:
        result, head, sections, lines = _overheads(args, console)
    else:
        result, head, sections, lines = _bench(args, console)
    command = shlex.join(["atsnn", *args.argv])
    result["command"] = command
    console.print(f"[bold]atsnn bench[/bold]  {head}")
    console.print(machine_line(result["machine"]))
    for line in lines:
        console.print(f"checked first: {line}", markup=False)
    console.print()
    plots: list[Plot] = []
    for _, sheets, drawn in sections:
        plots += drawn
        for sheet in sheets:
            console.print(sheet.rich())
            if sheet.note:
                console.print(sheet.note + "\n", markup=False)
    if args.plot is not None:
        save(plots, args.plot)
        console.print(f"wrote {args.plot}", markup=False)
    if args.html is not None:
        text = page(f"atsnn bench: {head}", lines, sections, result["machine"], command)
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(text)
        console.print(f"wrote {args.html}", markup=False)
    return result


Found = tuple[dict[str, Any], str, list[tuple[str, list[Sheet], list[Plot]]], list[str]]


def _bench(args: argparse.Namespace, console: Console) -> Found:
    batches, backends = args.batch or BATCHES["bench"], args.backends or BACKENDS[:2]
    with _progress(console, 1) as (log, expect):
        log("loading")
        subject = _subject(args)
        subject.model.execution = args.execution
        halted = args.halted or (() if subject.trained else _usual_halted(subject))
        expect(1 + steps(batches, backends, subject.trained))
        result = bench(
            subject, halted=halted, batches=batches, backends=backends,
            rounds=args.rounds, log=log,
        )  # fmt: skip
    real = args.config is None
    result["checkpoint"] = args.checkpoint if real else None
    result["data"] = args.data if real else None
    sheets, plots = bench_sheets(result), bench_plots(result)
    if subject.controls:
        sheets[0].note = (
            "On these digits one block nearly suffices and a constant schedule does as well as a "
            "learned one: nothing is claimed about adaptivity here."
        )
    return result, subject.title, [("What halting saves", sheets, plots)], result["gate"]


def _usual_halted(subject: Subject) -> Sequence[float]:
    """Of an untrained network: those shares that its depth allows, as every block 1 runs."""
    most = 1 - 1 / subject.model.config.depth
    return [share for share in UNTRAINED_HALTED if share <= most] or [0.0]


def _overheads(args: argparse.Namespace, console: Console) -> Found:
    batches = args.batch or BATCHES["overheads"]
    tokens = args.tokens or TOKENS
    halted = args.halted or [0.4]
    if len(halted) > 1:
        raise InvalidValue(f"bench: --overheads takes one share of --halted, got {len(halted)}")
    with _progress(console, 2 + 3 * len(batches) + len(tokens)) as (log, _):
        log("loading")
        subject = _subject(args)
        result = measure_overheads(
            subject, halted=halted[0], batches=batches, tokens=tokens, rounds=args.rounds, log=log
        )
    sections = [("What halting and merging cost", overhead_sheets(result), overhead_plots(result))]
    return result, f"overheads, {subject.title}", sections, result["gate"]


def _growth(args: argparse.Namespace, console: Console) -> Found:
    if args.config is None:
        raise InvalidValue(
            "bench: --growth changes a configuration; expected --config, such as spikformer_4_384"
        )
    axes = args.growth or list(AXES)
    for axis in axes:
        check_choice("bench", "--growth", axis, AXES)
    (batch,) = _one(args.batch or BATCHES["growth"], "--batch")
    values = dict(AXES)
    if args.tokens:
        values["tokens"] = tuple(args.tokens)
    with _progress(console, sum(len(values[axis]) + 1 for axis in axes)) as (log, _):
        result = measure_growth(
            str(args.config), _config(args), axes, rates=_rates(args), batch=batch, values=values,
            rounds=args.rounds, log=log,
        )  # fmt: skip
    sections = [("How cost grows", growth_sheets(result), growth_plots(result))]
    return result, f"growth, {result['subject']['title']}, batch {batch}", sections, []


def _one(values: Sequence[int], option: str) -> Sequence[int]:
    if len(values) != 1:
        raise InvalidValue(f"bench: --growth takes one {option}, got {len(values)}")
    return values


def _subject(args: argparse.Namespace) -> Subject:
    if args.config is not None:
        return of_config(str(args.config), _config(args), _rates(args))
    for option in ("set", "rates"):
        if getattr(args, option):
            raise InvalidValue(
                f"bench: --{option} belongs to an untrained network; expected --config with it"
            )
    if args.limit is not None:
        check_integer("bench", "--limit", args.limit, at_least=1)
    subject = of_checkpoint(args.checkpoint, args.data, args.data_dir, args.limit)
    if (args.halted or args.overheads) and subject.model.config.halting is None:
        # A synthetic pattern needs a rule to go by; the model's own scores halt nothing.
        subject.model = with_changes(subject.model, halting="rectangle")
    return subject


def _rates(args: argparse.Namespace) -> tuple[float, float]:
    return tuple(args.rates) if args.rates else RATES


def _config(args: argparse.Namespace) -> SpikformerConfig:
    changes = {}
    for change in args.set or ():
        name, sign, text = change.partition("=")
        if not sign or not name:
            raise InvalidValue(f"bench: --set must be name=value, got {change!r}")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    return read_config(args.config, changes)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[tuple[Log, Callable[[int], None]]]:
    """A bar where there is a terminal: ``log`` goes a step on, ``expect`` sets their number."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=total, completed=-1)

        def log(line: str) -> None:
            bar.update(task, description=line, advance=1)

        yield log, lambda number: bar.update(task, total=number)
