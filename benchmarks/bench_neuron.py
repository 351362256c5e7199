"""LIF forward and backward against a copy of the input, SpikingJelly, snnTorch and Norse.

    make bench-neuron

Limits: the forward reads ``x`` and writes spikes and final state, as a clone and a zero-fill do.
The backward reads ``x`` and the gradient of the spikes, writes the gradient of ``x``, and evaluates
one surrogate (an exponential and a division) an element.

Inputs are odd multiples of 1/64, on which no potential meets the threshold and nothing rounds: so
the four fire the same spikes although snnTorch and Norse compute in another order and fire above
the threshold, not at it. All peers run as they are and under ``torch.compile``, compiled for
each shape. snnTorch decays no input, so it is handed one that already is. Its reset, like ours and
SpikingJelly's here, is left out of the backward; Norse's cannot be, and is held to ours with it.

Of the two verdicts on a forward the first is that against the copy.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from bars import on_threads
from spikingjelly.activation_based import functional, surrogate

import atsnn.functional as F
from atsnn.measure import interleaved, kept_bytes

with warnings.catch_warnings():  # what these warn of on import is their own affair
    warnings.simplefilter("ignore")
    import snntorch
    import snntorch.surrogate
    from norse.torch.functional import lif

SHAPES = [(4, 32, 64, 384), (4, 8, 196, 512)]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
# Operations an element: charge 3, fire 1, reset 1; of the backward see docs/results/README.md.
FORWARD_OPS, BACKWARD_OPS = 5, 30
TAU = 2.0


def ours(x):
    return F.neuron(x, tau=TAU, detach_reset=True, backend="native")


def spikingjelly(x):
    """SpikingJelly's LIF as Spikformer sets it."""
    return functional.lif_multi_step(
        x, torch.zeros_like(x[0]), TAU, True, 1.0, 0.0, surrogate.Sigmoid(), True, False
    )[:2]


LEAKY = snntorch.Leaky(
    beta=1 - 1 / TAU, reset_mechanism="zero", spike_grad=snntorch.surrogate.sigmoid(slope=4)
)
NORSE = lif.LIFParameters(
    tau_syn_inv=torch.tensor(1.0), tau_mem_inv=torch.tensor(1 / TAU), v_leak=torch.tensor(0.0),
    v_th=torch.tensor(1.0), v_reset=torch.tensor(0.0), method="tanh", alpha=2.0,
)  # fmt: skip


def snntorch_leaky(half):
    """snnTorch's Leaky over the timesteps of ``x / tau``; see ``atsnn.adapters``."""
    v, spikes = torch.zeros_like(half[0]), []
    for x_t in half:
        s, v = LEAKY(x_t, v)
        spikes.append(s)
    return torch.stack(spikes), v


def norse(x):
    """Norse's LIF; see ``atsnn.adapters``."""
    zero = torch.zeros_like(x[0])
    state, spikes = lif.LIFFeedForwardState(v=zero, i=zero), []
    for x_t in x:
        s, state = lif.lif_feed_forward_step(x_t, state, NORSE, dt=1.0)
        spikes.append(s)
    return torch.stack(spikes), state.v


EAGER = {"SJ": spikingjelly, "snnTorch": snntorch_leaky, "Norse": norse}


def compiled(function):
    """For the shape at hand: one for any shape is slower."""
    return torch.compile(function, dynamic=False)


@pytest.fixture
def peers():
    """Each as it is and compiled."""
    torch._dynamo.reset()  # compiled for too many shapes a function is run as it is
    return EAGER | {f"{name} compiled": compiled(f) for name, f in EAGER.items()}


def inputs(shape):
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.floor(32 * torch.randn(shape, generator=generator)) + 1) / 64


def clone(x):
    return x.clone(), torch.zeros_like(x[0])


def case_of(shape):
    return f"[{','.join(map(str, shape))}]"


