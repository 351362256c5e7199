"""What packed execution saves in training: the time of a step, and what autograd keeps for it.

    make bench-training

A step is forward and backward of the blocks, readout and head. Halting follows synthetic patterns
with the method's nesting; the scores are computed all the same. The baseline is the faster of two
dense steps: masked execution (of the 40 % pattern; it computes every cell under any) and the same
network without halting. Realized fraction = share of time saved / share of FLOPs saved.
"""

from __future__ import annotations

import copy

import torch
from workloads import SHARES, L, case, firing_model, halting_depths

from atsnn.cost import cost_of_trace
from atsnn.measure import interleaved, kept_bytes, realized_fraction
from atsnn.schedule import scheduled, synthetic_scores

B = 16
HELD = "40 %"  # the pattern the bars are for
PASSES = 3  # the backward of a product is two


def networks(pattern):
    """The model in training: packed under each pattern, masked under one, and without halting."""
    model, images = firing_model(B, halting="rectangle")
    with torch.no_grad():
        tokens = model.embed(images).requires_grad_()
    model = copy.deepcopy(model).train()
    scores = {k: synthetic_scores(depths, L) for k, depths in halting_depths(B).items()}
    packed = {name: scheduled(model, scores[name]) for name in SHARES}
    masked = scheduled(model, scores[pattern])
    masked.execution = "masked"
    return packed, {"masked": masked, "off": model.without_halting()}, tokens


def step(network, tokens):
    """Forward and backward; returns the trace."""
    trace = network.forward_tokens(tokens, return_trace=True)
    labels = torch.arange(B) % network.config.num_classes
    loss = torch.nn.functional.cross_entropy(trace.logits, labels) + 0.1 * trace.ponder_loss
    tokens.grad = None
    network.zero_grad(set_to_none=True)
    loss.backward()
    return trace


def check(packed, masked, tokens):
    """The patterns are kept to, and both executions give the same numbers."""
    grads = {}
    for name, depths in halting_depths(B).items():
        if name in packed:
            assert torch.equal(step(packed[name], tokens).depth, depths)
            grads[name] = tokens.grad
    ours, theirs = (step(network, tokens).logits for network in (packed[HELD], masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (tokens.grad - grads[HELD]).norm() <= 1e-3 * tokens.grad.norm()


def block_flops(network):
    """FLOPs of the blocks' forward, from a pass of the whole network in evaluation."""
    _, images = firing_model(B, halting="rectangle")
    with torch.no_grad():
        trace = copy.deepcopy(network).eval()(images, return_trace=True)
    return cost_of_trace(network.config, trace).flops.blocks


def test_step(benchmark, report, bar, keep, limits, rounds, threads):
    packed, dense, tokens = networks(HELD)
    check(packed, dense["masked"], tokens)
    functions = {k: lambda n=n: step(n, tokens) for k, n in (packed | dense).items()}
    times = interleaved(functions | limits.functions, rounds=rounds)
    benchmark.pedantic(functions[HELD], rounds=3, warmup_rounds=1)
    everything = block_flops(dense["off"])
    theirs = {k: times[k] for k in dense}
    baseline = min(dense, key=lambda k: times[k].median)
    for name, network in packed.items():
        own, flops = times[name], block_flops(network)
        fraction = realized_fraction(times[baseline].median, own.median, everything, flops)
        columns = keep(
            {name: own} | theirs | {k: times[k] for k in limits.functions}, name,
            flops=PASSES * flops, prefix=f"{name} ",
        )  # fmt: skip
        report(
            {
                "halted": name, "batch": B, "threads": threads, "packed ms": ms(own),
                "masked ms": ms(times["masked"]), "off ms": ms(times["off"]), "baseline": baseline,
                "of it": f"{own.median / times[baseline].median:.3f}",
                "FLOPs saved": f"{1 - flops / everything:.3f}", "realized": f"{fraction:.2f}",
                **columns,
                "met": (
                    bar("training_realized", case(B, threads), fraction) if name == HELD else ""
                ),
            }
        )  # fmt: skip


def ms(timing):
    return f"{1e3 * timing.median:.0f}"


def kept(network, tokens):
    """Bytes that autograd keeps of a forward pass, and the share of cells that ran."""
    traces = []

    def forward():
        traces.append(network.forward_tokens(tokens, return_trace=True))

    found = kept_bytes(forward, network.parameters())
    return found, float(traces[0].active.double().mean())


def test_memory(report, bar):
    # Masked execution keeps some tensors of the active rows alone: so here everything runs.
    packed, dense, tokens = networks("none")
    everything = {name: kept(network, tokens)[0] for name, network in dense.items()}
    baseline = min(everything, key=everything.get)
    for name, network in packed.items():
        held, cells = kept(network, tokens)
        ratio = (1 - held / everything[baseline]) / (1 - cells)
        report(
            {
                "halted": name, "batch": B, "kept MB": mb(held),
                **{f"{k} MB": mb(v) for k, v in everything.items()}, "baseline": baseline,
                "cells saved": f"{1 - cells:.3f}", "bytes over cells saved": f"{ratio:.3f}",
                "met": bar("training_memory", f"batch {B}", ratio) if name == HELD else "",
            }
        )  # fmt: skip


def mb(number):
    return f"{number / 1e6:.0f}"
