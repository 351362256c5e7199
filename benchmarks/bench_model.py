"""Spikformer-4-384 with nothing halted: the engine and the packed modules against dense peers.

    make bench-model

The peers are SpikingJelly's own Spikformer for CIFAR-10 (pooling before the neurons, no bias),
eager and compiled, and PyTorch dense, the same with every BatchNorm folded into the layer before
it, the faster one of eager and compiled. "FLOPs/matmul" counts the dense products that the work
stands for, so it is more than 1 where zeros are left out.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from workloads import RATES, Peers, case, firing_model

import atsnn
from atsnn.compare import compare_engine
from atsnn.measure import interleaved

# Against SpikingJelly, of the engine.
BAR_OF = {
    "5 % / 15 %": {"SJ compiled": "network_five", "SJ": "network_five_eager"},
    "10 % / 28 %": {"SJ compiled": "network_ten"},
}


@pytest.fixture(scope="module")
def peers():
    return Peers()


@pytest.mark.parametrize("B", [1, 16], ids=["batch-1", "batch-16"])
def test_network(benchmark, report, bar, keep, limits, rounds, threads, peers, B):
    functions, found = {}, {}
    with torch.no_grad():
        peers.check(B)
        for name in RATES:
            model, x = firing_model(B, name, pool="before_lif", bias=False, halting="rectangle")
            plain = model.without_halting()
            peers.carry(plain)  # their time does not depend on the rates
            engine = atsnn.freeze(plain)
            modules = model(x, return_trace=True)
            assert modules.active.all() and torch.equal(modules.logits, plain(x))
            # An untrained network is chaotic: one spike that flips at its threshold flips others.
            found[name] = engine(x, return_trace=True), compare_engine(plain, x)
            functions |= {
                f"{name} engine": lambda x=x, engine=engine: engine(x),
                f"{name} traced": lambda x=x, engine=engine: engine(x, return_trace=True),
                f"{name} modules": lambda x=x, model=model: model(x),
            }
        theirs = {k: lambda f=f: f(x) for k, f in peers.functions.items()}
        times = interleaved(functions | theirs | limits.functions, rounds=rounds)
        benchmark.pedantic(functions[f"{name} engine"], rounds=3)
    dense = min(("folded", "folded compiled"), key=lambda k: times[k].median)
    for name, (trace, difference) in found.items():
        for ours in ("engine", "modules"):
            own = times[f"{name} {ours}"]
            faster = {k: times[k].median / own.median for k in theirs}
            kept = keep(
                {ours: own} | {k: times[k] for k in (*theirs, *limits.functions)}, ours,
                flops=trace.cost.flops.total, prefix=f"{name} {ours} ",
            )  # fmt: skip
            bars = BAR_OF[name] if ours == "engine" else {}
            met = [bar(which, case(B, threads), faster[k]) for k, which in bars.items()]
            report(
                {
                    "rates": name, "batch": B, "threads": threads, "ours": ours,
                    "ms": f"{1e3 * own.median:.1f}",
                    "SJ compiled": f"{faster['SJ compiled']:.1f}x",
                    "SJ eager": f"{faster['SJ']:.1f}x",
                    "PyTorch dense": f"{faster[dense]:.1f}x", "which is": dense, **kept,
                    "met": " / ".join(met),
                }
            )  # fmt: skip
        engine, traced = (times[f"{name} {k}"].median for k in ("engine", "traced"))
        sops = trace.cost.sops.total
        report(
            {
                "rates": name, "batch": B, "threads": threads, "fired": fired(trace),
                "G FLOPs": f"{trace.cost.flops.total / 1e9:.2f}", "G SOPs": f"{sops / 1e9:.3f}",
                "engine G add/s": f"{sops / engine / 1e9:.1f}",
                "tracing": f"{100 * (traced / engine - 1):.1f} %",
                "flipped": f"{difference.flipped} of {difference.spikes}",
            }
        )  # fmt: skip
        benchmark.extra_info |= {f"{name} rates": trace.firing_rates, f"{name} SOPs": sops}


def fired(trace):
    """What really fired: inputs of the stem's convolutions, of blocks, and everything else."""

    def mean(names):
        return 100 * statistics.mean(trace.firing_rates[n] for n in names)

    stem = [n for n in trace.firing_rates if n.startswith("patch") and n.endswith("input")][1:]
    blocks = [n for n in trace.firing_rates if n.startswith("block") and n.endswith("input")]
    rest = [n for n in trace.firing_rates
            if n.startswith("block") and n.endswith(("q_lif", "k_lif", "v_lif", "attn_lif",
                                                     "fc1_lif"))]  # fmt: skip
    return f"{mean(stem):.1f}/{mean(blocks):.1f}/{mean(rest):.1f} %"
