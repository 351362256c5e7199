"""The protocol: correctness first, then interleaved timing, and a table of ratios at the end."""

from __future__ import annotations

import pytest

from atsnn import measure

ROWS: list[dict[str, object]] = []


@pytest.fixture
def report():
    """Collect one row of the closing table."""
    return ROWS.append


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    with measure.threads(request.param) as number:
        yield number


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["atsnn"] = measure.machine()


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    m = measure.machine()
    terminalreporter.section("ratios of medians, interleaved in one run")
    terminalreporter.write_line(
        f"{m['processor']}, {m['cores']} cores, {m['instruction_set']}, torch {m['torch']}"
    )
    columns = list(ROWS[0])
    cells = [columns] + [[str(row[c]) for c in columns] for row in ROWS]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        terminalreporter.write_line(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        )
