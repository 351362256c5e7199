"""The event-driven engine against dense execution: the primitive, the network, halting, digits.

    make bench-engine

An untrained network is silent, so firing rates are set with BatchNorm constants (atsnn.firing) and
what really fired is printed. The network is SpikingJelly's Spikformer-4-384 for CIFAR-10 (pooling
before the neurons, no bias), with the same weights in both.

Limits: an addition takes a float of weights from the first cache, of which this core reads 64
bytes a cycle, or from the second, 32 bytes a cycle. `of limit` is the share of the additions a
second that the kernel reaches where it does little else and its weights stay in the first cache.
Rows with many spikes are looked up four inputs at a time, so there it can be more than all of it.
"""

from __future__ import annotations

import os
import statistics

import pytest
import torch
from judge import carry_over
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.model.spikformer import spikformer_cifar10

import atsnn
from atsnn.compare import compare_engine
from atsnn.data import load
from atsnn.firing import set_firing_rates
from atsnn.measure import interleaved, realized_fraction
from atsnn.schedule import synthetic_depths, synthetic_scores
from atsnn.testing import exact_images, exact_model

L, T, N = 4, 4, 64
ROUNDS = 15
LEVEL = os.environ.get("ATEN_CPU_CAPABILITY", "the machine's best")

# -- the network ----------------------------------------------------------------------------------

RATES = {"5 % / 15 %": (0.05, 0.15), "10 % / 28 %": (0.10, 0.28)}
NETWORK_BARS = {"5 % / 15 %": (8.0, 15.0), "10 % / 28 %": (4.5, None)}


