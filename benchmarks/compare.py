"""What got slower from one revision to another, beyond the noise measured in the same run.

    make bench-compare                       HEAD~1 against the working tree
    make bench-compare BASE=v0.1 HEAD=main   two revisions
    python benchmarks/compare.py --only engine --threads 2

Exit status: 0 nothing got slower, 1 something did, 2 there was nothing to compare.

**How it is timed.** Each revision is checked out and built under ``build/compare/COMMIT``, once.
Three processes live at the same time, two of base and one of head, and take turns: in every round
each of them times every case (``short_set.py``), in an order that goes through all six. Two of
them wait while one works. So a neighbour on the machine, or a clock that drifts, meets all three.

A case that changed beyond the noise (``noise.py`` says what that is) is timed again, in new
processes and with twice as many rounds, and is named if it changed again in the same direction;
the numbers shown are those of the second look. What this cannot tell apart: a change that comes
with the revision and was written by nobody, as the place of a loop in a cache line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noise import Finding, Times, judge_all

ROOT = Path(__file__).resolve().parent.parent
SHORT_SET = Path(__file__).with_name("short_set.py")
LEAST_ROUNDS = 15  # fewer say too little of their own spread
TURN_S = 0.02  # a turn takes about this long, or one call
PLACES = ("base", "again", "head")
ORDERS = [order for p in itertools.permutations(PLACES) if p < p[::-1] for order in (p, p[::-1])]


class CompareError(Exception):
    """There is nothing to compare; the message says what was expected and what came."""


# -- trees ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A checkout with its extension built in place."""

    name: str
    root: Path


