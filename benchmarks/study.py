"""Does halting pay? The runs behind docs/results/study.md.

    python benchmarks/study.py                         every part, its runs and what is done
    python benchmarks/study.py fashion --seeds 0 1     train and test; goes on where it stopped
    python benchmarks/study.py fashion --latency       time seed 0's models, on a quiet machine
    python benchmarks/study.py --all --jobs 2          all of it, a process for each core

A part trains every method from scratch, or trains a plain Spikformer and goes on from its weights
with every method, the plain one too: all have the same epochs, images and seeds, so what is
compared is the method and not the luck of a start. Results are rows of
docs/results/study/PART-SEED.json, of which ``study_page.py`` makes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Before PyTorch is imported: with AMX sums of bfloat16 are taken in another order, and a network
# comes out as one of another seed would. Without it rows are the same to the last bit on Xeons.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

from study_parts import FIRST, PARTS, Part

from atsnn import data
from atsnn.checkpoint import load_trained
from atsnn.insight import insight
from atsnn.insight import to_dict as detail_of
from atsnn.measure import machine
from atsnn.sweep import Point, sweep
from atsnn.sweep.measure import timed

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "study"
TIMED = (1, 16)


def run(name: str, seed: int, runs: Path, methods: Sequence[str] | None) -> None:
    """Train and test what is not yet, for a seed; a row is written as soon as it is known."""
    part = PARTS[name]()
    folder = part.folder(seed, runs)
    for label, point in _points(part, seed, runs, methods).items():
        begun, fresh = time.monotonic(), not (folder / point.key).exists()
        (row,) = sweep([point], folder, test=True, batches=(), log=_say)["rows"]
        row = {key: value for key, value in row.items() if key != "settings"} | {"label": label}
        row |= _learned(folder / point.key)
        row |= _detail(point, folder)
        if fresh:  # a run that was cut off, or trained before, took longer than this call
            row["minutes"] = round((time.monotonic() - begun) / 60, 1)
        _keep(name, seed, [row])


def latency(name: str, runs: Path, methods: Sequence[str] | None) -> None:
    """Time the trained models of seed 0 in turns."""
    part = PARTS[name]()
    folder, points = part.folder(0, runs), _points(part, 0, runs, methods)
    rows = [row for row in read(name, 0) if row["label"] in points]
    models = {label: load_trained(folder / p.key) for label, p in points.items()}
    c = part.base
    images = data.load(c.data, c.model.image_size, c.data_dir)["test"][: max(TIMED)].images
    for label, found in timed(models, images, TIMED, rounds=21).items():
        for row in rows:
            if row["label"] == label:
                row |= {"latency_ms": found, "latency_machine": machine()}
    _keep(name, 0, rows)


def read(name: str, seed: int) -> list[dict[str, Any]]:
    """The rows that there are for a seed."""
    path = _path(name, seed)
    return list(json.loads(path.read_text())["rows"]) if path.is_file() else []


def _path(name: str, seed: int) -> Path:
    return RESULTS / f"{name}-{seed}.json"


def _keep(name: str, seed: int, rows: list[dict[str, Any]]) -> None:
    """Write rows beside those of other labels; what an older row of a label has on top stays."""
    kept = {row["label"]: row for row in read(name, seed)}
    for row in rows:
        old = kept.get(row["label"], {})
        if old.get("accuracy") == row["accuracy"]:  # measured again, not trained again
            row = {**old, **row}
        kept[row["label"]] = row
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"part": name, "seed": seed, "rows": list(kept.values())}
    _path(name, seed).write_text(json.dumps(found, indent=1) + "\n")


def _points(part: Part, seed: int, runs: Path, methods: Sequence[str] | None) -> dict[str, Point]:
    """The runs of those methods by label, and what they go on from."""
    points = part.points(seed, runs)
    unknown = sorted(set(methods or ()) - set(points))
    if unknown:
        raise SystemExit(f"expected methods of seed {seed} among {list(points)}, got {unknown}")
    return {
        label: point
        for label, point in points.items()
        if methods is None or label in (FIRST, *methods)
    }


def _config(point: Point) -> Any:
    assert point.config is not None
    return point.config


def _learned(run: Path) -> dict[str, float]:
    """What the last epoch gave on the validation images."""
    last = json.loads((run / "training.json").read_text())["history"][-1]
    return {key: value for key, value in last.items() if key.startswith("validation_")}


def _detail(point: Point, folder: Path) -> dict[str, Any]:
    """Of a model that learned to halt: for which images and tokens, and what was lost by it."""
    c = _config(point)
    if not c.halts:
        return {}
    images = data.load(c.data, c.model.image_size, c.data_dir)["test"]
    return {"detail": detail_of(insight(load_trained(folder / point.key), images))}


def everything(runs: Path, jobs: int) -> None:
    """Every seed of every part, in ``jobs`` processes of one thread, then the timing.

    Parts that share a folder of runs are not run at once: one trains what the other waits for.
    """
    tasks: dict[Path, list[list[str]]] = {}
    for name, part in _parts().items():
        for seed in range(max(part.seeds, part.more)):
            tasks.setdefault(part.folder(seed, runs), []).append([name, "--seeds", str(seed)])
    command = [sys.executable, __file__, "--runs", str(runs)]
    # As `make bench-X` has it: glibc is not to give memory back and fault it in again.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(2**32),
                        "MALLOC_MMAP_THRESHOLD_": str(2**25)}  # fmt: skip

    def work(queue: list[list[str]]) -> list[list[str]]:
        return [task for task in queue if subprocess.run([*command, *task], env=env).returncode]

    with ThreadPoolExecutor(jobs) as pool:
        failed = [task for left in pool.map(work, tasks.values()) for task in left]
    if failed:
        raise SystemExit(f"failed: {failed}")
    for name in PARTS:
        subprocess.run([*command, name, "--latency"], env=env, check=True)


def _parts() -> dict[str, Part]:
    return {name: make() for name, make in PARTS.items()}


def overview() -> None:
    """Every part, its methods and the seeds that are done."""
    total = 0.0
    for name, part in _parts().items():
        print(f"{name}: {part.title}, {part.about}")
        most = max(part.seeds, part.more)
        found = {seed: {row["label"]: row for row in read(name, seed)} for seed in range(most)}
        for label in part.labels:
            wanted = [s for s in range(most) if label == FIRST or part.runs_on(label, s)]
            minutes = sum(found[s][label].get("minutes", 0) for s in wanted if label in found[s])
            done, total = sum(label in found[s] for s in wanted), total + minutes
            print(f"  {label:<34} {done} of {len(wanted)} seeds, {minutes:4.0f} core minutes")
    print(f"all that is done: {total / 60:.1f} core hours")


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS, nargs="?", help="none: say what there is")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="these only")
    parser.add_argument("--latency", action="store_true", help="time what seed 0 trained")
    parser.add_argument("--all", action="store_true", help="everything that is not done yet")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes for --all")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    if args.all:
        everything(args.runs, args.jobs)
    elif args.part is None:
        overview()
    elif args.latency:
        latency(args.part, args.runs, args.methods)
    else:
        for seed in args.seeds:
            run(args.part, seed, args.runs, args.methods)


if __name__ == "__main__":
    main()
