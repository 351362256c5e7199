"""What packed execution saves on Spikformer-4-384: the blocks in inference, the training step.

    make bench-model

The baseline is the same network with nothing halting, dense. Halting follows synthetic patterns
with the method's nesting that execute 80, 60 and 40 % of the cells; the scores are computed all
the same. Realized fraction = share of time saved / share of FLOPs saved.
"""

from __future__ import annotations

import pytest
import torch

import atsnn
from atsnn.measure import interleaved, realized_fraction
from atsnn.schedule import scheduled, synthetic_depths, synthetic_scores

L, T, N, C = 4, 4, 64, 384
SHARES = (0.8, 0.6, 0.4)
ROUNDS = 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = atsnn.create_model("spikformer_4_384", num_classes=10, halting="rectangle").eval()
    # So that layers fire, some 5 to 30 %: an untrained network is silent after its first layers.
    with torch.no_grad():
        for block in model.block:
            for bn in (m for m in block.modules() if isinstance(m, torch.nn.BatchNorm1d)):
                bn.running_var.fill_(0.05)
                bn.bias.fill_(0.25)
    return model


def tokens(B):
    generator = torch.Generator().manual_seed(B)
    return (torch.rand((T, B, N, C), generator=generator) < 0.15).float()


def block_flops(cells):
    """FLOPs of the linear layers of the blocks, by far the most, for ``[L, T, B, N]`` cells."""
    return 2 * int(cells.sum()) * (4 * C * C + 2 * C * 4 * C)


def patterns(B):
    for share in SHARES:
        depths = synthetic_depths(L, T, B, N, share)
        yield f"{1 - share:.0%}", depths
    yield "none", torch.full((T, B, N), L)


def compare(report, limits, threads, work, B, times, cells):
    dense = times["dense"].median
    passes = 3 if "training" in work else 1  # the backward multiplies twice
    everything = block_flops(cells["none"])
    for name, active in cells.items():
        flops = block_flops(active)
        saved = 1 - flops / everything
        t = times[name]
        fraction = realized_fraction(dense, t.median, everything, flops)
        report(
            {
                "work": work, "B": B, "threads": threads, "cells saved": f"{saved:.1%}",
                "dense ms": f"{1e3 * dense:.1f}", "packed ms": f"{1e3 * t.median:.1f}",
                "of dense": f"{t.median / dense:.3f}",
                "realized": "-" if fraction is None else f"{fraction:.2f}",
                "FLOPs/matmul": f"{limits.flops_share(flops * passes, t, times):.2f}",
                "spread": f"{100 * max(t.spread, times['dense'].spread):.0f} %",
            }
        )  # fmt: skip


@pytest.mark.parametrize("B", [1, 16])
def test_blocks(benchmark, report, threads, limits, model, B):
    x = tokens(B)
    plain = model.without_halting()
    functions, cells = {"dense": lambda: plain.forward_tokens(x)}, {}
    with torch.no_grad():
        for name, depths in patterns(B):
            halted = scheduled(model, synthetic_scores(depths, L))
            packed = halted.forward_tokens(x, return_trace=True)
            halted.execution = "masked"
            masked = halted.forward_tokens(x, return_trace=True)
            assert torch.equal(packed.depth, depths) and torch.equal(masked.depth, depths)
            torch.testing.assert_close(packed.logits, masked.logits, rtol=1e-3, atol=1e-3)
            halted.execution = "packed"
            cells[name] = packed.active
            functions[name] = lambda halted=halted: halted.forward_tokens(x)
        times = interleaved({**functions, **limits.functions}, rounds=ROUNDS)
        benchmark.pedantic(functions["40%"], rounds=3, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    compare(report, limits, threads, "blocks, inference", B, times, cells)


def test_training_step(benchmark, report, threads, limits, model):
    """Forward and backward of the blocks, readout and head."""
    B = 16
    x = tokens(B).requires_grad_()
    labels = torch.arange(B) % 10
    model.train()

    def step(network):
        trace = network.forward_tokens(x, return_trace=True)
        loss = torch.nn.functional.cross_entropy(trace.logits, labels) + 0.1 * trace.ponder_loss
        network.zero_grad(set_to_none=True)
        loss.backward()
        return trace

    plain = model.without_halting()
    functions, cells = {"dense": lambda: step(plain)}, {}
    for name, depths in patterns(B):
        halted = scheduled(model, synthetic_scores(depths, L))
        cells[name] = step(halted).active
        assert torch.equal(cells[name].sum(0), depths)
        functions[name] = lambda halted=halted: step(halted)
    times = interleaved({**functions, **limits.functions}, rounds=ROUNDS)
    benchmark.pedantic(functions["40%"], rounds=3, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    compare(report, limits, threads, "blocks, training step", B, times, cells)
    model.eval()
