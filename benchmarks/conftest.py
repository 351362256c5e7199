"""The protocol: correctness first, then interleaved timing, and tables of ratios at the end."""

from __future__ import annotations

import json
from pathlib import Path

import bars
import pytest
import torch

from atsnn import available_backends, measure

GPU = "bench_gpu"  # what is measured there; every other file measures the CPU


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: time the Triton kernels (under TRITON_INTERPRET=1 run them on small shapes)",
    )  # fmt: skip
    parser.addoption(
        "--rounds", type=int, default=15,
        help="interleaved rounds of each timing (default: 15; fewer than 10 is no measurement)",
    )  # fmt: skip
    parser.addoption(
        "--bars", type=Path, metavar="FOLDER",
        help="add the rows of all bars to a file in FOLDER, named by the instruction set",
    )  # fmt: skip


def pytest_configure(config):
    reason = available_backends()["triton"]
    if config.getoption("--device") == "cuda" and reason is not True:
        raise pytest.UsageError(f"--device cuda needs Triton: {reason}")


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") == "cuda"
    chosen = [item for item in items if (item.path.stem == GPU) == on_gpu]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


# Rows by file and columns.
TABLES: dict[tuple[str, tuple[str, ...]], list[dict[str, object]]] = {}


@pytest.fixture
def report(request):
    """Collect one row of a closing table of the file: one for each set of columns."""

    def add(row: dict[str, object]) -> None:
        TABLES.setdefault((request.path.stem, tuple(row)), []).append(row)

    return add


BARS: list[dict[str, object]] = []


@pytest.fixture
def bar():
    """Hold a measurement against a bar of ``bars.BARS``; returns "yes" or "NO"."""

    def hold(name: str, case: str, measured: float) -> str:
        BARS.append(bars.row(name, case, measured))
        return "yes" if BARS[-1]["met"] else "NO"

    return hold


@pytest.fixture(scope="session")
def rounds(pytestconfig):
    return pytestconfig.getoption("--rounds")


class Limits:
    """What the machine can do, measured beside the work: a copy and a matrix product."""

    def __init__(self) -> None:
        self.a, self.b = torch.randn(1024, 384), torch.randn(384, 1536)
        self.x = torch.randn(4 << 20)

    @property
    def functions(self):
        """To be timed in turns with the work."""
        return {"clone": self.x.clone, "matmul": lambda: self.a @ self.b}

    def bytes_share(self, moved: float, work, times) -> float:
        """Bytes a second of the work over those of the copy."""
        copied = 2 * self.x.numel() * self.x.element_size() / times["clone"].median
        return moved / work.median / copied

    def flops_share(self, flops: float, work, times) -> float:
        """FLOP/s of the work over those of the matrix product."""
        (m, k), n = self.a.shape, self.b.shape[1]
        return flops / work.median / (2 * m * k * n / times["matmul"].median)


@pytest.fixture(scope="session")
def limits():
    return Limits()


@pytest.fixture
def keep(benchmark, limits):
    """Keep the timings of a case in the JSON, with its bytes and FLOPs beside the limits.

    Returns the columns of a table that say so. ``moved`` are the bytes that must be read and
    written, ``flops`` those of the dense arithmetic the work stands for; ``times`` holds those of
    ``limits.functions`` too.
    """

    def columns(times, name="ours", *, moved=0.0, flops=0.0, prefix=""):
        ours = times[name]
        found = {}
        if moved:
            found["bytes/clone"] = limits.bytes_share(moved, ours, times)
        if flops:
            found["FLOPs/matmul"] = limits.flops_share(flops, ours, times)
        benchmark.extra_info.update({f"{prefix}{k}": t.to_dict() for k, t in times.items()})
        benchmark.extra_info.update(
            {f"{prefix}bytes": moved, f"{prefix}flops": flops, f"{prefix}share of limits": found}
        )
        spread = max(t.spread for t in times.values())
        return {k: f"{v:.2f}" for k, v in found.items()} | {"spread": f"{100 * spread:.0f} %"}

    return columns


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    with measure.threads(request.param) as number:
        yield number


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["atsnn"] = measure.machine() | {"peers": peers()}


def peers():
    """Versions of the packages measured against."""
    return {name: measure.version(name) for name in ("spikingjelly", "snntorch", "norse")}


def pytest_sessionfinish(session):
    folder = session.config.getoption("--bars")
    if folder is None or not BARS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    machine = measure.machine() | {"peers": peers()}
    path = folder / f"{machine['instruction_set']}.json"
    # Each file is run in a process of its own and adds to it; run again it replaces its rows.
    rows = (
        {row["row"]: row for row in json.loads(path.read_text())["bars"]} if path.is_file() else {}
    )
    rows |= {row["row"]: row for row in BARS}
    found = {
        "machine": machine, "rounds": session.config.getoption("--rounds"),
        "bars": [*rows.values()],
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=2) + "\n")


def pytest_terminal_summary(terminalreporter):
    if not TABLES:
        return
    m = measure.machine()
    terminalreporter.section("ratios of medians, interleaved in one run")
    where = f"{m['processor']}, {m['cores']} cores, {m['instruction_set']}"
    if terminalreporter.config.getoption("--device") == "cuda":
        where = m["gpu"] or "no GPU: run by Triton's interpreter, which says nothing about time"
    others = ", ".join(f"{name} {version}" for name, version in peers().items())
    terminalreporter.write_line(f"{where}, torch {m['torch']}, {others}")
    for (name, columns), rows in TABLES.items():
        cells = [list(columns)] + [[str(row[c]) for c in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        terminalreporter.write_line(f"\n{name}")
        for line in cells:
            terminalreporter.write_line(
                "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            )