def images(B):
    """Smooth patterns under noise, whose pixels resemble their neighbours as a photograph's do."""
    generator = torch.Generator().manual_seed(B)
    coarse = torch.rand((B, 3, 8, 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    return 0.7 * smooth + 0.3 * torch.rand((B, 3, 32, 32), generator=generator)


class Peer:
    """SpikingJelly's model, eager and compiled.

    The compiled one keeps the weights and thresholds it was compiled with, as its time does not
    depend on them.
    """

    def __init__(self):
        self.model, self.other = (spikformer_cifar10(T=T).eval() for _ in range(2))
        compiled = torch.compile(self.other)
        self.eager = lambda x: self._run(self.model, self.model, x)
        self.compiled = lambda x: self._run(self.other, compiled, x)

    def _run(self, model, function, x):
        functional.reset_net(model)
        return function(x)


@pytest.fixture(scope="module")
def peer():
    """Once all three are known to give the same numbers on exact weights."""
    config = atsnn.SpikformerConfig(pool="before_lif", bias=False)
    model, x = exact_model(config), exact_images(config, 2)
    found = Peer()
    carry_over(model, found.model)
    with torch.no_grad():
        assert torch.equal(atsnn.freeze(model)(x), model(x))
        torch.testing.assert_close(model(x), found.eager(x).mean(0), rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("B", [1, 16], ids=["batch-1", "batch-16"])
def test_network(benchmark, report, threads, B, peer):
    torch.manual_seed(0)
    model = atsnn.create_model("spikformer_4_384", num_classes=10, pool="before_lif", bias=False)
    model.eval()
    x = images(B)
    for name, rates in RATES.items():
        set_firing_rates(model, x, *rates)
        carry_over(model, peer.model)
        engine = atsnn.freeze(model)
        with torch.no_grad():
            # An untrained network is chaotic: one spike that flips at its threshold flips others.
            difference = compare_engine(model, x)
            trace = engine(x, return_trace=True)
            functions = {
                "engine": lambda engine=engine: engine(x),
                "traced": lambda engine=engine: engine(x, return_trace=True),
                "compiled": lambda: peer.compiled(x),
                "eager": lambda: peer.eager(x),
                "native": lambda: model(x),
            }
            times = interleaved(functions, rounds=11)
        ours = times["engine"].median
        faster = {k: t.median / ours for k, t in times.items()}
        compiled, eager = NETWORK_BARS[name]
        met = faster["compiled"] >= compiled and (eager is None or faster["eager"] >= eager)
        report(
            {
                "work": name, "batch": B, "threads": threads,
                "engine ms": f"{1e3 * ours:.1f}",
                "SJ compiled": f"{faster['compiled']:.1f}x", "SJ eager": f"{faster['eager']:.1f}x",
                "atsnn modules": f"{faster['native']:.1f}x",
                "counting": f"{100 * (faster['traced'] - 1):.1f} %",
                "fired": fired(trace), "G add/s": f"{trace.cost.sops.total / ours / 1e9:.1f}",
                "flipped": f"{difference.flipped} of {difference.spikes}",
                "spread": f"{100 * max(t.spread for t in times.values()):.0f} %",
                "bar": f">= {compiled}x" + (f", {eager}x" if eager else ""),
                "met": "yes" if met else "NO",
            }
        )  # fmt: skip
        benchmark.extra_info[f"{name} rates"] = trace.firing_rates
        benchmark.extra_info |= {f"{name} {k}": t.to_dict() for k, t in times.items()}
    benchmark.pedantic(functions["engine"], rounds=3)


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


# -- halting --------------------------------------------------------------------------------------

SHARES = (0.8, 0.6, 0.4)


@pytest.mark.parametrize("B", [1, 16], ids=["batch-1", "batch-16"])
def test_halting(benchmark, report, threads, B):
    """Synthetic patterns with the method's nesting, against the same network without halting."""
    torch.manual_seed(0)
    model = atsnn.create_model("spikformer_4_384", num_classes=10, halting="rectangle").eval()
    x = images(B)
    set_firing_rates(model, x, 0.05, 0.15)
    engine, plain = atsnn.freeze(model), atsnn.freeze(model.without_halting())
    scores = {"none": torch.zeros(L, T, B, N)}
    for share in SHARES:
        depths = synthetic_depths(L, T, B, N, share)
        scores[f"{1 - share:.0%}"] = synthetic_scores(depths, L)
    runs = {"off": lambda: plain(x, return_trace=True)}
    runs |= {k: lambda s=s: engine(x, return_trace=True, scores=s) for k, s in scores.items()}
    found = {name: [] for name in runs}
    for _ in range(25):
        for name, run in runs.items():
            run()  # so that each is timed warm
            found[name].append(run())

    def median(name, part):
        return statistics.median(part(trace.seconds) for trace in found[name])

    off = found["off"][0].cost
    dense, whole = (median("off", p) for p in (lambda s: s.blocks, lambda s: s.total))
    for name in scores:
        trace = found[name][0]
        blocks, model_s = median(name, lambda s: s.blocks), median(name, lambda s: s.total)
        own = median(name, lambda s: s.halting) - median("off", lambda s: s.halting)
        flops = 1 - trace.cost.flops.blocks / off.flops.blocks
        sops = 1 - trace.cost.sops.blocks / off.sops.blocks
        total = 1 - trace.cost.flops.total / off.flops.total
        none = name == "none"
        report(
            {
                "halted": name, "batch": B, "threads": threads, "blocks ms": f"{1e3 * blocks:.2f}",
                "of off": f"{blocks / dense:.3f}",
                "FLOPs saved": f"{flops:.3f}", "SOPs saved": f"{sops:.3f}",
                "realized": "" if none else f"{realized_fraction(dense, blocks, 1, 1 - flops):.2f}",
                "of SOPs": "" if none else f"{realized_fraction(dense, blocks, 1, 1 - sops):.2f}",
                "model": "" if none else f"{realized_fraction(whole, model_s, 1, 1 - total):.2f}",
                "own cost": f"{100 * own / blocks:.1f} %",
                "bar": "<= 1.02 of off" if none else ">= 0.95, own <= 2 %",
            }
        )  # fmt: skip
    benchmark.extra_info["seconds"] = {
        name: [dict(trace.seconds) for trace in traces] for name, traces in found.items()
    }
    benchmark.pedantic(lambda: engine(x), rounds=3)


# -- a trained model ------------------------------------------------------------------------------


@pytest.mark.parametrize("B", [1, 16], ids=["batch-1", "batch-16"])
def test_digits(benchmark, report, threads, B):
    model = atsnn.from_pretrained("digits")
    test = load("digits", model.config.image_size)["test"]
    difference = compare_engine(model, test.images[:64])
    assert difference.classes == 0
    x = test.images[:B]
    plain = model.without_halting()
    engines = {"halting": atsnn.freeze(model), "off": atsnn.freeze(plain)}
    compiled = torch.compile(plain)
    with torch.no_grad():
        times = interleaved(
            {
                **{k: (lambda e=e: e(x)) for k, e in engines.items()},
                "native": lambda: model(x), "dense": lambda: plain(x),
                "compiled": lambda: compiled(x),
            },
            rounds=ROUNDS,
        )  # fmt: skip
    trace = engines["halting"](x, return_trace=True)
    ours = times["halting"].median
    report(
        {
            "work": "digits, halting", "batch": B, "threads": threads,
            "engine ms": f"{1e3 * ours:.2f}",
            "cells run": f"{float(trace.active.double().mean()):.2f}",
            "engine, off": f"{times['off'].median / ours:.2f}x",
            "modules": f"{times['native'].median / ours:.1f}x",
            "modules, off": f"{times['dense'].median / ours:.1f}x",
            "compiled, off": f"{times['compiled'].median / ours:.1f}x",
            "flipped": f"{difference.flipped} of {difference.spikes}",
        }
    )  # fmt: skip
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    benchmark.pedantic(lambda: engines["halting"](x), rounds=3)
