"""What the compiled Triton kernels take and move, without a GPU: no time is measured.

make gpu-report                                   writes the tables of docs/gpu.md
python benchmarks/gpu_report.py --only neuron     one operation, every form, in detail
python benchmarks/gpu_report.py --json FILE       everything, to be read by programs
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gpu_cases
from gpu_cases import OPERATIONS, SHAPES, Case, operation
from gpu_compile import Code, Launch, build, record
from gpu_devices import DEVICES, Device

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"


@dataclasses.dataclass
class Built:
    """A launch of a case, compiled."""

    case: Case
    launch: Launch
    target: str
    code: Code

    def row(self) -> dict[str, Any]:
        data, code = self.launch.data(), self.code
        return dict(
            operation=self.case.operation, form=self.case.form, shape=self.case.shape.name,
            kernel=self.launch.name, target=self.target, registers=code.registers,
            spills=code.spills, shared=code.shared, warps=code.warps,
            occupancy=round(code.occupancy(DEVICES[self.target]), 3),
            loads=widths(code.loads, data), stores=widths(code.stores, data), unit=code.unit,
            programs=self.launch.grid[0],
        )  # fmt: skip


def widths(accesses: dict[str, list[int]], data: set[str]) -> list[int]:
    """The narrowest and the widest access to data, in bits; none where no data is accessed."""
    found = [bits for name, all_bits in accesses.items() if name in data for bits in all_bits]
    return [min(found), max(found)] if found else []


def compile_cases(cases: Iterable[Case], targets: Sequence[str]) -> list[Built]:
    """Every launch of every case; what one compiled kernel serves is compiled once."""
    codes: dict[tuple[str, str], Code] = {}
    found = []
    for case in cases:
        _, call = case.call()
        for launch in record(call)[1]:
            for target in targets:
                key = target, launch.key(DEVICES[target].target)
                if key not in codes:
                    codes[key] = build(launch, DEVICES[target])
                found.append(Built(case, launch, target, codes[key]))
    return found


def count_cases(cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """What each case moves and computes, by :mod:`gpu_count` in a process of its own."""
    command = [sys.executable, str(HERE / "gpu_count.py"), *(case.key for case in cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    counts = json.loads(output)
    for case in cases:
        arguments, call = case.call()
        counts[case.key]["least"] = case.least_bytes(arguments, record(call)[0])
    return counts


def bound(case: Case, counts: dict[str, float], device: Device, unit: str) -> str:
    """What limits it at the peaks of a device, each byte being fetched from its memory."""
    seconds = sum(counts.get(kind, 0) / peak for kind, peak in device.peaks.items())
    passes = operation(case.operation).passes
    seconds += passes * counts.get("dot", 0) / device.products[unit]
    return "compute" if seconds > counts["bytes"] / device.bandwidth else "memory"


def span(values: Iterable[float], form: str = "{}") -> str:
    """One value, or the least and the greatest."""
    ordered = sorted(set(values))
    ends = [form.format(v) for v in (ordered[0], ordered[-1])]
    return ends[0] if ends[0] == ends[1] else "-".join(ends)


def bits(pairs: Iterable[list[int]]) -> str:
    found = [width for pair in pairs for width in pair]
    return span(found) if found else "none"


def table(rows: list[dict[str, str]]) -> str:
    """Columns of equal width, so that it reads in a terminal too."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in wide])
    return "".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, wide, strict=True)) + " |\n"
        for line in lines
    )


def kernels_table(rows: list[dict[str, Any]], by: Sequence[str]) -> str:
    """What compiled kernels take; forms that are not told apart by ``by`` share a line."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return table([
        dict(zip(by, key, strict=True)) | {
            "registers": span(r["registers"] for r in group),
            "spills": span(r["spills"] for r in group),
            "shared KiB": span((r["shared"] / 1024 for r in group), "{:.0f}"),
            "warps": span(r["warps"] for r in group),
            "occupancy": span((100 * r["occupancy"] for r in group), "{:.0f}") + " %",
            "loads": bits(r["loads"] for r in group),
            "stores": bits(r["stores"] for r in group),
        }
        for key, group in groups.items()
    ])  # fmt: skip


def work_table(cases: Sequence[Case], counts: dict[str, Any], built: list[Built]) -> str:
    rows = []
    for case in cases:
        found = counts[case.key]
        flops = sum(found.get(kind, 0) for kind in ("f32", "f64", "dot"))
        bounds = {}
        for target, device in DEVICES.items():
            units = {
                b.code.unit for b in built if b.case == case and b.target == target
            } or {"f32"}  # fmt: skip
            unit = min(units, key=lambda u: (u == "f32", u))  # of the launch that has products
            bounds[device.name] = bound(case, found, device, unit)
        rows.append({
            "operation": case.operation, "form": case.form.split(", ")[1],
            "MB moved": f"{found['bytes'] / 1e6:.2f}",
            "of least": f"{found['bytes'] / found['least']:.2f}",
            "MFLOP": f"{flops / 1e6:.1f}", "FLOP/byte": f"{flops / found['bytes']:.1f}",
            "bound": span_of(bounds),
        })  # fmt: skip
    return table(rows)


def span_of(bounds: dict[str, str]) -> str:
    kinds = set(bounds.values())
    if len(kinds) == 1:
        return kinds.pop()
    return "memory; compute on " + ", ".join(
        name.split()[0] for name, kind in bounds.items() if kind == "compute"
    )


def summary(built: list[Built], cases: Sequence[Case], counts: dict[str, Any]) -> str:
    """The generated part of the page."""
    rows = [b.row() for b in built]
    parts = []
    for target, device in DEVICES.items():
        parts.append(f"### {target} ({device.name})\n\n")
        parts.append(kernels_table([r for r in rows if r["target"] == target], ["kernel"]) + "\n")
    for shape in SHAPES.values():
        parts.append(
            f"### Bytes and arithmetic, {shape.name}, float32, "
            f"T = {shape.T}, B = {shape.B}, N = {shape.N}, C = {shape.C}\n\n"
        )
        parts.append(work_table([c for c in cases if c.shape == shape], counts, built) + "\n")
    return "".join(parts)


def write_page(text: str) -> None:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text.rstrip()}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="operations whose names begin so")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--targets", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--no-counts", action="store_true", help="do not count bytes and FLOPs")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--write", action="store_true", help=f"write the tables of {PAGE.name}")
    args = parser.parse_args()
    cases = gpu_cases.cases(args.only, args.shapes)
    if not cases:
        parser.error(f"no such operation, known: {', '.join(OPERATIONS)}")
    counted = [] if args.no_counts else [case for case in cases if case.dtype == "f32"]
    built = compile_cases(cases, args.targets)
    counts = count_cases(counted) if counted else {}
    if args.json:
        found = dict(kernels=[b.row() for b in built], work=counts)
        args.json.write_text(json.dumps(found, indent=1))
    if args.write:
        write_page(summary(built, counted, counts))
        return
    rows = [b.row() | {"shape": b.case.shape.name.replace("pikformer", "")} for b in built]
    for target in args.targets:
        print(f"{target} ({DEVICES[target].name})\n")
        mine = [row for row in rows if row["target"] == target]
        print(kernels_table(mine, ["kernel", "form", "shape"]))
    for shape in SHAPES.values():
        if chosen := [case for case in counted if case.shape == shape]:
            print(f"{shape.name}, float32\n\n{work_table(chosen, counts, built)}")


if __name__ == "__main__":
    main()
