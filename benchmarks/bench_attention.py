"""Spiking attention against PyTorch's two dense matrix products, and against its active tokens.

    make bench-attention

Limits: q, k, v are read and the output is written once; of the products only those of spikes are
needed, about ``2 n d (rate_k + rate_q)`` additions a head for ``4 n d^2`` dense FLOPs.

"on bits" is what the engine runs, ``attend_lif``: q, k, v and what comes out are bits, 1/32 of the
bytes, and the neurons behind the attention run with it. It is held to no bar: the products it is
compared with run no neurons.
"""

from __future__ import annotations

import pytest
import torch
from bars import on_threads

import atsnn.functional as F
from atsnn import TokenLayout
from atsnn.measure import interleaved

HEADS, C, T = 12, 384, 4
SCALE, THRESHOLD = 0.125, 0.5
PARTS = (0.75, 0.5, 0.25)


def spikes(rate, B, N, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((T, B, N, C), generator=generator) < rate).float()


def heads_first(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(2, 3).contiguous()


def dense(q, k, v, order):
    """The peer, its tensors in the layout that suits it and its result left in it.

    It is scaled where there is least to scale.
    """
    if order == "q_kv":
        return q @ (k.transpose(-2, -1) @ v * SCALE)
    return (q @ k.transpose(-2, -1)) @ v * SCALE


def peers(step):
    """Both orders of the products; the faster one is the peer."""
    return {"q (k^T v)": lambda: step("q_kv"), "(q k^T) v": lambda: step("qk_v")}


def faster(times, name="ours"):
    """Times as fast as the faster order."""
    return min(times["q (k^T v)"].median, times["(q k^T) v"].median) / times[name].median


def attend_lif(*qkv):
    """The engine's attention on bits, with its neurons: spikes as bits."""
    neuron = ("lif", 2.0, None, THRESHOLD, 0.0, True)
    return torch.ops.atsnn.attend_lif(*qkv, None, C, HEADS, SCALE, *neuron)[0]


def case_of(N, B, threads, *more):
    return ", ".join((f"{N} tokens, batch {B}", *more, on_threads(threads)))


def products(N, B):
    """FLOPs of the two dense products."""
    return 4 * T * B * N * C * (C // HEADS)


def ms(timing):
    return f"{1e3 * timing.median:.3f}"


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.15])
@pytest.mark.parametrize(("N", "B"), [(64, 1), (64, 8), (196, 1), (196, 8)])
def test_forward(benchmark, report, bar, keep, limits, rounds, threads, N, B, rate):
    q, k, v = (spikes(rate, B, N, seed) for seed in range(3))
    theirs = [heads_first(x) for x in (q, k, v)]
    bits = [F.pack_spikes(x) for x in (q, k, v)]

    def ours():
        return F.spiking_attention(q, k, v, num_heads=HEADS, scale=SCALE, backend="native")

    with torch.no_grad():
        for order in ("q_kv", "qk_v"):
            assert torch.equal(heads_first(ours()), dense(*theirs, order))
        fired, _ = F.neuron(ours(), v_threshold=THRESHOLD)
        assert 0 < fired.mean() < 1
        assert torch.equal(F.unpack_spikes(attend_lif(*bits), C), fired)
        work = {"ours": ours, "on bits": lambda: attend_lif(*bits), **limits.functions}
        times = interleaved(work | peers(lambda order: dense(*theirs, order)), rounds=rounds)
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    kept = keep(times, moved=4 * q.nbytes, flops=products(N, B))
    met = bar("attention_dense", case_of(N, B, threads, f"{rate:.0%}"), faster(times))
    report(
        {
            "work": "forward", "tokens": N, "batch": B, "rate": f"{rate:.0%}", "threads": threads,
            "ours ms": ms(times["ours"]), "on bits ms": ms(times["on bits"]),
            "q(kv) ms": ms(times["q (k^T v)"]), "(qk)v ms": ms(times["(q k^T) v"]),
            "ours": f"{faster(times):.1f}x", "on bits": f"{faster(times, 'on bits'):.1f}x",
            **kept, "met": met,
        }
    )  # fmt: skip


@pytest.mark.parametrize(("N", "B"), [(64, 8), (196, 8)])
def test_forward_and_backward(benchmark, report, keep, limits, rounds, threads, N, B):
    q, k, v = (spikes(0.1, B, N, seed).requires_grad_() for seed in range(3))
    theirs = [heads_first(x.detach()).requires_grad_() for x in (q, k, v)]
    grad = torch.randn(T, B, N, C)
    grad_there = heads_first(grad)

    def ours():
        out = F.spiking_attention(q, k, v, num_heads=HEADS, scale=SCALE, backend="native")
        return torch.autograd.grad(out, (q, k, v), grad)

    def step(order):
        return torch.autograd.grad(dense(*theirs, order), theirs, grad_there)

    for order in ("q_kv", "qk_v"):
        for got, want in zip(ours(), step(order), strict=True):
            torch.testing.assert_close(heads_first(got), want, rtol=1e-4, atol=1e-4)
    times = interleaved({"ours": ours, **peers(step), **limits.functions}, rounds=rounds)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    kept = keep(times, moved=11 * q.nbytes, flops=3 * products(N, B))
    report(
        {
            "work": "forward + backward", "tokens": N, "batch": B, "rate": "10%",
            "threads": threads, "ours ms": ms(times["ours"]),
            "q(kv) ms": ms(times["q (k^T v)"]), "(qk)v ms": ms(times["(q k^T) v"]),
            "ours": f"{faster(times):.1f}x", **kept,
        }
    )  # fmt: skip


@pytest.mark.parametrize("N", [64, 196])
def test_time_follows_the_active_tokens(benchmark, report, bar, keep, limits, rounds, threads, N):
    """Rows of 75, 50 and 25 % of the tokens against all of them."""
    B = 8
    x = [spikes(0.1, B, N, seed) for seed in range(3)]
    functions = {}
    for share in (1.0, *PARTS):
        tokens = round(share * N)
        n = torch.full((B, N), T) * (torch.arange(N) < tokens)
        layout = TokenLayout.from_active_steps(n, T)
        rows = [layout.pack(values) for values in x]
        functions["ours" if share == 1 else f"{share:.0%}"] = run = (
            lambda rows=rows, layout=layout: F.spiking_attention(
                *rows, num_heads=HEADS, scale=SCALE, layout=layout, backend="native"
            )
        )
        alone = (values[:, :, :tokens] for values in x)
        want = F.spiking_attention(*alone, num_heads=HEADS, scale=SCALE, backend="reference")
        assert torch.equal(run(), want.flatten(0, 2))
    times = interleaved(functions | limits.functions, rounds=rounds)
    benchmark.pedantic(functions["ours"], rounds=5, warmup_rounds=1)
    kept = keep(times, moved=4 * x[0].nbytes, flops=products(N, B))
    for share in PARTS:
        name = f"{share:.0%}"
        left = times[name].median / times["ours"].median
        followed = (1 - left) / (1 - round(share * N) / N)
        met = bar("attention_active", case_of(N, B, threads, f"{name} active"), followed)
        report(
            {
                "work": "active tokens alone", "tokens": N, "batch": B, "threads": threads,
                "active": name, "all ms": ms(times["ours"]), "ms": ms(times[name]),
                "of all": f"{left:.2f}", "saved / left out": f"{followed:.2f}",
                **kept, "met": met,
            }
        )  # fmt: skip
