"""What one line makes of SpikingJelly's models: before and after ``atsnn.accelerate``.

    make bench-dropin

The models are made to fire (tests/lively.py): their BatchNorms get the statistics of their inputs
and biases between -0.75 and 0.25 standard deviations. Weights and images are on a dyadic grid, so
that both must give the same bits, which is checked before anything is timed. "compiled" is the
model before, under ``torch.compile``. Membranes are reset before every call, which is timed too.
"""

from __future__ import annotations

import copy

import lively
import pytest
import torch
from lively import functional, liven, neuron

import atsnn
from atsnn.measure import interleaved

T = 4
ROUNDS = 11
MODELS = {
    "CSNN, 128 channels": (lambda: lively.csnn(128), (1, 28, 28)),
    "spikformer_cifar10": (lively.spikformer.spikformer_cifar10, (3, 32, 32)),
    "SDT-2-512": (lively.sdt_cifar, (3, 32, 32)),
    "spiking_vgg11_bn": (lively.vgg11_bn, (3, 32, 32)),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """The model, the accelerated one, images for any batch, and the mean firing rate."""
    make, shape = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    functional.set_step_mode(model, "m")
    x = (torch.rand(1, 8, *shape) * 16).round().div(16).repeat(T, 1, 1, 1, 1)
    rates = liven(model, x, exact=True, bias=(-6, 2))
    fast = copy.deepcopy(model)
    assert not atsnn.accelerate(fast).left
    return request.param, model, fast, torch.compile(model), x, sum(rates.values()) / len(rates)


def results(net, owner, x):
    functional.reset_net(owner)
    torch.manual_seed(0)  # of dropout
    y = net(x)
    return [y, *(m.v for m in owner.modules() if isinstance(m, neuron.BaseNode))]


def assert_same(model, fast, x):
    for one, other in zip(results(model, model, x), results(fast, fast, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("B", [1, 8])
def test_inference(benchmark, report, threads, pair, B):
    name, model, fast, compiled, images, rate = pair
    x = images[:, :B].contiguous()
    model.eval(), fast.eval()

    def call(net, owner):
        def run():
            functional.reset_net(owner)
            return net(x)

        return run

    with torch.inference_mode():
        assert_same(model, fast, x)
        functions = {
            "before": call(model, model), "after": call(fast, fast),
            "compiled": call(compiled, model),
        }  # fmt: skip
        times = interleaved(functions, rounds=ROUNDS)
        benchmark.pedantic(functions["after"], rounds=3, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    before, after, peer = (times[k].median for k in ("before", "after", "compiled"))
    report(
        {
            "inference": name, "B": B, "threads": threads, "fires": f"{rate:.0%}",
            "before ms": f"{1e3 * before:.1f}", "compiled ms": f"{1e3 * peer:.1f}",
            "after ms": f"{1e3 * after:.1f}", "faster": f"{before / after:.1f}x",
            "than compiled": f"{peer / after:.1f}x",
            "spread": f"{100 * max(t.spread for t in times.values()):.0f} %",
        }
    )  # fmt: skip


def test_training_step(benchmark, report, threads, pair):
    name, model, fast, _, x, _ = pair
    model.train(), fast.train()

    def step(net):
        def run():
            functional.reset_net(net)
            net.zero_grad(set_to_none=True)
            net(x).square().mean().backward()

        return run

    functions = {"before": step(model), "after": step(fast)}
    with torch.no_grad():
        assert_same(model, fast, x)
    times = interleaved(functions, rounds=ROUNDS)
    benchmark.pedantic(functions["after"], rounds=3, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    before, after = times["before"].median, times["after"].median
    report(
        {
            "training step": name, "B": x.shape[1], "threads": threads,
            "before ms": f"{1e3 * before:.0f}", "after ms": f"{1e3 * after:.0f}",
            "faster": f"{before / after:.2f}x",
            "spread": f"{100 * max(t.spread for t in times.values()):.0f} %",
        }
    )  # fmt: skip