def git(*args: str, root: Path | None = None) -> str:
    done = subprocess.run(
        ["git", *args], cwd=root or ROOT, check=False, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        raise CompareError(f"git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def extension(root: Path) -> Path | None:
    return next((root / "src" / "atsnn").glob("_C*.so"), None)


def working_tree() -> Tree:
    built = extension(ROOT)
    if built is None:
        raise CompareError("the working tree: expected a built extension, got none: make build")
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > built.stat().st_mtime:
        raise CompareError(
            f"the working tree: expected an extension newer than its sources, got one older than "
            f"{newest.relative_to(ROOT)}: make build"
        )
    return Tree("working tree", ROOT)


def at_revision(revision: str, log: Callable[[str], None]) -> Tree:
    """A worktree of the revision, built unless it is."""
    try:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except CompareError as error:
        raise CompareError(f"expected a revision, got {revision!r}: {error}") from error
    root = ROOT / "build" / "compare" / commit
    if not (root / ".git").exists():
        shutil.rmtree(root, ignore_errors=True)
        git("worktree", "add", "--force", "--detach", str(root), commit)
    name = f"{revision} ({commit[:9]})"
    if changed := git("status", "--porcelain", "--untracked-files=no", root=root):
        log(f"{name} was changed in {root.relative_to(ROOT)}: {' '.join(changed.split())}")
    build(root, name, log)
    return Tree(name, root)


def build(root: Path, name: str, log: Callable[[str], None]) -> None:
    """Build the extension in place, if it was not built with this Python and PyTorch."""
    mark = root / "build" / "built-with"
    wanted = f"python {sys.version_info[:3]}, torch {importlib.metadata.version('torch')}\n"
    kept = mark.read_text() if mark.exists() and extension(root) else None
    if kept == wanted:
        return
    output = root / "build" / "log"
    output.parent.mkdir(exist_ok=True)
    log(f"building {name}; output in {output.relative_to(ROOT)}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    with output.open("w") as file:
        done = subprocess.run(
            # What another PyTorch was built with is no good, however new.
            command + ["--force"] * (kept is not None), cwd=root, check=False, stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode or not extension(root):
        end = output.read_text().splitlines()[-5:]
        raise CompareError(f"{name}: expected an extension, got:\n" + "\n".join(end))
    mark.write_text(wanted)


# -- workers --------------------------------------------------------------------------------------


class Worker:
    """A process that times cases of one tree when it is asked; a context manager.

    Attributes
    ----------
    about : dict
        What it said of itself: its cases, and the machine.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, env=dict(environment), text=True, bufsize=1, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # it may be in the middle of a case, and has nothing to lose
        self.process.communicate()

    def send(self, **question: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: said where its answer is read
            self.process.stdin.write(json.dumps(question) + "\n")

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise CompareError(f"{self.name}: expected an answer, got the end, status {status}")
        return json.loads(line)

    def ask(self, **question: Any) -> dict[str, Any]:
        self.send(**question)
        return self.receive()


def start(tree: Tree, threads: int) -> Worker:
    environment = os.environ | {
        "PYTHONPATH": str(tree.root / "src"), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip
    command = [sys.executable, str(SHORT_SET), str(tree.root), str(threads)]
    return Worker(tree.name, command, environment)


@dataclass
class Look:
    """What came of one look at some cases.

    Attributes
    ----------
    times : dict of str to Times
    missing : dict of str to str
        Cases that base cannot run, and why.
    other : list of str
        Cases of which the trees computed different results.
    machine : dict
    """

    times: dict[str, Times] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)


def take(
    starters: Mapping[str, Callable[[], Worker]],
    rounds: int,
    choose: Callable[[list[str]], list[str]],
    log: Callable[[str], None] = lambda line: None,
) -> Look:
    """Time cases in three new processes, in turns.

    Parameters
    ----------
    starters : mapping of str to callable
        Starts the worker of each of :data:`PLACES`.
    rounds : int
    choose : callable
        Chooses among the names of cases.
    """
    look = Look()
    with contextlib.ExitStack() as stack:
        workers = {place: stack.enter_context(starters[place]()) for place in PLACES}
        about = [worker.receive() for worker in workers.values()]
        look.machine = about[0]["machine"]
        calls: dict[str, int] = {}
        for case in choose(about[0]["cases"]):
            log(f"preparing {case}")
            if _prepare(workers, case, look):
                # Warm, and slow enough to be read off a clock.
                once = [w.ask(do="time", case=case, calls=3)["seconds"] for w in workers.values()]
                calls[case] = max(1, round(TURN_S / max(min(once), 1e-9)))
                look.times[case] = Times()
        for number in range(rounds):
            log(f"round {number + 1} of {rounds}, {len(calls)} cases")
            # Cases inside, rounds outside: a burst of noise meets a round of many cases, not many
            # rounds of a case.
            for case, count in calls.items():
                for place in ORDERS[number % len(ORDERS)]:
                    found = workers[place].ask(do="time", case=case, calls=count)
                    getattr(look.times[case], place).append(found["seconds"])
    return look


def _prepare(workers: Mapping[str, Worker], case: str, look: Look) -> bool:
    """Whether all can run the case."""
    for worker in workers.values():  # all at once: nothing is timed yet
        worker.send(do="prepare", case=case)
    found = {place: worker.receive() for place, worker in workers.items()}
    if "missing" in found["base"]:
        look.missing[case] = found["base"]["missing"]
        return False
    if "missing" in found["head"]:
        raise CompareError(
            f"{workers['head'].name}: expected to run {case!r}, as base does, got "
            f"{found['head']['missing']}"
        )
    base, again, head = (found[place]["result"] for place in PLACES)
    if base == again != head:
        look.other.append(case)
    return True


# -- the command ----------------------------------------------------------------------------------


def compare(
    starters: Mapping[str, Callable[[], Worker]],
    rounds: int,
    least: float,
    only: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[Finding], list[Look]]:
    """Look once at all cases, and once more at those that changed."""

    def choose(cases: list[str]) -> list[str]:
        chosen = [case for case in cases if not only or any(text in case for text in only)]
        if not chosen:
            raise CompareError(f"--only: expected part of one of {cases}, got {list(only)}")
        return chosen

    looks = [take(starters, rounds, choose, log)]
    found = judge_all([looks[0].times], least)
    changed = [f.case for f in found if f.verdict != "same"]
    if changed:
        log(f"once more: {', '.join(changed)}")
        looks.append(take(starters, 2 * rounds, lambda cases: changed, log))
        found = judge_all([look.times for look in looks], least)
    return found + [Finding(case, "new") for case in looks[0].missing], looks


def table(findings: Sequence[Finding], title: str):
    """The findings as a table of rich."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(("case", "base ms", "head ms", "change", "noise", "verdict")):
        made.add_column(column, justify="right" if 0 < number < 5 else "left", no_wrap=True)
    styles = {"slower": "bold red", "faster": "green", "new": "dim"}
    for finding in findings:
        row = finding.row()
        numbers = [row[key] for key in ("base_ms", "head_ms", "change_percent", "noise_percent")]
        forms = ("{:.3f}", "{:.3f}", "{:+.1f} %", "{:.1f} %")
        cells = ["-" if n is None else f.format(n) for n, f in zip(numbers, forms, strict=True)]
        made.add_row(finding.case, *cells, finding.verdict, style=styles.get(finding.verdict))
    return made


def last_line(findings: Sequence[Finding]) -> str:
    slower = [f"{f.case} ({f.row()['change_percent']:+.1f} %)" for f in findings
              if f.verdict == "slower"]  # fmt: skip
    return f"slower: {', '.join(slower)}" if slower else "nothing got slower"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def at_least(least: int) -> Callable[[str], int]:
        def integer(text: str) -> int:
            if not text.isdecimal() or int(text) < least:
                raise argparse.ArgumentTypeError(f"expected a number from {least} on, got {text!r}")
            return int(text)

        return integer

    def percent(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected per cent from 0 on, got {text!r}")
        return value / 100

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="HEAD~1", metavar="REV", help="default: HEAD~1")
    parser.add_argument("--head", metavar="REV", help="default: the working tree")
    parser.add_argument(
        "--rounds", type=at_least(LEAST_ROUNDS), default=18, metavar="N",
        help=f"of each case, twice as many where it is timed again; from {LEAST_ROUNDS} on, best a "
        "multiple of 6 (default: 18)",
    )  # fmt: skip
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--least", type=percent, default=0.03, metavar="PERCENT",
        help="changes up to this are never named (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT",
        help="cases whose name has this in it; may be given again",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    return parser.parse_args(argv)


def main(
    argv: Sequence[str] | None = None, starters: Mapping[str, Callable[[], Worker]] | None = None
) -> int:
    """The exit status; ``starters`` other than those of two trees are for tests."""
    from rich.console import Console

    options = parse(argv)
    aside = Console(stderr=True, highlight=False)
    say = functools.partial(aside.print, markup=False, soft_wrap=True)
    names = {"base": options.base, "head": options.head or "working tree"}
    try:
        with aside.status("") as status:
            if starters is None:
                head = at_revision(options.head, say) if options.head else working_tree()
                base = at_revision(options.base, say)
                names = {"base": base.name, "head": head.name}
                trees = {"base": base, "again": base, "head": head}
                starters = {
                    place: functools.partial(start, tree, options.threads)
                    for place, tree in trees.items()
                }
            findings, looks = compare(
                starters, options.rounds, options.least, options.only, status.update
            )
    except CompareError as error:
        say(f"compare: {error}", style="red")
        return 2
    out = Console(highlight=False)
    threads = f"{options.threads} thread" + "s" * (options.threads > 1)
    out.print(table(findings, f"base: {names['base']}, head: {names['head']}, {threads}"))
    for case, reason in looks[0].missing.items():
        out.print(f"base cannot run {case}: {reason}", markup=False)
    if looks[0].other:
        out.print(f"other results than in base: {', '.join(looks[0].other)}", markup=False)
    out.print(last_line(findings), markup=False, soft_wrap=True)
    if options.json:
        write(options, names, findings, looks)
    return int(any(finding.verdict == "slower" for finding in findings))


def write(
    options: argparse.Namespace, names: Mapping[str, str], findings: Sequence[Finding],
    looks: Sequence[Look],
) -> None:  # fmt: skip
    """Findings, and the seconds of every round of every look."""
    found = {
        **names, "threads": options.threads, "rounds": options.rounds, "least": options.least,
        "machine": looks[0].machine, "cases": [finding.row() for finding in findings],
        "missing": looks[0].missing, "other_results": looks[0].other,
        "looks": [{case: vars(times) for case, times in look.times.items()} for look in looks],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        STATUS = main()
    except Exception:
        traceback.print_exc()
        STATUS = 2  # Python's own, 1, would say that something got slower
    sys.exit(STATUS)
