"""Spiking attention against PyTorch's two dense matrix products, and against its active tokens.

    make bench-attention

Limits: q, k, v are read and the output is written once; of the products only those of spikes are
needed, about ``2 n d (rate_k + rate_q)`` additions a head for ``4 n d^2`` dense FLOPs.
"""

from __future__ import annotations

import pytest
import torch

import atsnn.functional as F
from atsnn import TokenLayout
from atsnn.measure import interleaved

HEADS, C, T = 12, 384, 4
ROUNDS = 21
PARTS = (0.75, 0.5, 0.25)


def spikes(rate, B, N, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((T, B, N, C), generator=generator) < rate).float()


def heads_first(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(2, 3).contiguous()


def dense(q, k, v, order):
    """The peer, its tensors in the layout that suits it and its result left in it."""
    if order == "q_kv":
        return q @ (k.transpose(-2, -1) @ v) * 0.125
    return (q @ k.transpose(-2, -1)) @ v * 0.125


def peers(step):
    """Both orders of the products; the faster one is the peer."""
    return {"q (k^T v)": lambda: step("q_kv"), "(q k^T) v": lambda: step("qk_v")}


def of_the_faster(times):
    best = min(times["q (k^T v)"].median, times["(q k^T) v"].median)
    return f"{best / times['ours'].median:.1f}x"


@pytest.fixture
def row(benchmark, report, threads, limits):
    """Report one row: what was timed as "ours", its FLOPs (dense) and bytes beside the limits."""

    def add(work, N, B, rate, times, ratio, bar, flops, moved):
        ours = times["ours"]
        benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
        benchmark.extra_info.update(flops=flops, bytes=moved)
        theirs = [times.get(name) for name in ("q (k^T v)", "(q k^T) v")]
        ms = [f"{1e3 * t.median:.3f}" if t else "-" for t in (ours, *theirs)]
        report(
            {
                "work": work, "tokens": N, "B": B, "rate": rate, "threads": threads,
                "ours ms": ms[0], "q(kv) ms": ms[1], "(qk)v ms": ms[2], "ratio": ratio, "bar": bar,
                "bytes/clone": f"{limits.bytes_share(moved, ours, times):.2f}",
                "FLOPs/matmul": f"{limits.flops_share(flops, ours, times):.2f}",
                "spread": f"{100 * ours.spread:.0f} %",
            }
        )  # fmt: skip

    return add


def products(N, B):
    """FLOPs of the two dense products."""
    return 4 * T * B * N * C * (C // HEADS)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15])
@pytest.mark.parametrize(("N", "B"), [(64, 1), (64, 8), (196, 1), (196, 8)])
def test_forward(benchmark, row, limits, N, B, rate):
    q, k, v = (spikes(rate, B, N, seed) for seed in range(3))
    theirs = [heads_first(x) for x in (q, k, v)]

    def ours():
        return F.spiking_attention(q, k, v, num_heads=HEADS, backend="native")

    with torch.no_grad():
        for order in ("q_kv", "qk_v"):
            assert torch.equal(heads_first(ours()), dense(*theirs, order))
        work = {"ours": ours, **peers(lambda order: dense(*theirs, order)), **limits.functions}
        times = interleaved(work, rounds=ROUNDS)
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    flops, moved = products(N, B), 4 * 4 * q.numel()
    row("forward", N, B, rate, times, of_the_faster(times), ">= 5x", flops, moved)


@pytest.mark.parametrize(("N", "B"), [(64, 8), (196, 8)])
def test_forward_and_backward(benchmark, row, limits, N, B):
    q, k, v = (spikes(0.1, B, N, seed).requires_grad_() for seed in range(3))
    theirs = [heads_first(x.detach()).requires_grad_() for x in (q, k, v)]
    grad = torch.randn(T, B, N, C)
    grad_there = heads_first(grad)

    def ours():
        out = F.spiking_attention(q, k, v, num_heads=HEADS, backend="native")
        return torch.autograd.grad(out, (q, k, v), grad)

    def step(order):
        return torch.autograd.grad(dense(*theirs, order), theirs, grad_there)

    for got, want in zip(ours(), step("q_kv"), strict=True):
        torch.testing.assert_close(heads_first(got), want, rtol=1e-4, atol=1e-4)
    times = interleaved({"ours": ours, **peers(step), **limits.functions}, rounds=ROUNDS)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    flops, moved = 3 * products(N, B), 4 * 11 * q.numel()
    row("forward + backward", N, B, 0.1, times, of_the_faster(times), "-", flops, moved)


@pytest.mark.parametrize("N", [64, 196])
def test_time_follows_the_active_tokens(benchmark, row, limits, N):
    """Rows of 75, 50 and 25 % of the tokens against all of them."""
    B = 8
    x = [spikes(0.1, B, N, seed) for seed in range(3)]
    functions = {}
    for share in (1.0, *PARTS):
        kept = round(share * N)
        n = torch.full((B, N), T) * (torch.arange(N) < kept)
        layout = TokenLayout.from_active_steps(n, T)
        rows = [layout.pack(values) for values in x]
        functions["ours" if share == 1 else f"{share}"] = run = lambda rows=rows, layout=layout: (
            F.spiking_attention(*rows, num_heads=HEADS, layout=layout, backend="native")
        )
        alone = (values[:, :, :kept] for values in x)
        want = F.spiking_attention(*alone, num_heads=HEADS, backend="reference")
        assert torch.equal(run(), want.flatten(0, 2))
    times = interleaved({**functions, **limits.functions}, rounds=ROUNDS)
    benchmark.pedantic(functions["ours"], rounds=5, warmup_rounds=1)
    shares = " / ".join(f"{times[str(s)].median / times['ours'].median:.2f}" for s in PARTS)
    wanted = " / ".join(f"{s:.2f}" for s in PARTS)
    flops, moved = products(N, B), 4 * 4 * x[0].numel()
    row("active 75 / 50 / 25 %", N, B, 0.1, times, shares, wanted, flops, moved)
