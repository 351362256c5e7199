"""Write docs/results/performance.md and .json from what ``make bars`` measured.

python benchmarks/write_results.py build/bars
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import bars
from bars import BARS, command

RESULTS = Path(__file__).parent.parent / "docs" / "results"
# Best first: what is written is of the best that was run, the others beside it.
LEVELS = ("avx512", "avx2", "portable")
# Kernels over tokens and timesteps, which have no rows of channels to move.
NO_ROWS = ("halting.", "layout.", "matching.pairs", "matching.partners", "merging.members")
HEAD = """\
# The bars, measured

    make bars

Each number is a ratio of medians of {rounds} interleaved rounds, taken after the result was checked
to be right; [benchmarking.md](../benchmarking.md) says how to measure and what not to conclude.
Written by the command above, with `performance.json`; nothing here is typed by hand but what stands
in `benchmarks/bars.py`: the bars, and what limits the work where one is missed.

{machine}

{summary}
"""
OTHER_MACHINE = """

**The bars are set for AVX-512, and the processor of this run has none**: every number below is its
AVX2. What AVX-512 gave on another machine stands in [README.md](README.md) and
[docs/engine.md](../engine.md).
"""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by instruction set, the best one first."""
    found = {level: folder / f"{level}.json" for level in LEVELS}
    read = {level: json.loads(path.read_text()) for level, path in found.items() if path.is_file()}
    if not read:
        raise SystemExit(f"expected {', '.join(f'{v}.json' for v in LEVELS)} in {folder}, got none")
    return read


def gpu_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of what the compiled Triton kernels take, of ``gpu_report.py --json``."""
    if not path.is_file():
        return []
    kernels = json.loads(path.read_text())["kernels"]
    found = []
    for target, group in groupby(sorted(kernels, key=lambda k: k["target"]), lambda k: k["target"]):
        mine = list(group)
        case = f"{target}, {len(mine)} launches"
        found.append(bars.row("gpu_spills", case, sum(k["spills"] > 0 for k in mine)))
        rows = [k for k in mine if not k["kernel"].startswith(NO_ROWS) and "f32" in k["form"]]
        narrow = {k["kernel"] for k in rows if max([*k["loads"], *k["stores"]]) < 128}
        found.append(bars.row("gpu_narrow", f"{target}, {len(rows)} launches", len(narrow)))
    return found


def machine_text(levels: dict[str, dict[str, Any]]) -> str:
    m = next(iter(levels.values()))["machine"]
    peers = ", ".join(f"{name} {version}" for name, version in m["peers"].items())
    text = (
        f"{m['processor']}, {m['cores']} cores, instruction set {m['instruction_set']} (PyTorch: "
        f"{m['pytorch_instruction_set']}); {m['platform']}; Python {m['python']}, torch "
        f"{m['torch']}, triton {m['triton']}, atsnn {m['atsnn']}; peers: {peers}."
    )
    return text if "avx512" in levels else text + OTHER_MACHINE


def page(levels: dict[str, dict[str, Any]], gpu: list[dict[str, Any]]) -> str:
    best, *others = levels
    rows = [*levels[best]["bars"], *gpu]
    beside = {
        level: {row["row"]: row["measured"] for row in levels[level]["bars"]} for level in others
    }
    met = sum(row["met"] for row in rows)
    head = HEAD.format(
        rounds=levels[best]["rounds"], machine=machine_text(levels),
        summary=f"{met} of {len(rows)} rows meet their bar.",
    )  # fmt: skip
    parts = [head]
    for name, bar in BARS.items():
        mine = [row for row in rows if row["name"] == name]
        if not mine:
            continue
        good = sum(row["met"] for row in mine)
        parts.append(
            f"\n## {bar.work}\n\nBar {bar.text}: met by {good} of {len(mine)}. "
            f"Alone: `{command(name)}`.\n"
        )
        if good < len(mine) and bar.limits:
            parts.append(f"What limits it: {bar.limits}.\n")
        columns = ["case", "measured", *others, "met"]
        parts.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in mine:
            case = row["row"].removeprefix(f"{bar.work}; ")
            values = [row["measured"], *(beside[level].get(row["row"]) for level in others)]
            cells = ["-" if v is None else bar.written(v) for v in values]
            parts.append(f"| {' | '.join([case, *cells, 'yes' if row['met'] else '**no**'])} |")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what the suite wrote with --bars")
    args = parser.parse_args()
    levels, gpu = read(args.folder), gpu_rows(args.folder / "gpu.json")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "performance.md").write_text(page(levels, gpu))
    rows = [*next(iter(levels.values()))["bars"], *gpu]
    kept = [{key: row[key] for key in ("row", "measured", "bar", "met")} for row in rows]
    (RESULTS / "performance.json").write_text(json.dumps(kept, indent=1) + "\n")
    missed = sum(not row["met"] for row in rows)
    print(f"wrote {RESULTS}: {len(rows)} rows, {missed} missed")


if __name__ == "__main__":
    main()
