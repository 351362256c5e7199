"""The compiled kernels: registers, widths, bytes, exactness; see docs/gpu.md. None of it runs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

HERE = Path(__file__).parent
# Bytes moved over the least possible. Attention's gradient reads what it needs in each of its
# three parts; a score reads the weights again for every few rows.
MOST = {"spiking_attention_backward": 1.8, "halting_scores": 1.3, "readout": 1.15}
MOST_OTHERS = 1.1
# Data that is whole words of spikes, numbers a token or a row, or one result of many.
NARROW = {
    "halting.halt", "halting.halt_backward", "layout.cells", "layout.ends", "layout.moved",
    "layout.ranks", "layout.tokens", "linear.linear", "linear.pack", "linear.unpack",
    "matching.pairs", "merging.members", "readout.forward", "scores.linear_backward",
    "spike_driven.token_sums", "spike_driven.gate", "spike_driven.gate_backward",
}  # fmt: skip
ROWS = 128  # bits


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What :mod:`compiled` prints; with a cache of its own, so that nothing old is judged."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(HERE.parent / "benchmarks"),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled.py")],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_no_kernel_spills(found):
    assert {row["case"]: row["spills"] for row in found["kernels"] if row["spills"]} == {}


def test_rows_are_moved_128_bits_at_a_time(found):
    narrow = {
        row["case"]: (row["loads"], row["stores"])
        for row in found["kernels"]
        if row["target"] != "gfx942"
        and row["kernel"] not in NARROW
        and min(row["loads"] + row["stores"]) < ROWS
    }
    assert narrow == {}


def test_bytes_moved_are_near_the_least(found):
    work = {key.split(",")[0]: counts for key, counts in found["work"].items()}
    assert len(work) > 8
    moved = {name: counts["bytes"] / counts["least"] for name, counts in work.items()}
    assert {k: v for k, v in moved.items() if v > MOST.get(k, MOST_OTHERS)} == {}


def test_neurons_are_exact(found):
    """A fused multiply-add or an approximate division would flip a spike next to its threshold."""
    rows = [
        row
        for row in found["kernels"]
        if row["kernel"] == "neuron.forward" and row["target"] != "gfx942"
    ]
    assert len({row["operation"] for row in rows}) > 4
    assert {r["case"]: 1 for r in rows if r["fused"] or r["approximate"]} == {}


def test_one_kernel_serves_all_sizes(found):
    again = {
        name: number
        for name, number in found["by_size"].items()
        # Strides in words of spikes may be multiples of 16 or not; the neurons of a gate are one
        # row an image, whose blocks go by their number.
        if number > (2 if " bits:" in name else 3 if "driven_attention" in name else 1)
    }
    assert again == {}
