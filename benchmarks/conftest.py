"""The protocol: correctness first, then interleaved timing, and tables of ratios at the end."""

from __future__ import annotations

import pytest
import torch

from atsnn import available_backends, measure

GPU = "bench_gpu"  # what is measured there; every other file measures the CPU


def pytest_addoption(parser):
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda: time the Triton kernels (under TRITON_INTERPRET=1 run them on small shapes)",
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


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    with measure.threads(request.param) as number:
        yield number


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["atsnn"] = measure.machine()


def pytest_terminal_summary(terminalreporter):
    if not TABLES:
        return
    m = measure.machine()
    terminalreporter.section("ratios of medians, interleaved in one run")
    where = f"{m['processor']}, {m['cores']} cores, {m['instruction_set']}"
    if terminalreporter.config.getoption("--device") == "cuda":
        where = m["gpu"] or "no GPU: run by Triton's interpreter, which says nothing about time"
    terminalreporter.write_line(f"{where}, torch {m['torch']}")
    for (name, columns), rows in TABLES.items():
        cells = [list(columns)] + [[str(row[c]) for c in columns] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        terminalreporter.write_line(f"\n{name}")
        for line in cells:
            terminalreporter.write_line(
                "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            )
