"""Triton's linear map with neurons, and spikes as bits, under the interpreter."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from cases import layouts
from hypothesis import given
from interpreter import FEW, RUNS, guard  # noqa: F401
from test_spike_linear import NEURONS, case, plain
from torch import nn

import atsnn.functional as F
from atsnn.cases import ragged

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("most", [1, 3], ids=["spikes", "integers"])
def test_is_linear_and_neuron(neuron, most):
    settings = NEURONS[neuron]
    for i, (inputs, outputs) in enumerate([(1, 1), (70, 130)]):
        x, weight, bias = case(i, (4, 2, 5), inputs, outputs, 0.3, most)
        v = torch.randint(-8, 8, (2, 5, outputs)) / 16.0
        for start in (None, v):
            s, end = F.spike_linear_lif(
                x, weight, bias, start, return_state=True, backend="triton", **settings
            )
            want, want_end = plain(x, weight, bias, start, **settings)
            assert torch.equal(s, want) and torch.equal(end, want_end)


@FEW
@given(st.integers(0, 2**20), layouts(), st.integers(1, 150), st.integers(1, 150))
def test_bits_rows_and_dense_are_the_same(seed, layout, inputs, outputs):
    shape = (layout.T, layout.B, layout.N)
    x, weight, bias = case(seed, shape, inputs, outputs, 0.2)
    packed = F.pack_linear(weight, bias)
    rows = layout.pack(x)
    settings = dict(layout=layout, return_state=True)
    want, want_v = F.neuron(nn.functional.linear(rows, weight, bias), layout=layout)
    s, v = F.spike_linear_lif(rows, packed, backend="triton", **settings)
    assert torch.equal(s, want) and torch.equal(v, want_v)
    bits = F.pack_spikes(rows, backend="triton")
    assert torch.equal(bits, F.pack_spikes(rows))
    bits, v = F.spike_linear_lif(bits, packed, backend="triton", **settings)
    assert torch.equal(bits, F.pack_spikes(want)) and torch.equal(v, want_v)
    assert torch.equal(F.unpack_spikes(bits, outputs, backend="triton"), want)
    if layout.T:
        got = F.spike_linear_lif(x, packed, backend="triton")
        assert torch.equal(got, plain(x, weight, bias)[0])


def test_more_ranks_and_inputs_than_a_block():
    layout = ragged(3, 2, 1, 150)
    x, weight, bias = case(1, (2, 1, 150), 200, 65, 0.1)
    rows = layout.pack(x)
    for given_x in (rows, F.pack_spikes(rows)):
        found = F.spike_linear_lif(given_x, weight, bias, layout=layout, backend="triton")
        assert torch.equal(
            found, F.spike_linear_lif(given_x, weight, bias, layout=layout, backend="native")
        )


def test_bits_that_are_no_input_are_not_seen():
    weight = torch.ones(5, 8)
    bits = torch.full((2, 3, 1), -256)  # every bit but those of the eight inputs
    assert not F.spike_linear_lif(bits, weight, backend="triton").any()


def test_strides():
    x, weight, bias = case(2, (3, 4, 5), 70, 66, 0.3)
    v = torch.randint(-8, 8, (4, 66, 5)).transpose(1, 2) / 16.0
    want = F.spike_linear_lif(x, weight, bias, v, return_state=True)
    for other in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([x, -x], -1)[..., 0]):
        found = F.spike_linear_lif(other, weight, bias, v, return_state=True, backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (1, 8)])
def test_empty_inputs(shape):
    s, v = F.spike_linear_lif(
        torch.zeros(shape), torch.ones(5, 8), return_state=True, backend="triton"
    )
    assert s.shape == (*shape[:-1], 5) and v.shape == (*shape[1:-1], 5)
    assert (v == 0).all()
