"""Spike linear + BatchNorm + LIF on bits, against PyTorch's dense product alone.

    make bench-linear

Limits: an addition takes a float of weights from the first cache, of which this core reads 64
bytes a cycle, or from the second, 32 bytes a cycle. `of limit` is the share of the additions a
second that the kernel reaches where it does little else and its weights stay in the first cache.
Rows with many spikes are looked up four inputs at a time, so there it can be more than all of it.
"FLOPs/matmul" counts the dense products the work stands for, so it is more than 1 where zeros are
left out.
"""

from __future__ import annotations

import pytest
import torch
from bars import on_threads

import atsnn.functional as F
from atsnn.measure import interleaved

T, N = 4, 64
SHAPES = [(384, 384), (384, 1536), (1536, 384)]
BAR_OF = {
    0.01: "linear_one", 0.05: "linear_ten", 0.10: "linear_ten",
    0.20: "linear_dense", 0.30: "linear_dense", 0.40: "linear_dense",
}  # fmt: skip

LIMIT_ADDS = T * N * 512 * 64


def in_first_cache():
    """The kernel where little but additions is done: 512 for each row and output, in tiles whose
    weights stay in the first cache."""
    packed = F.pack_linear(torch.zeros(64, 1536))
    x = torch.zeros(T, N, 1536)
    x[..., ::3] = 1
    bits = F.pack_spikes(x)
    return lambda: F.spike_linear_lif(bits, packed)


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_linear(benchmark, report, bar, keep, limits, rounds, threads, shape):
    """256 rows, bits in and out, BatchNorm folded and neurons run, against the product alone."""
    inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/64: their sums are exact in any order.
    weight = torch.randint(-8, 9, (outputs, inputs), generator=generator) / 64.0
    bias = torch.randint(-8, 9, (outputs,), generator=generator) / 64.0
    packed = F.pack_linear(weight, bias)
    functions, adds, moved = {"limit": in_first_cache(), **limits.functions}, {}, {}
    for rate in BAR_OF:
        x = (torch.rand((T, N, inputs), generator=generator) < rate).float()
        bits = F.pack_spikes(x)
        want, _ = F.neuron(torch.nn.functional.linear(x, weight, bias))
        got = F.spike_linear_lif(bits, packed)
        assert torch.equal(F.unpack_spikes(got, outputs), want)
        assert torch.equal(F.spike_linear_lif(x, packed), want)
        functions[f"ours {rate}"] = lambda bits=bits: F.spike_linear_lif(bits, packed)
        functions[f"dense {rate}"] = lambda x=x: torch.nn.functional.linear(x, weight, bias)
        functions[f"floats {rate}"] = lambda x=x: F.spike_linear_lif(x, packed)
        adds[rate] = float(x.sum()) * outputs
        moved[rate] = bits.nbytes + got.nbytes + weight.nbytes + bias.nbytes
    with torch.no_grad():
        times = interleaved(functions, rounds=rounds)
        benchmark.pedantic(functions["ours 0.1"], rounds=5, warmup_rounds=1)
    limit = LIMIT_ADDS / times["limit"].median
    for rate, name in BAR_OF.items():
        ours, dense = times[f"ours {rate}"], times[f"dense {rate}"]
        speed = adds[rate] / ours.median
        kept = keep(
            {key: times[key] for key in (*limits.functions, "limit")}
            | {"ours": ours, "dense": dense, "floats": times[f"floats {rate}"]},
            moved=moved[rate], flops=2.0 * T * N * inputs * outputs, prefix=f"{rate} ",
        )  # fmt: skip
        case = f"{inputs} -> {outputs}, {rate:.0%}, {on_threads(threads)}"
        report(
            {
                "work": f"{inputs} -> {outputs}", "rate": f"{rate:.0%}", "threads": threads,
                "ours us": f"{1e6 * ours.median:.0f}", "dense us": f"{1e6 * dense.median:.0f}",
                "faster": f"{dense.median / ours.median:.1f}x",
                "from floats": f"{dense.median / times[f'floats {rate}'].median:.1f}x",
                "G add/s": f"{speed / 1e9:.1f}", "of limit": f"{speed / limit:.2f}",
                **kept, "met": bar(name, case, dense.median / ours.median),
            }
        )  # fmt: skip
