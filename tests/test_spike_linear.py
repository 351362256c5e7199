"""Linear maps of spikes with their neurons: against a matrix product and the neuron operation."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from cases import layouts
from hypothesis import given
from torch import nn

import atsnn.functional as F
import atsnn.nn as ann
from atsnn.cases import Numbers, ragged
from atsnn.checks import InvalidType, InvalidValue


def case(seed, lead, inputs, outputs, rate, most=1):
    """Whole-number inputs and dyadic weights, whose sums are exact."""
    numbers = Numbers(seed)
    fired = torch.from_numpy(numbers.rng.random((*lead, inputs)) < rate)
    x = (fired * numbers.integers(1, most, (*lead, inputs))).float()
    weight = numbers.integers(-8, 8, (outputs, inputs), bits=4).float()
    bias = numbers.integers(-8, 8, (outputs,), bits=4).float()
    return x, weight, bias


def plain(x, weight, bias, v=None, **settings):
    return F.neuron(nn.functional.linear(x, weight, bias), v, **settings)


NEURONS = {
    "lif": dict(tau=2.0),
    "tau": dict(tau=3.0, v_threshold=0.75),
    "soft": dict(tau=2.0, v_reset=None),
    "reset": dict(tau=4.0, v_reset=-0.25),
    "no decay": dict(tau=2.0, decay_input=False),
    "if": dict(kind="if"),
    "plif": dict(kind="plif", inv_tau=torch.tensor(0.375)),
}


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("most", [1, 3], ids=["spikes", "integers"])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3, 1.0])
def test_is_linear_and_neuron(neuron, most, rate):
    settings = NEURONS[neuron]
    for i, (inputs, outputs) in enumerate([(1, 1), (64, 64), (70, 130), (200, 63), (500, 32)]):
        x, weight, bias = case(i, (4, 2, 5), inputs, outputs, rate, most)
        v = Numbers(i).integers(-8, 8, (2, 5, outputs), bits=4).float()
        for start in (None, v):
            s, end = F.spike_linear_lif(x, weight, bias, start, return_state=True, **settings)
            want, want_end = plain(x, weight, bias, start, **settings)
            assert torch.equal(s, want) and torch.equal(end, want_end)
        if rate >= 0.3 and outputs > 60:
            assert 0 < s.mean() < 1


def test_float_inputs_are_multiplied():
    x, weight, bias = case(3, (3, 7), 90, 70, 0.3, most=40)
    assert torch.equal(F.spike_linear_lif(x / 8, weight, bias), plain(x / 8, weight, bias)[0])


@given(st.integers(0, 2**20), layouts(), st.integers(1, 150), st.integers(1, 150))
def test_bits_rows_and_dense_are_the_same(seed, layout, inputs, outputs):
    shape = (layout.T, layout.B, layout.N)
    x, weight, bias = case(seed, shape, inputs, outputs, 0.2)
    packed = F.pack_linear(weight, bias)
    rows = layout.pack(x)
    s, v = F.spike_linear_lif(rows, packed, layout=layout, return_state=True)
    want, want_v = F.neuron(nn.functional.linear(rows, weight, bias), layout=layout)
    assert torch.equal(s, want) and torch.equal(v, want_v)
    bits, v = F.spike_linear_lif(F.pack_spikes(rows), packed, layout=layout, return_state=True)
    assert torch.equal(F.unpack_spikes(bits, outputs), s) and torch.equal(v, want_v)
    if layout.T:
        got = F.spike_linear_lif(x, packed)
        assert torch.equal(got, plain(x, weight, bias)[0])


def test_real_weights_a_row_depends_on_itself_alone(threads):
    """Not on the rows beside it, nor on how many there are, nor on the threads."""
    torch.manual_seed(0)
    packed = F.pack_linear(torch.randn(300, 500), torch.randn(300))
    x = (torch.rand(3, 700, 500) < torch.linspace(0, 0.5, 700)[:, None]).float()
    together = F.spike_linear_lif(x, packed)
    for part in (slice(0, 1), slice(5, 305), slice(690, 700)):
        assert torch.equal(F.spike_linear_lif(x[:, part], packed), together[:, part])
    torch.set_num_threads(1)
    assert torch.equal(F.spike_linear_lif(x, packed), together)


def test_reference_backend_is_the_same():
    x, weight, bias = case(1, (3, 2, 5), 70, 65, 0.3)
    layout = ragged(2, 3, 2, 5)
    for arguments, settings in (
        ((x,), {}), ((F.pack_spikes(x),), {}), ((layout.pack(x),), dict(layout=layout))
    ):  # fmt: skip
        found = [
            F.spike_linear_lif(*arguments, weight, bias, return_state=True, backend=b, **settings)
            for b in ("native", "reference")
        ]
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@given(st.integers(0, 2**20), st.integers(1, 200))
def test_bits_and_back(seed, channels):
    x, _, _ = case(seed, (2, 3), channels, 1, 0.4, most=5)
    bits = F.pack_spikes(x)
    assert bits.shape == (2, 3, -(-channels // 64)) and bits.dtype == torch.int64
    assert torch.equal(F.unpack_spikes(bits, channels), (x != 0).float())
    assert torch.equal(bits, F.pack_spikes(x, backend="reference"))
    assert torch.equal(
        F.unpack_spikes(bits, channels), F.unpack_spikes(bits, channels, backend="reference")
    )


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (1, 8)])
def test_empty_inputs(shape):
    s, v = F.spike_linear_lif(torch.zeros(shape), torch.ones(5, 8), return_state=True)
    assert s.shape == (*shape[:-1], 5) and v.shape == (*shape[1:-1], 5)
    assert (v == 0).all()


def test_refusals():
    x, weight = torch.zeros(2, 3, 8), torch.zeros(5, 8)
    packed = F.pack_linear(weight)
    layout = ragged(1, 2, 1, 3)
    for message, error, call in (
        ("spikes must be one of float32, int64", InvalidType,
         lambda: F.spike_linear_lif(x.double(), weight)),
        ("shape .T, ..., 8. for 8 inputs,", InvalidValue,
         lambda: F.spike_linear_lif(x[..., :7], weight)),
        ("shape .T, ..., 1. for 8 inputs as bits", InvalidValue,
         lambda: F.spike_linear_lif(torch.zeros(2, 3, 2, dtype=torch.int64), weight)),
        ("bits past the last", ValueError,
         lambda: F.spike_linear_lif(torch.full((2, 3, 1), 256), weight)),
        ("holds its bias", InvalidValue, lambda: F.spike_linear_lif(x, packed, torch.zeros(5))),
        ("has no gradient", InvalidValue,
         lambda: F.spike_linear_lif(x, weight.clone().requires_grad_())),
        ("v must have the shape", InvalidValue,
         lambda: F.spike_linear_lif(x, packed, v=torch.zeros(3, 4))),
        ("rows of the layout", InvalidValue,
         lambda: F.spike_linear_lif(torch.zeros(99, 8), packed, layout=layout)),
        ("weight must have shape", InvalidValue, lambda: F.pack_linear(torch.zeros(3))),
        ("weight must be finite", InvalidValue,
         lambda: F.pack_linear(torch.full((2, 2), float("nan")))),
        ("1 .. 65535 inputs", InvalidValue, lambda: F.pack_linear(torch.zeros(1, 65536))),
        ("bias must have shape", InvalidValue, lambda: F.pack_linear(weight, torch.zeros(4))),
        ("T must be at most 4096", InvalidValue,
         lambda: F.spike_linear_lif(torch.zeros(4097, 1, 8), packed)),
        ("tau must be a number > 1", InvalidValue,
         lambda: F.spike_linear_lif(x, packed, tau=0.5)),
        ("bits must have shape", InvalidValue,
         lambda: F.unpack_spikes(torch.zeros(1, dtype=torch.int64), 65)),
        ("x must be one of float32", InvalidType, lambda: F.pack_spikes(x.half())),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_operator_refuses_what_would_read_out_of_bounds():
    op = torch.ops.atsnn.spike_linear_lif
    x, (weight, bias) = torch.zeros(2, 3, 8), torch.ops.atsnn.pack_linear(torch.zeros(5, 8), None)
    rest = ("lif", 2.0, None, 1.0, 0.0, True, True)
    for message, arguments in (
        ("packed weight must have shape", (x, weight, bias, None, None, None, 65)),
        ("packed bias must have shape", (x, weight, bias[:, :3], None, None, None, 5)),
        ("must have 8", (x[..., :4], weight, bias, None, None, None, 5)),
        ("both token and offsets", (x, weight, bias, None, torch.zeros(1, 3).long(), None, 5)),
        ("outputs must be at least 1", (x, weight, bias, None, None, None, 0)),
        ("v must have shape", (x, weight, bias, torch.zeros(3), None, None, 5)),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            op(*arguments, *rest)


# -- the layer ------------------------------------------------------------------------------------


def layer(**settings):
    torch.manual_seed(1)
    made = ann.SpikeLinear(20, 70, **settings)
    for p in made.linear.parameters():
        p.data.mul_(64).round_().div_(16)
    if made.bn is not None:
        made.bn.eps = 2.0**-10
        made.bn.running_var.fill_(4.0 - 2.0**-10)
        made.bn.running_mean.fill_(0.25)
        made.bn.bias.data.fill_(0.5)
    return made


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "neuron", [ann.LIF(), ann.IF(), ann.PLIF(), ann.LIF(tau=4.0, decay_input=False, v_reset=None)]
)
def test_layer_is_its_three_modules(norm, neuron):
    made = layer(norm=norm, neuron=neuron).eval()
    x = (torch.rand(5, 3, 4, 20) < 0.3).float()
    found = []
    for grad in (True, False):  # with gradients the modules run, without the kernel
        made.reset()
        with torch.set_grad_enabled(grad):
            found.append([made(x[:2]), made(x[2:]), made.neuron.v])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and theirs.grad_fn is None
    assert 0 < found[0][0].mean() < 1


def test_layer_trains_and_packs_again_after_a_change():
    made = layer().train()
    x = (torch.rand(4, 8, 20) < 0.3).float()
    made(x).sum().backward()
    assert made.linear.weight.grad is not None and made._folded._packed is None
    made.eval()
    with torch.no_grad():
        made.reset()
        before = made(x)
        first = made._folded._packed
        made.reset()
        assert torch.equal(made(x), before) and made._folded._packed is first
        made.bn.bias.add_(3.0)
        made.reset()
        assert made(x).sum() > before.sum() and made._folded._packed is not first
        made.linear.weight.data = torch.zeros_like(made.linear.weight)
        made.reset()
        assert not torch.equal(made(x), before)


def test_layer_sees_changes():
    """Of `eps`, of a BatchNorm in training, and after a change of mode those past autograd."""
    x = (torch.rand(4, 8, 20) < 0.3).float()

    def same(made):
        found = []
        for grad in (True, False):
            made.reset()
            with torch.set_grad_enabled(grad):
                found.append(made(x))
        return torch.equal(*found)

    for change in (
        lambda m: setattr(m.bn, "eps", 12.0 + 2.0**-10),
        lambda m: (m.linear.weight.data.mul_(2.0), m.eval()),
        lambda m: m.bn.train(),
    ):
        made = layer().eval()
        assert same(made)
        change(made)
        assert same(made)


def test_layer_of_modules_copies_and_pickles():
    linear, bn, lif = nn.Linear(20, 70), nn.BatchNorm1d(70), ann.LIF()
    made = ann.SpikeLinear.of(linear, bn, lif).eval()
    assert made.linear is linear and made.bn is bn and made.neuron is lif
    x = (torch.rand(4, 8, 20) < 0.3).float()
    with torch.no_grad():
        want = made(x)
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            other.reset()
            assert torch.equal(other(x), want)
    assert set(made.state_dict()) == {
        *(f"linear.{n}" for n in linear.state_dict()), *(f"bn.{n}" for n in bn.state_dict())
    }  # fmt: skip


@torch.no_grad()
def other_batch(made):
    made(torch.zeros(2, 3, 20))
    made(torch.zeros(2, 4, 20))


def test_layer_refusals():
    for message, error, call in (
        ("linear must be of Linear", InvalidType,
         lambda: ann.SpikeLinear.of(nn.Conv2d(1, 1, 1), None, ann.LIF())),
        ("70 features", InvalidValue,
         lambda: ann.SpikeLinear.of(nn.Linear(2, 70), nn.BatchNorm1d(3), ann.LIF())),
        ("step_mode='m'", InvalidValue,
         lambda: ann.SpikeLinear(2, 3, neuron=ann.LIF(step_mode="s"))),
        ("x must have shape", InvalidValue, lambda: layer()(torch.zeros(2, 3, 19))),
        ("membrane kept from the last call", InvalidValue, lambda: other_batch(layer().eval())),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
