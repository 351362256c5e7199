"""What halting saves: the engine and the packed modules on synthetic patterns, a trained model.

    make bench-halting

Synthetic patterns have the method's nesting and halt 20, 40 and 60 % of the cells; the scores are
computed all the same. The baseline is the same network without halting. Realized fraction = share
of time saved / share of FLOPs saved, or of SOPs, the additions of what fired: the cells that halt
are those of later blocks, whose inputs are fuller, so more additions are saved than FLOPs say.
"""

from __future__ import annotations

import pytest
import torch
from workloads import L, case, firing_model, halting_depths

import atsnn
from atsnn.compare import compare_engine
from atsnn.cost import cost_of_trace
from atsnn.data import load
from atsnn.measure import Timing, interleaved, realized_fraction
from atsnn.schedule import scheduled, synthetic_scores

BATCHES = pytest.mark.parametrize("B", [1, 16], ids=["batch-1", "batch-16"])


class Traces:
    """Traces of the engine's runs, taken in turns: it has a clock for each part."""

    def __init__(self, runs, limits, rounds):
        self.of = {name: [] for name in runs}

        def taken(name, trace):
            if name in runs:
                self.of[name].append(trace)

        work = runs | limits.functions
        times = interleaved(work, rounds=rounds, least_seconds=0.0, taken=taken)
        self.limits = {name: times[name] for name in limits.functions}

    def timing(self, name, part="blocks"):
        return Timing(tuple(getattr(trace.seconds, part) for trace in self.of[name]))

    def median(self, name, part="blocks"):
        return self.timing(name, part).median

    def saved(self, name, work, part="blocks"):
        """Share of the FLOPs or SOPs of a part that "off" has and the run has not."""
        after, before = (getattr(self.of[k][0].cost, work) for k in (name, "off"))
        return 1 - getattr(after, part) / getattr(before, part)

    def realized(self, name, work="flops", part="blocks"):
        saved = self.saved(name, work, part)
        return realized_fraction(self.median("off", part), self.median(name, part), 1, 1 - saved)

    def own_cost(self, name):
        """Halting and merging over block time. Both runs read out, in the part of halting."""
        own = self.median(name, "halting") - self.median("off", "halting")
        return (own + self.median(name, "merging")) / self.median(name)

    def columns(self, name):
        """Blocks beside the whole model, of FLOPs and of SOPs."""
        return {
            f"{what}: of {title}": written(self.realized(name, title.lower(), part))
            for what, part in (("blocks", "blocks"), ("model", "total"))
            for title in ("FLOPs", "SOPs")
        }


def written(fraction):
    return "" if fraction is None else f"{fraction:.2f}"


@pytest.mark.parametrize("merge_r", [0, 8], ids=["halting", "merging"])
@BATCHES
def test_engine(benchmark, report, bar, keep, limits, rounds, threads, B, merge_r):
    model, x = firing_model(B, halting="rectangle", merge_r=merge_r)
    engine, plain = atsnn.freeze(model), atsnn.freeze(model.without_halting())
    runs = {"off": lambda: plain(x, return_trace=True)}
    for name, depths in halting_depths(B).items():
        scores = synthetic_scores(depths, L)
        trace = engine(x, return_trace=True, scores=scores)
        assert merge_r or torch.equal(trace.depth, depths)
        assert torch.equal(trace.logits, engine(x, execution="masked", scores=scores))
        runs[name] = lambda scores=scores: engine(x, return_trace=True, scores=scores)
    assert merge_r or torch.equal(runs["none"]().logits, plain(x))
    found = Traces(runs, limits, rounds)
    benchmark.pedantic(lambda: engine(x), rounds=3)
    off = found.timing("off")
    for name in [k for k in runs if k != "off"]:
        blocks, own = found.timing(name), found.own_cost(name)
        of_off = blocks.median / off.median
        kept = keep(
            {"blocks": blocks, "off": off, "model": found.timing(name, "total"), **found.limits},
            "blocks", flops=found.of[name][0].cost.flops.blocks, prefix=f"{name} ",
        )  # fmt: skip
        what = case(B, threads, f"{name} halted" + f", {merge_r} pairs merge" * (merge_r > 0))
        met = []
        if not merge_r:
            on = ("halting_off", of_off) if name == "none" else (
                "halting_realized", found.realized(name)
            )  # fmt: skip
            met.append(bar(on[0], what, on[1]))
        met.append(bar("halting_own", what, own))
        report(
            {
                "engine: halted": name, "merge": merge_r, "batch": B, "threads": threads,
                "blocks ms": f"{1e3 * blocks.median:.2f}", "of off": f"{of_off:.3f}",
                "FLOPs saved": f"{found.saved(name, 'flops'):.3f}",
                "SOPs saved": f"{found.saved(name, 'sops'):.3f}", **found.columns(name),
                "own cost": f"{100 * own:.2f} %", **kept, "met": " / ".join(met),
            }
        )  # fmt: skip


