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


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15])
@pytest.mark.parametrize(("N", "B"), [(64, 1), (64, 8), (196, 1), (196, 8)])
def test_forward(benchmark, report, threads, limits, N, B, rate):
    q, k, v = (spikes(rate, B, N, seed) for seed in range(3))
    theirs = [heads_first(x) for x in (q, k, v)]

    def ours():
        return F.spiking_attention(q, k, v, num_heads=HEADS, backend="native")

    with torch.no_grad():
        for order in ("q_kv", "qk_v"):
            assert torch.equal(heads_first(ours()), dense(*theirs, order))
        times = interleaved(
            {
                "ours": ours, "q (k^T v)": lambda: dense(*theirs, "q_kv"),
                "(q k^T) v": lambda: dense(*theirs, "qk_v"), **limits.functions,
            },
            rounds=ROUNDS,
        )  # fmt: skip
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    best = min(times["q (k^T v)"].median, times["(q k^T) v"].median)
    d = C // HEADS
    flops, moved = 4 * T * B * HEADS * N * d * d, 4 * 4 * q.numel()
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    benchmark.extra_info.update(flops=flops, bytes=moved)
    report(
        {
            "work": "forward", "tokens": N, "B": B, "rate": rate, "threads": threads,
            "ours ms": f"{1e3 * times['ours'].median:.3f}",
            "q(kv) ms": f"{1e3 * times['q (k^T v)'].median:.3f}",
            "(qk)v ms": f"{1e3 * times['(q k^T) v'].median:.3f}",
            "of the faster": f"{best / times['ours'].median:.1f}x", "bar": ">= 5x",
            "bytes/clone": f"{limits.bytes_share(moved, times['ours'], times):.2f}",
            "FLOPs/matmul": f"{limits.flops_share(flops, times['ours'], times):.2f}",
            "spread": f"{100 * times['ours'].spread:.0f} %",
        }
    )  # fmt: skip


@pytest.mark.parametrize(("N", "B"), [(64, 8), (196, 8)])
def test_forward_and_backward(benchmark, report, threads, limits, N, B):
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
    times = interleaved(
        {
            "ours": ours, "q (k^T v)": lambda: step("q_kv"), "(q k^T) v": lambda: step("qk_v"),
            **limits.functions,
        },
        rounds=ROUNDS,
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    best = min(times["q (k^T v)"].median, times["(q k^T) v"].median)
    d = C // HEADS
    flops, moved = 12 * T * B * HEADS * N * d * d, 4 * 11 * q.numel()
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    report(
        {
            "work": "forward + backward", "tokens": N, "B": B, "rate": 0.1, "threads": threads,
            "ours ms": f"{1e3 * times['ours'].median:.3f}",
            "q(kv) ms": f"{1e3 * times['q (k^T v)'].median:.3f}",
            "(qk)v ms": f"{1e3 * times['(q k^T) v'].median:.3f}",
            "of the faster": f"{best / times['ours'].median:.1f}x", "bar": "-",
            "bytes/clone": f"{limits.bytes_share(moved, times['ours'], times):.2f}",
            "FLOPs/matmul": f"{limits.flops_share(flops, times['ours'], times):.2f}",
            "spread": f"{100 * times['ours'].spread:.0f} %",
        }
    )  # fmt: skip


@pytest.mark.parametrize("N", [64, 196])
def test_time_follows_the_active_tokens(benchmark, report, threads, limits, N):
    """Rows of 25, 50 and 75 % of the tokens against all of them."""
    B = 8
    x = [spikes(0.1, B, N, seed) for seed in range(3)]
    layouts = {
        share: TokenLayout.from_active_steps(
            torch.full((B, N), T) * (torch.arange(N) < round(share * N)), T
        )
        for share in (1.0, *PARTS)
    }
    functions = {}
    for share, layout in layouts.items():
        rows = [layout.pack(values) for values in x]
        functions[f"{share}"] = lambda rows=rows, layout=layout: F.spiking_attention(
            *rows, num_heads=HEADS, layout=layout, backend="native"
        )
        kept = x[0][:, :, : round(share * N)], x[1][:, :, : round(share * N)]
        want = F.spiking_attention(
            *kept, x[2][:, :, : round(share * N)], num_heads=HEADS, backend="reference"
        )
        assert torch.equal(functions[f"{share}"](), want.flatten(0, 2))
    times = interleaved({**functions, **limits.functions}, rounds=ROUNDS)
    benchmark.pedantic(functions["1.0"], rounds=5, warmup_rounds=1)
    benchmark.extra_info.update({k: t.to_dict() for k, t in times.items()})
    whole = times["1.0"].median
    moved = 4 * 4 * x[0].numel()
    report(
        {
            "work": "active 75 / 50 / 25 %", "tokens": N, "B": B, "rate": 0.1, "threads": threads,
            "ours ms": f"{1e3 * whole:.3f}", "q(kv) ms": "-", "(qk)v ms": "-",
            "of the faster": " / ".join(f"{times[str(s)].median / whole:.2f}" for s in PARTS),
            "bar": "0.75 / 0.50 / 0.25",
            "bytes/clone": f"{limits.bytes_share(moved, times['1.0'], times):.2f}",
            "FLOPs/matmul": "-", "spread": f"{100 * times['1.0'].spread:.0f} %",
        }
    )  # fmt: skip
