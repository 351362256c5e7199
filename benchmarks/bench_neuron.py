"""LIF forward and backward against a copy of the input and SpikingJelly, eager and compiled.

    make bench-neuron

Limits: the forward reads ``x`` and writes spikes and final state, as a clone and a zero-fill do.
The backward reads ``x`` and the gradient of the spikes, writes the gradient of ``x``, and evaluates
one surrogate (an exponential and a division) an element.
"""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import functional, surrogate

import atsnn.functional as F
from atsnn.measure import interleaved

SHAPES = [(4, 32, 64, 384), (4, 8, 196, 512)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
ROUNDS = 15


def peer(x):
    """SpikingJelly's LIF as Spikformer sets it."""
    return functional.lif_multi_step(
        x, torch.zeros_like(x[0]), 2.0, True, 1.0, 0.0, surrogate.Sigmoid(), True, False
    )[:2]


def ours(x):
    return F.neuron(x, detach_reset=True, backend="native")


def clone(x):
    return x.clone(), torch.zeros_like(x[0])


@pytest.fixture(scope="module")
def compiled():
    return torch.compile(peer)


def row(name, shape, threads, times, bar):
    ms = {key: f"{1e3 * t.median:.2f}" for key, t in times.items()}
    base = times["ours"].median
    ratio = {k: t.median / base for k, t in times.items()}
    return {
        "work": name,
        "shape": "x".join(map(str, shape)),
        "threads": threads,
        "ours ms": ms["ours"],
        "clone ms": ms["clone"],
        "of clone": f"{1 / ratio['clone']:.2f}",
        "SJ compiled": f"{ratio['compiled']:.2f}x",
        "SJ eager": f"{ratio['eager']:.1f}x",
        "spread": f"{100 * max(t.spread for t in times.values()):.0f} %",
        "bar": bar,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_forward(benchmark, report, threads, compiled, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        for got, want in zip(ours(x), peer(x), strict=True):
            assert torch.equal(got, want)
        times = interleaved(
            {
                "ours": lambda: ours(x), "clone": lambda: clone(x), "compiled": lambda: compiled(x),
                "eager": lambda: peer(x),
            },
            rounds=ROUNDS,
        )  # fmt: skip
        benchmark.pedantic(ours, (x,), rounds=5, warmup_rounds=1)
    line = row("forward", shape, threads, times, "<= 1.15 of clone, >= 1.2x compiled")
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    # x is read and the spikes are written, once each; the state is written.
    moved = (2 * x.numel() + x[0].numel()) * x.element_size()
    benchmark.extra_info["bytes"] = moved
    report(line)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_forward_and_backward(benchmark, report, threads, compiled, shape):
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)

    def step(function):
        x.grad = None
        function(x)[0].backward(grad)
        return x.grad

    torch.testing.assert_close(step(ours), step(peer), rtol=1e-5, atol=1e-5)
    times = interleaved(
        {
            "ours": lambda: step(ours), "clone": lambda: (clone(x.detach()), clone(grad)),
            "compiled": lambda: step(compiled), "eager": lambda: step(peer),
        },
        rounds=ROUNDS,
    )  # fmt: skip
    benchmark.pedantic(step, (ours,), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    report(row("forward + backward", shape, threads, times, ">= 2x compiled"))
