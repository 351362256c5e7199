"""The bars: what is met, what is written, and that what stands in the documents is both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
sys.path.append(str(HERE.parent / "benchmarks"))

import bars  # noqa: E402
import write_results  # noqa: E402

MACHINE = {
    "processor": "a processor", "cores": 2, "instruction_set": "avx2", "platform": "Linux",
    "pytorch_instruction_set": "AVX2", "python": "3.11", "torch": "2.13.0", "triton": None,
    "atsnn": "0.1.0", "peers": {"spikingjelly": "2.0.0"},
}  # fmt: skip


def level(*rows):
    return {"machine": MACHINE, "rounds": 11, "bars": [bars.row(*row) for row in rows]}


def test_a_bar_is_met_on_its_side():
    assert bars.BARS["lif_of_clone"].met(1.15) and not bars.BARS["lif_of_clone"].met(1.151)
    assert bars.BARS["network_five"].met(8.0) and not bars.BARS["network_five"].met(7.99)
    assert bars.BARS["halting_own"].text == "<= 2 %"
    assert bars.BARS["halting_own"].written(0.0123) == "1.23 %"
    row = bars.row("linear_one", "384 -> 384, 1 thread", 13.5)
    assert row["bar"] == ">= 12" and row["met"] is True and row["row"].endswith("384, 1 thread")


def test_page_shows_every_row_and_what_limits_the_missed():
    best = level(("lif_of_clone", "A", 0.8), ("network_five", "B", 6.5), ("network_five", "C", 9.0))
    beside = level(("lif_of_clone", "A", 0.9), ("network_five", "B", 4.0))
    text = write_results.page({"avx512": best, "avx2": beside}, [])
    assert "2 of 3 rows meet their bar" in text and "met by 1 of 2" in text
    assert "| case | measured | avx2 | met |" in text
    assert "| A | 0.800 | 0.900 | yes |" in text and "| B | 6.500 | 4.000 | **no** |" in text
    assert "| C | 9.000 | - | yes |" in text
    assert bars.BARS["network_five"].limits in text and "a processor, 2 cores" in text
    assert "has none" not in text
    alone = write_results.page({"avx2": best}, [])
    assert "The bars are set for AVX-512, and the processor of this run has none" in alone


def test_gpu_rows(tmp_path):
    def kernel(name, target, spills, widths, form="f32, dense"):
        return {"kernel": name, "target": target, "spills": spills, "form": form,
                "loads": widths, "stores": []}  # fmt: skip

    path = tmp_path / "gpu.json"
    assert write_results.gpu_rows(path) == []
    kernels = [
        kernel("neuron.forward", "sm_90", 0, [32, 128]), kernel("taking.take", "sm_90", 8, [64]),
        kernel("halting.halt", "sm_90", 0, [32]), kernel("neuron.forward", "sm_80", 0, [128]),
        kernel("attention.forward", "sm_80", 0, [64], "bf16, dense"),
    ]  # fmt: skip
    path.write_text(json.dumps({"kernels": kernels}))
    found = {(row["name"], row["row"].split("; ")[1].split(",")[0]): row["measured"]
             for row in write_results.gpu_rows(path)}  # fmt: skip
    assert found == {
        ("gpu_spills", "sm_80"): 0, ("gpu_spills", "sm_90"): 1,
        ("gpu_narrow", "sm_80"): 0, ("gpu_narrow", "sm_90"): 1,
    }  # fmt: skip


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"expected avx512\.json, avx2\.json"):
        write_results.read(tmp_path)


def test_every_bar_has_rows_in_the_results_and_they_are_what_they_say():
    rows = json.loads((RESULTS / "performance.json").read_text())
    names = {row["row"] for row in rows}
    assert len(names) == len(rows), "no two rows are called the same"
    for bar in bars.BARS.values():
        mine = [row for row in rows if row["row"].startswith(f"{bar.work}; ")]
        assert mine, bar.work
        for row in mine:
            assert set(row) == {"row", "measured", "bar", "met"}
            assert row["bar"] == bar.text and row["met"] == bar.met(row["measured"])
        if not all(row["met"] for row in mine):
            assert bar.limits, f"missed, and nothing said of what limits it: {bar.work}"
    page = (RESULTS / "performance.md").read_text()
    assert f"{sum(row['met'] for row in rows)} of {len(rows)} rows meet their bar" in page
