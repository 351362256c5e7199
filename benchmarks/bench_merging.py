"""Matching, merging and unmerging tokens against ToMe's rule in PyTorch, eager and compiled.

    make bench-merging

All tokens live all timesteps and none are equally similar, where both rules choose the same pairs.
The means are then the same up to our rounding to multiples of 2^-8, and the tokens come in another
order: ours by index, ToMe's (benchmarks/tome.py) by set. "packed" makes the rows of the tokens that
go on and their layout, "dense" leaves zeros where a token went, which ToMe has no form of: it is
compared with the same peer. "operator" is the matching without the checks of its arguments, as the
engine's own are.

Limits: a matching reads the counts and multiplies half of the tokens with the other half; a merge
reads all tokens and writes those that go on, an unmerge the other way round.
"""

from __future__ import annotations

import pytest
import tome
import torch

import atsnn.functional as F
from atsnn import TokenLayout, reference
from atsnn.measure import interleaved

T, C = 4, 384
CASES = [(N, B, N // part) for N in (64, 196) for B in (1, 16) for part in (8, 4)]
CLOSE = 1e-6  # similarities this far apart are told apart in float32


def gaps(counts, r):
    """Least difference of the similarities that a choice depends on."""
    found = reference.firing_similarity(counts)[:, ::2, 1::2].sqrt()
    first, second = found.topk(2, dim=-1).values.unbind(-1)
    ordered = first.sort(dim=-1, descending=True).values
    return min(float((first - second).min()), float((ordered[:, r - 1] - ordered[:, r]).min()))


def inputs(N, B, r):
    """Firing counts without ties, tokens of the residual stream, sizes."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        keys = (torch.rand((T, B, N, C), generator=generator) < 0.3).float()
        counts = F.firing_counts(keys)
        if gaps(counts, r) > CLOSE:
            x = torch.randint(0, 5, (T, B, N, C), generator=generator).float()
            return counts, x, torch.randint(1, 4, (B, N), generator=generator).float()
    raise AssertionError(f"expected counts without ties among 100 seeds, got none for N={N}, B={B}")


@pytest.fixture
def compiled():
    torch._dynamo.reset()  # compiled for too many shapes a function is run as it is
    return {
        name: torch.compile(getattr(tome, name), dynamic=False)
        for name in ("match", "merge", "unmerge")
    }


@pytest.mark.parametrize(("N", "B", "r"), CASES)
def test_merging(benchmark, report, keep, limits, rounds, threads, compiled, N, B, r):
    counts, x, sizes = inputs(N, B, r)
    layout = TokenLayout.full(T, B, N)
    rows = layout.pack(x)

    def match():
        return F.match_tokens(counts, r=r, active_steps=layout.active_steps, backend="native")

    def operator():
        return torch.ops.atsnn.match_tokens(counts, layout.active_steps, r, None)

    def packed():
        after = layout.without(plan.merged)
        y = F.merge_tokens(rows, plan, sizes=sizes, layout=layout, after=after, backend="native")
        return y, reference.merged_sizes(sizes, plan), after

    def dense():
        y = F.merge_tokens(x, plan, sizes=sizes, backend="native")
        return y, reference.merged_sizes(sizes, plan)

    def unmerge():
        return F.unmerge_tokens(y, plan, layout=layout, after=after, backend="native")

    with torch.no_grad():
        plan, (y, new_sizes, after) = (plan := match()), packed()
        theirs = tome.match(counts, r)
        their_y, their_sizes = tome.merge(x, sizes, theirs)
        check_match(plan, theirs, r)
        assert torch.equal(operator(), plan.target)
        check_merge(plan, theirs, after.unpack(y), new_sizes, their_y, their_sizes)
        assert torch.equal(dense()[0], after.unpack(y))
        assert torch.equal(to_grid(tome.unmerge(their_y, theirs)), layout.unpack(unmerge()))
        calls = {
            "match": (counts, r), "merge": (x, sizes, theirs), "unmerge": (their_y, theirs),
        }  # fmt: skip
        work = {
            "match": match,
            "operator": operator,
            "packed": packed,
            "dense": dense,
            "unmerge": unmerge,
        }
        for name, arguments in calls.items():
            check_compiled(compiled[name](*arguments), getattr(tome, name)(*arguments))
            work[f"ToMe {name}"] = lambda n=name, a=arguments: getattr(tome, n)(*a)
            work[f"compiled {name}"] = lambda n=name, a=arguments: compiled[n](*a)
        times = interleaved(work | limits.functions, rounds=rounds)
        benchmark.pedantic(packed, rounds=5, warmup_rounds=1)
    both = x.nbytes + y.nbytes
    matched, products = counts.nbytes + plan.target.nbytes, 2 * B * (N // 2) ** 2 * C
    for name, peer, moved, flops in (
        ("match", "match", matched, products),
        ("operator", "match", matched, products),
        ("packed", "merge", both, 2 * x.numel()),
        ("dense", "merge", 2 * x.nbytes, 2 * x.numel()),
        ("unmerge", "unmerge", both, 0),
    ):
        ours, eager, fast = (times[k] for k in (name, f"ToMe {peer}", f"compiled {peer}"))
        kept = keep(
            {name: ours, f"ToMe {peer}": eager, f"compiled {peer}": fast}
            | {key: times[key] for key in limits.functions},
            name, moved=moved, flops=flops, prefix=f"{name} ",
        )  # fmt: skip
        report(
            {
                "work": name if peer == name else f"{peer}, {name}", "tokens": N, "batch": B,
                "merged": r, "threads": threads, "ours us": f"{1e6 * ours.median:.0f}",
                "ToMe us": f"{1e6 * eager.median:.0f}",
                "ToMe": f"{eager.median / ours.median:.1f}x",
                "ToMe compiled": f"{fast.median / ours.median:.1f}x",
                "bytes/clone": kept["bytes/clone"],
                "FLOPs/matmul": kept.get("FLOPs/matmul", "-"), "spread": kept["spread"],
            }
        )  # fmt: skip


def to_grid(x):
    return reference.round_to(x, reference.ROW_BITS)


def check_match(plan, theirs, r):
    """Both merge the same tokens into the same."""
    assert torch.equal(plan.merged.sum(1), torch.full((len(plan.merged),), r))
    assert torch.equal(plan.target.gather(1, 2 * theirs.go), 2 * theirs.to + 1)


def check_merge(plan, theirs, y, sizes, their_y, their_sizes):
    """``y [T, B, N, C]`` with zeros where a token went, as ToMe's on our grid."""
    kept = tome.tokens(theirs, y.shape[2])
    assert not plan.merged.gather(1, kept).any()
    assert torch.equal(sizes.gather(1, kept), their_sizes)
    there = kept[None, :, :, None].expand(their_y.shape)
    assert torch.equal(y.gather(2, there), to_grid(their_y))


def check_compiled(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