@pytest.fixture
def row(report, threads):
    """Report one row: ours against the copy and the peers."""

    def add(work, shape, times, kept, met):
        base = times["ours"].median
        names = [*EAGER, *(f"{name} compiled" for name in EAGER)]
        report(
            {
                "work": work, "shape": "x".join(map(str, shape)), "threads": threads,
                "ours ms": f"{1e3 * base:.2f}", "clone ms": f"{1e3 * times['copy'].median:.2f}",
                "of clone": f"{base / times['copy'].median:.2f}",
                **{name: f"{times[name].median / base:.1f}x" for name in names},
                **kept, "met": met,
            }
        )  # fmt: skip

    return add


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_forward(benchmark, row, bar, keep, limits, rounds, threads, peers, shape):
    x = inputs(shape)
    given = {name: x / TAU if "snn" in name else x for name in peers}
    with torch.no_grad():
        spikes, state = ours(x)
        assert 0 < spikes.mean() < 1
        for name, function in peers.items():
            s, v = function(given[name])
            assert torch.equal(s, spikes), name
            # snnTorch hands out the potential before the reset.
            assert torch.equal(v.masked_fill(s[-1] > 0, 0.0), state), name
        work = {name: lambda f=f, y=given[name]: f(y) for name, f in peers.items()}
        work |= {"ours": lambda: ours(x), "copy": lambda: clone(x), **limits.functions}
        times = interleaved(work, rounds=rounds)
        benchmark.pedantic(ours, (x,), rounds=5, warmup_rounds=1)
    # x is read and the spikes are written, once each; the state is written.
    kept = keep(times, moved=2 * x.nbytes + state.nbytes, flops=FORWARD_OPS * x.numel())
    case, base = f"{case_of(shape)}, {on_threads(threads)}", times["ours"].median
    met = (
        bar("lif_of_clone", case, base / times["copy"].median),
        bar("lif_compiled", case, times["SJ compiled"].median / base),
    )
    row("forward", shape, times, kept, ", ".join(met))


def step(function, x, grad):
    x.grad = None
    function(x)[0].backward(grad)
    return x.grad


# snnTorch keeps its potential, no leaf, on the module, where the compiler looks at it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_forward_and_backward(benchmark, row, bar, keep, limits, rounds, threads, peers, shape):
    x = inputs(shape)
    grad = torch.randn(shape)
    half, x = (x / TAU).requires_grad_(), x.requires_grad_()
    given = {name: half if "snn" in name else x for name in peers}
    wanted = step(ours, x, grad)
    through_reset = step(lambda x: F.neuron(x, tau=TAU, backend="native"), x, grad)
    for name, function in peers.items():
        got = step(function, given[name], grad)
        want = through_reset if "Norse" in name else wanted
        torch.testing.assert_close(got / TAU if "snn" in name else got, want, rtol=1e-5, atol=1e-5)
    work = {name: lambda f=f, y=given[name]: step(f, y, grad) for name, f in peers.items()}
    work |= {
        "ours": lambda: step(ours, x, grad), "copy": lambda: (clone(x.detach()), clone(grad)),
        **limits.functions,
    }  # fmt: skip
    times = interleaved(work, rounds=rounds)
    benchmark.pedantic(step, (ours, x, grad), rounds=5, warmup_rounds=1)
    # Forward: x, spikes, state. Backward: x and the gradient of the spikes, the gradient of x.
    moved = 5 * x.nbytes + x[0].nbytes
    kept = keep(times, moved=moved, flops=(FORWARD_OPS + BACKWARD_OPS) * x.numel())
    ratio = times["SJ compiled"].median / times["ours"].median
    met = bar("lif_training", f"{case_of(shape)}, {on_threads(threads)}", ratio)
    row("forward + backward", shape, times, kept, met)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_bytes_kept_for_the_backward(benchmark, report, bar, shape):
    x = inputs(shape).requires_grad_()
    functions = {"ours": ours, **EAGER, "SJ compiled": compiled(spikingjelly)}
    found = {name: kept_bytes(lambda f=f: f(x)) for name, f in functions.items()}
    benchmark.extra_info["bytes kept"] = found
    benchmark.pedantic(ours, (x,), rounds=5, warmup_rounds=1)
    share = {name: number / x.nbytes for name, number in found.items()}
    met = bar("lif_saved", case_of(shape), share["ours"])
    report(
        {
            "work": "bytes kept / bytes of x", "shape": "x".join(map(str, shape)),
            **{name: f"{value:.2f}" for name, value in share.items()}, "met": met,
        }
    )  # fmt: skip
