"""How cost grows: attention with tokens, blocks with active cells, memory with rows.

    make bench-growth

Spikformer-4-384's sizes, firing at 5 % and 15 %. What ``atsnn bench --growth`` draws for the engine
is held against its bars here, and so are the modules. An exponent of 1 is linear.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bars import on_threads
from bench_attention import HEADS, C, T, products, spikes
from workloads import firing_model

import atsnn
import atsnn.functional as F
from atsnn.bench.growth import AXES, fit, measure_growth, peak_memory
from atsnn.measure import interleaved
from atsnn.nn.config import model_config
from atsnn.schedule import scheduled, synthetic_depths, synthetic_scores

TOKENS = (64, 196, 256, 576, 1024)
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
BATCHES = (1, 2, 4, 8)


@pytest.fixture
def row(report, bar, threads):
    """Report the exponent of a power law and hold it against its bar."""

    def add(name, work, x, cost, unit, scale):
        found = fit(x, cost)
        met = bar(name, f"{work}, {on_threads(threads)}", found.exponent)
        report(
            {
                "work": work, "threads": threads, "from": f"{x[0]:g}", "to": f"{x[-1]:g}",
                "first": f"{scale * cost[0]:.3g} {unit}", "last": f"{scale * cost[-1]:.3g} {unit}",
                "exponent": f"{found.exponent:.2f}", "r2": f"{found.r2:.3f}", "met": met,
            }
        )  # fmt: skip

    return add


def test_attention_with_tokens(benchmark, row, limits, keep, rounds):
    """The operator on floats, 64 to 1024 tokens; bytes of q, k, v and the result."""
    work = {}
    for N in TOKENS:
        q, k, v = (spikes(0.1, 1, N, seed) for seed in range(3))
        run = partial(F.spiking_attention, q, k, v, num_heads=HEADS)
        want = F.spiking_attention(q, k, v, num_heads=HEADS, backend="reference")
        assert torch.equal(run(), want)
        work[str(N)] = run
    with torch.no_grad():
        times = interleaved({**work, **limits.functions}, rounds=rounds)
        benchmark.pedantic(work["1024"], rounds=3, warmup_rounds=1)
    for N in TOKENS:
        moved, flops = 4 * 4 * T * N * C, products(N, 1)
        keep(times, str(N), moved=moved, flops=flops, prefix=f"{N} tokens ")
    seconds = [times[str(N)].median for N in TOKENS]
    row("growth_attention", "attention operator, tokens", TOKENS, seconds, "ms", 1e3)


def test_engine(benchmark, row, threads, rounds):
    """The engine's blocks with active cells, its attention with tokens, its memory with rows."""
    axes = {"active": AXES["active"], "tokens": TOKENS}
    config = model_config("spikformer_4_384")
    found = measure_growth(
        "spikformer_4_384", config, tuple(axes), values=axes, rounds=max(rounds - 4, 1)
    )
    active, tokens = found["axes"]
    blocks = [point["seconds"]["blocks"] for point in active["points"]]
    row("growth_cells", "engine, active cells", active["x"], blocks, "ms", 1e3)
    attention = [point["seconds"]["attention"] for point in tokens["points"]]
    row("growth_attention", "engine's attention, tokens", TOKENS, attention, "ms", 1e3)
    rows = [point["rows"] for point in tokens["points"]]
    memory = [point["peak_memory"] for point in tokens["points"]]
    if all(memory):
        row("growth_memory", "engine, rows (by tokens)", rows, memory, "MiB", 2**-20)
    benchmark.extra_info["axes"] = found["axes"]
    model, x = firing_model(1)
    benchmark.pedantic(atsnn.freeze(model), (x,), rounds=3, warmup_rounds=1)


def test_modules(benchmark, row, threads, rounds):
    """The packed modules with active cells, and their memory with rows, of a training step too."""
    model, x = firing_model(BATCHES[-1], halting="rectangle")
    L, N = model.config.depth, model.config.grid**2
    with torch.no_grad():
        tokens = model.embed(x)
    work, cells = {}, []
    for share in SHARES:
        depths = synthetic_depths(L, T, len(x), N, share)
        halted = scheduled(model, synthetic_scores(depths, L))
        with torch.no_grad():
            active = halted.forward_tokens(tokens, return_trace=True).active
        assert torch.equal(active.sum(0), depths)
        cells.append(int(active.sum()))
        work[str(share)] = partial(halted.forward_tokens, tokens)
    with torch.no_grad():
        times = interleaved(work, rounds=max(rounds - 4, 1), warmup=1)
        benchmark.pedantic(work["1.0"], rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    seconds = [times[str(share)].median for share in SHARES]
    row("growth_cells", "modules, active cells", cells, seconds, "ms", 1e3)

    def step(B):
        given = tokens[:, :B].clone().requires_grad_()
        model.forward_tokens(given).sum().backward()
        model.zero_grad(set_to_none=True)

    kinds = {"inference": torch.no_grad()(lambda B: model.forward_tokens(tokens[:, :B])),
             "training step": step}  # fmt: skip
    for kind, run in kinds.items():
        run(BATCHES[0])
        memory = [peak_memory(partial(run, B)) for B in BATCHES]
        if all(memory):
            rows = [B * T * N for B in BATCHES]
            row("growth_memory", f"modules, {kind}, rows (by batch)", rows, memory, "MiB", 2**-20)
