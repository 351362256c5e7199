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
import atsnn.functional as F
from atsnn.compare import compare_engine
from atsnn.data import load
from atsnn.firing import set_firing_rates
from atsnn.measure import interleaved, realized_fraction
from atsnn.schedule import synthetic_depths, synthetic_scores
from atsnn.testing import exact_images, exact_model

L, T, N = 4, 4, 64
ROUNDS = 15
LEVEL = os.environ.get("ATEN_CPU_CAPABILITY", "the machine's best")

# -- the primitive --------------------------------------------------------------------------------

SHAPES = [(384, 384), (384, 1536), (1536, 384)]
PRIMITIVE_BARS = {0.01: 12.0, 0.05: 5.0, 0.10: 5.0, 0.20: 2.0, 0.30: 2.0, 0.40: 2.0}


LIMIT_ADDS = T * N * 512 * 64


def in_first_cache():
    """The kernel where little but additions is done: 512 for each row and output, in tiles whose
    weights stay in the first cache."""
    packed = F.pack_linear(torch.zeros(64, 1536))
    x = torch.zeros(T, N, 1536)
    x[..., ::3] = 1
    bits = F.pack_spikes(x)
    return lambda: F.spike_linear_lif(bits, packed)


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_primitive(benchmark, report, threads, shape):
    """256 rows, bits in and out, BatchNorm folded and neurons run, against the product alone."""
    inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, (outputs, inputs), generator=generator) / 64.0
    bias = torch.randint(-8, 9, (outputs,), generator=generator) / 64.0
    packed = F.pack_linear(weight, bias)
    functions, adds = {"limit": in_first_cache()}, {}
    for rate in PRIMITIVE_BARS:
        x = (torch.rand((T, N, inputs), generator=generator) < rate).float()
        bits = F.pack_spikes(x)
        want, _ = F.neuron(torch.nn.functional.linear(x, weight, bias))
        assert torch.equal(F.unpack_spikes(F.spike_linear_lif(bits, packed), outputs), want)
        functions[f"ours {rate}"] = lambda bits=bits: F.spike_linear_lif(bits, packed)
        functions[f"dense {rate}"] = lambda x=x: torch.nn.functional.linear(x, weight, bias)
        functions[f"floats {rate}"] = lambda x=x: F.spike_linear_lif(x, packed)
        adds[f"ours {rate}"] = float(x.sum()) * outputs
    with torch.no_grad():
        times = interleaved(functions, rounds=ROUNDS)
        benchmark.pedantic(functions["ours 0.1"], rounds=5, warmup_rounds=1)
    limit = LIMIT_ADDS / times["limit"].median
    for rate, bar in PRIMITIVE_BARS.items():
        ours, dense = times[f"ours {rate}"], times[f"dense {rate}"]
        speed = adds[f"ours {rate}"] / ours.median
        report(
            {
                "work": f"{inputs} -> {outputs}", "rate": f"{rate:.0%}", "threads": threads,
                "ours us": f"{1e6 * ours.median:.0f}", "dense us": f"{1e6 * dense.median:.0f}",
                "faster": f"{dense.median / ours.median:.1f}x",
                "from floats": f"{dense.median / times[f'floats {rate}'].median:.1f}x",
                "G add/s": f"{speed / 1e9:.1f}", "of limit": f"{speed / limit:.2f}",
                "spread": f"{100 * max(ours.spread, dense.spread):.0f} %",
                "bar": f">= {bar:.0f}x",
                "met": "yes" if dense.median / ours.median >= bar else "NO",
            }
        )  # fmt: skip
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})


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
