"""Compiles kernels for the tests of the GPU report and prints what they are, as JSON.

A process of its own: Triton compiles only where it does not interpret. ``benchmarks`` must be on
the path.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from gpu_cases import Case, cases, operation
from gpu_compile import record
from gpu_devices import DEVICES
from gpu_report import Built, compile_cases, count_cases

COUNTED = [
    "neuron, f32, dense", "neuron_backward, f32, packed", "spiking_attention, f32, packed",
    "spiking_attention_backward, f32, packed", "spike_driven_attention, f32, packed",
    "take_rows, f32, packed", "merge_tokens, f32, packed", "halting_scores, f32, dense",
    "halt, f32, packed", "readout, f32, packed", "unpack_spikes, f32, dense",
]  # fmt: skip
SIZES = [
    dict(T=9, B=16, N=196), dict(T=31, B=16, N=196), dict(T=9, B=7, N=196),
    dict(T=9, B=1, N=196), dict(T=9, B=16, N=225),
]  # fmt: skip
LARGE = ["neuron", "spiking_attention", "spike_linear_lif", "merge_tokens", "readout"]
FUSED = re.compile(r"\bfma\.")
APPROXIMATE = re.compile(r"\b(?:div\.full|div\.approx|rcp\.approx)")


def chosen(only: list[str] | None = None) -> list[Case]:
    """Every operation once, packed where it can be."""
    return [
        case
        for case in cases(only, ["S4-384"])
        if case.dtype == "f32" and case.packed == operation(case.operation).forms[-1]
    ]


def row(built: Built) -> dict[str, Any]:
    text = built.code.text
    return built.row() | {
        "case": f"{built.case.name}: {built.launch.name} for {built.target}",
        "fused": len(FUSED.findall(text)), "approximate": len(APPROXIMATE.findall(text)),
    }  # fmt: skip


def kernels_by_size() -> dict[str, int]:
    """How many kernels the launches of each case need at all the sizes."""
    found: dict[str, set[str]] = {}
    for case in chosen():
        for sizes in SIZES:
            for launch in record(case.with_sizes(**sizes).call()[1])[1]:
                key = launch.key(DEVICES["sm_90"].target)
                found.setdefault(f"{case.operation}: {launch.name}", set()).add(key)
    return {name: len(keys) for name, keys in found.items()}


def main() -> None:
    with ThreadPoolExecutor() as pool:
        forms = cases(None, ["S4-384"])
        counts = pool.submit(count_cases, [case for case in forms if case.name in COUNTED])
        low = [c for c in cases(LARGE, ["S4-384"]) if c.dtype == "bf16" and c.packed]
        built = compile_cases(chosen([""]), ["sm_80"]) + compile_cases(low, ["sm_90"])
        built += compile_cases(chosen(LARGE), ["sm_90", "gfx942"])
        # In float64, which gradient checks use, other lines of the source are compiled.
        wide = [replace(case, dtype="f64") for case in chosen(["neuron", "spiking_attention"])]
        built += compile_cases(wide, ["sm_80"])
        print(json.dumps(dict(
            kernels=[row(b) for b in built], work=counts.result(), by_size=kernels_by_size(),
        )))  # fmt: skip


if __name__ == "__main__":
    main()