@BATCHES
def test_modules(benchmark, report, keep, limits, rounds, threads, B):
    """The blocks, packed, of the modules in inference; dense without halting."""
    model, x = firing_model(B, halting="rectangle")
    plain = model.without_halting()
    with torch.no_grad():
        tokens = model.embed(x)
        functions = {"dense": lambda: plain.forward_tokens(tokens)}
        flops = {"dense": block_flops(plain, plain(x, return_trace=True))}
        for name, depths in halting_depths(B).items():
            packed, masked = (scheduled(model, synthetic_scores(depths, L)) for _ in range(2))
            masked.execution = "masked"
            trace = packed(x, return_trace=True)
            other = masked(x, return_trace=True)
            assert torch.equal(trace.depth, depths) and torch.equal(other.depth, depths)
            torch.testing.assert_close(trace.logits, other.logits, rtol=1e-3, atol=1e-3)
            flops[name] = block_flops(model, trace)
            functions[name] = lambda packed=packed: packed.forward_tokens(tokens)
        times = interleaved(functions | limits.functions, rounds=rounds)
        benchmark.pedantic(functions["40 %"], rounds=3, warmup_rounds=1)
    dense = times["dense"]
    for name in [k for k in functions if k != "dense"]:
        own = times[name]
        fraction = realized_fraction(dense.median, own.median, flops["dense"], flops[name])
        kept = keep(
            {name: own, "dense": dense} | {k: times[k] for k in limits.functions}, name,
            flops=flops[name], prefix=f"{name} ",
        )  # fmt: skip
        report(
            {
                "modules: halted": name, "batch": B, "threads": threads,
                "dense ms": f"{1e3 * dense.median:.1f}", "packed ms": f"{1e3 * own.median:.1f}",
                "of dense": f"{own.median / dense.median:.3f}",
                "FLOPs saved": f"{1 - flops[name] / flops['dense']:.3f}",
                "realized": written(fraction), **kept,
            }
        )  # fmt: skip


def block_flops(model, trace):
    return cost_of_trace(model.config, trace).flops.blocks


@BATCHES
def test_trained(benchmark, report, keep, limits, rounds, threads, B):
    """The shipped digits model, which decides for itself."""
    model = atsnn.from_pretrained("digits")
    test = load("digits", model.config.image_size)["test"]
    difference = compare_engine(model, test.images[:64])
    assert difference.classes == 0
    x = test.images[:B]
    plain = model.without_halting()
    engines = {"halting": atsnn.freeze(model), "off": atsnn.freeze(plain)}
    compiled = torch.compile(plain, dynamic=False)
    functions = {k: lambda e=e: e(x) for k, e in engines.items()} | {
        "modules": lambda: model(x), "dense": lambda: plain(x), "compiled": lambda: compiled(x),
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-3)
        times = interleaved(functions | limits.functions, rounds=rounds)
    runs = {k: lambda e=e: e(x, return_trace=True) for k, e in engines.items()}
    found = Traces(runs, limits, rounds)
    benchmark.pedantic(functions["halting"], rounds=3)
    trace = found.of["halting"][0]
    faster = {k: times[k].median / times["halting"].median for k in functions}
    kept = keep(times, "halting", flops=trace.cost.flops.total)
    benchmark.extra_info["seconds"] = {k: [dict(t.seconds) for t in v] for k, v in found.of.items()}
    report(
        {
            "trained": "digits", "batch": B, "threads": threads,
            "engine ms": f"{1e3 * times['halting'].median:.2f}",
            "cells run": f"{float(trace.active.double().mean()):.2f}",
            "engine, off": f"{faster['off']:.2f}x", "modules": f"{faster['modules']:.1f}x",
            "modules, off": f"{faster['dense']:.1f}x",
            "compiled, off": f"{faster['compiled']:.1f}x", **found.columns("halting"),
            "own cost": f"{100 * found.own_cost('halting'):.1f} %",
            "flipped": f"{difference.flipped} of {difference.spikes}", **kept,
        }
    )  # fmt: skip
