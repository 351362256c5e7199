"""The Triton kernels against SpikingJelly's Triton neuron, PyTorch eager and compiled.

    pytest benchmarks --device cuda

On a machine without a GPU, ``TRITON_INTERPRET=1 pytest benchmarks --device cuda`` runs the same on
small shapes: what it computes is checked, what it takes says nothing about a GPU.

Limits: each operation's bytes at the rate of a copy (``clone``) measured in the same run, its FLOPs
at that of a matrix product.
"""

from __future__ import annotations

import pytest
import torch
from spikingjelly.activation_based import functional, surrogate

import atsnn
import atsnn.functional as F
from atsnn import TokenLayout
from atsnn.measure import interleaved
from atsnn.schedule import scheduled, synthetic_depths, synthetic_scores

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Spikformer-4-384 on CIFAR and 8-512 on ImageNet: T, B, N, C, heads.
SHAPES = [(4, 32, 64, 384, 12), (4, 16, 196, 512, 8)] if ON_GPU else [(3, 2, 6, 32, 2)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
WAIT = torch.cuda.synchronize if ON_GPU else None
ROUNDS = 21 if ON_GPU else 1
SHARES = (0.8, 0.6, 0.4)


@pytest.fixture(autouse=True)
def by_triton():
    with atsnn.use_backend("triton"):
        yield


def normal(*shape):
    return torch.randn(shape, device=DEVICE)


def spikes(*shape, rate=0.1):
    return (torch.rand(shape, device=DEVICE) < rate).float()


COPIED = torch.zeros(1 << (26 if ON_GPU else 10), device=DEVICE)


def timed(functions):
    with_copy = {**functions, "clone": COPIED.clone}
    warmup = 3 if ON_GPU else 1
    return interleaved(with_copy, rounds=ROUNDS, warmup=warmup, wait=WAIT,
                       least_seconds=2e-3 if ON_GPU else 0)  # fmt: skip


def line(work, shape, times, moved, flops=None):
    """One row: our time, the peers' as multiples of it, and the share of what a copy moves."""
    ours = times["ours"].median
    copied = 2 * COPIED.numel() * COPIED.element_size() / times["clone"].median
    peers = ", ".join(
        f"{name} {t.median / ours:.2f}x"
        for name, t in times.items()
        if name not in ("ours", "clone")
    )
    return {
        "work": work, "shape": "x".join(map(str, shape)), "ours us": f"{1e6 * ours:.1f}",
        "peers": peers, "GB/s": f"{moved / ours / 1e9:.0f}",
        "of copy": f"{moved / ours / copied:.2f}",
        "GFLOP/s": "-" if flops is None else f"{flops / ours / 1e9:.0f}",
        "spread": f"{100 * times['ours'].spread:.0f} %",
    }  # fmt: skip


def finish(benchmark, report, times, row, ours):
    benchmark.pedantic(ours, rounds=3 if ON_GPU else 1, warmup_rounds=0)
    benchmark.extra_info.update({name: t.to_dict() for name, t in times.items()})
    report(row)


# -- neurons --------------------------------------------------------------------------------------


def peer_lif(x):
    """SpikingJelly's LIF as Spikformer sets it; on a GPU it is its own Triton kernel."""
    return functional.lif_multi_step(
        x, torch.zeros_like(x[0]), 2.0, True, 1.0, 0.0, surrogate.Sigmoid(), True, False
    )[:2]


def plain_lif(x):
    """The same in PyTorch operations, for its compiler."""
    return atsnn.reference.neuron(
        x, None, None, "lif", 2.0, 1.0, 0.0, True, True, "sigmoid", 4.0
    )  # fmt: skip


def peers_of(function, *arguments):
    """The function in PyTorch's operations and, on a GPU, compiled."""
    peers = {"eager": lambda: function(*arguments)}
    if ON_GPU:
        compiled = torch.compile(function)
        peers["compiled"] = lambda: compiled(*arguments)
    return peers


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_lif_forward(benchmark, report, shape):
    x = normal(*shape[:4])

    def ours():
        return F.neuron(x, detach_reset=True)

    with torch.no_grad():
        for got, want in zip(ours(), peer_lif(x), strict=True):
            assert torch.equal(got, want)
        times = timed({"ours": ours, "SpikingJelly": lambda: peer_lif(x), **peers_of(plain_lif, x)})
    moved = (2 * x.numel() + x[0].numel()) * x.element_size()
    finish(benchmark, report, times, line("LIF forward", shape, times, moved), ours)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_lif_forward_and_backward(benchmark, report, shape):
    x, grad = normal(*shape[:4]).requires_grad_(), normal(*shape[:4])

    def step(function):
        return torch.autograd.grad(function(x)[0], x, grad)[0]

    def lif(x):
        return F.neuron(x, detach_reset=True)

    torch.testing.assert_close(step(lif), step(peer_lif), rtol=1e-5, atol=1e-5)
    peers = {"eager": lambda: step(plain_lif)}
    if ON_GPU:
        compiled = torch.compile(plain_lif)
        peers["compiled"] = lambda: step(compiled)
    times = timed({"ours": lambda: step(lif), "SpikingJelly": lambda: step(peer_lif), **peers})
    moved = 5 * x.numel() * x.element_size()
    row = line("LIF forward + backward", shape, times, moved)
    finish(benchmark, report, times, row, lambda: step(lif))


# -- attention ------------------------------------------------------------------------------------


def dense_attention(q, k, v):
    return q @ (k.transpose(-2, -1) @ v) * 0.125


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_attention(benchmark, report, shape, share):
    """All tokens, or half of them as rows of a layout, against dense products over all."""
    T, B, N, C, heads = shape
    q, k, v = (spikes(T, B, N, C) for _ in range(3))
    kept = round(share * N)
    steps = torch.full((B, N), T, device=DEVICE) * (torch.arange(N, device=DEVICE) < kept)
    layout = TokenLayout.from_active_steps(steps, T)
    rows = [layout.pack(x) for x in (q, k, v)]

    def ours():
        return F.spiking_attention(*rows, num_heads=heads, layout=layout)

    theirs = [x.unflatten(-1, (heads, -1)).transpose(2, 3).contiguous() for x in (q, k, v)]
    with torch.no_grad():
        alone = (x[:, :, :kept] for x in (q, k, v))
        want = F.spiking_attention(*alone, num_heads=heads, backend="reference")
        assert torch.equal(ours(), layout.pack(torch.nn.functional.pad(want, (0, 0, 0, N - kept))))
        times = timed({"ours": ours, **peers_of(dense_attention, *theirs)})
    flops = 4 * T * B * kept * C * (C // heads)
    moved = 4 * rows[0].numel() * rows[0].element_size()
    row = line(f"attention, {share:.0%} of tokens", shape, times, moved, flops)
    finish(benchmark, report, times, row, ours)


# -- linear maps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [False, True], ids=["floats", "bits"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_linear(benchmark, report, shape, bits):
    """Linear with folded BatchNorm and LIF, to four times the channels, in one kernel."""
    T, B, N, C, _ = shape
    x = spikes(T, B, N, C)
    weight = torch.randint(-8, 8, (4 * C, C), device=DEVICE) / 16.0
    bias = torch.randint(-8, 8, (4 * C,), device=DEVICE) / 16.0
    packed = F.pack_linear(weight, bias)
    given = F.pack_spikes(x) if bits else x

    def ours():
        return F.spike_linear_lif(given, packed)

    def theirs(x):
        return plain_lif(torch.nn.functional.linear(x, weight, bias))[0]

    with torch.no_grad():
        want = theirs(x)
        assert torch.equal(F.unpack_spikes(ours(), 4 * C) if bits else ours(), want)
        times = timed({"ours": ours, **peers_of(theirs, x)})
    out = ours()
    moved = (given.numel() * given.element_size() + weight.numel() * 4
             + out.numel() * out.element_size())  # fmt: skip
    flops = 2 * T * B * N * C * 4 * C
    row = line(f"linear + LIF, {'bits' if bits else 'floats'}", shape, times, moved, flops)
    finish(benchmark, report, times, row, ours)


# -- the blocks -----------------------------------------------------------------------------------


def graph_of(model, x):
    """A CUDA graph of the padded execution, or on a CPU the execution itself."""
    model.execution = "padded"
    if not ON_GPU:
        return lambda: model.forward_tokens(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            model.forward_tokens(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.forward_tokens(x)
    return graph.replay


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_blocks(benchmark, report, shape):
    """What halting 20, 40 and 60 % of the cells saves, packed and in a CUDA graph."""
    T, B, N, C, heads = shape
    L = 4 if ON_GPU else 3
    size, stem = {64: (32, "cifar"), 196: (224, "imagenet")}.get(N, (8, "cifar"))
    config = atsnn.SpikformerConfig(
        image_size=size, stem=stem, embed_dim=C, depth=L, num_heads=heads, T=T,
        halting="rectangle",
    )  # fmt: skip
    model = atsnn.testing.exact_model(config).to(DEVICE)
    N = (config.image_size // config.patch) ** 2
    x = spikes(T, B, N, C, rate=0.15)
    plain = model.without_halting()
    functions = {"dense": lambda: plain.forward_tokens(x)}
    with torch.no_grad():
        for share in SHARES:
            depths = synthetic_depths(L, T, B, N, share).to(DEVICE)
            halted = scheduled(model, synthetic_scores(depths, L))
            packed = halted.forward_tokens(x)
            functions[f"packed {share:.0%}"] = lambda halted=halted: halted.forward_tokens(x)
            padded = scheduled(model, synthetic_scores(depths, L))
            functions[f"padded {share:.0%}"] = graph_of(padded, x)
            assert torch.equal(padded.forward_tokens(x), packed)
        times = timed(functions)
    dense = times["dense"].median
    row = {"work": "blocks", "shape": "x".join(map(str, shape)), "dense us": f"{1e6 * dense:.0f}"}
    row |= {name: f"{t.median / dense:.2f}" for name, t in times.items() if name in functions}
    finish(benchmark, report, times, row, functions["dense"])
