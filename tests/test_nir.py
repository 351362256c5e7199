"""NIR: what goes out comes back, SpikingJelly writes the same, and the rest is refused."""

from __future__ import annotations

import itertools

import nir
import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer, neuron, nir_exchange
from torch import nn

import atsnn
from atsnn.checks import InvalidType, InvalidValue, MissingDependency
from atsnn.nir import from_nir, to_nir
from atsnn.nn import IF, LIF, PLIF, SpikeLinear

NEURONS = {
    "lif": dict(tau=2.0),
    "slow lif": dict(tau=7.3, v_threshold=0.6, v_reset=-0.25),
    "lif without decay": dict(tau=1.1, decay_input=False),
    "thirds": dict(tau=4 / 3, v_threshold=1 / 3, v_reset=0.1),
}


def settings(module):
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def network(**lif):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), LIF(**lif), nn.Sequential(nn.Linear(5, 4, bias=False), IF(v_reset=0.25))
    )


@pytest.mark.parametrize("dt", [1e-4, 2.0**-10, 1e-3])
@pytest.mark.parametrize("name", NEURONS)
def test_round_trip(name, dt, tmp_path):
    model = network(**NEURONS[name])
    graph = to_nir(model, dt=dt)
    nir.write(tmp_path / "model.nir", graph)
    for source in (graph, nir.read(tmp_path / "model.nir")):
        back = from_nir(source, dt=dt)
        layers = [model[0], model[1], model[2][0], model[2][1]]
        assert [type(m) for m in back] == [type(m) for m in layers]
        for got, want in zip(back, layers, strict=True):
            assert settings(got) == settings(want)
            for a, b in zip(got.parameters(), want.parameters(), strict=True):
                assert torch.equal(a, b)
        x = 16 * torch.randn(8, 3, 6)  # so that even the slow ones fire
        with torch.no_grad():
            want = model(x)
            assert torch.equal(back(x), want) and 0 < want.mean() < 1
        model[1].reset(), model[2][1].reset()
        again = to_nir(back, dt=dt)
        for node, other in zip(again.nodes.values(), graph.nodes.values(), strict=True):
            assert type(node) is type(other)
            for key in ("weight", "bias", "tau", "r", "v_leak", "v_threshold", "v_reset"):
                if hasattr(node, key):
                    assert np.array_equal(getattr(node, key), getattr(other, key)), key


THEIRS = {
    "lif": (LIF(tau=2.0), neuron.LIFNode(tau=2.0, step_mode="m")),
    "slow lif": (
        LIF(tau=7.3, v_threshold=0.6, v_reset=-0.25),
        neuron.LIFNode(tau=7.3, v_threshold=0.6, v_reset=-0.25, step_mode="m"),
    ),
    "no decay": (
        LIF(tau=3.0, decay_input=False), neuron.LIFNode(tau=3.0, decay_input=False, step_mode="m"),
    ),
    "if": (IF(v_threshold=0.5), neuron.IFNode(v_threshold=0.5, step_mode="m")),
    "plif": (PLIF(init_tau=3.0), neuron.ParametricLIFNode(init_tau=3.0, step_mode="m")),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_spikingjelly_writes_and_reads_the_same(name):
    ours, theirs = THEIRS[name]
    linear = nn.Linear(6, 5)
    their_linear = layer.Linear(6, 5, step_mode="m")
    their_linear.load_state_dict(linear.state_dict())
    model, other = nn.Sequential(linear, ours), nn.Sequential(their_linear, theirs)
    graph = to_nir(model)
    want = nir_exchange.export_to_nir(other, torch.zeros(2, 1, 6))
    for node, wanted in zip(graph.nodes.values(), want.nodes.values(), strict=True):
        assert type(node) is type(wanted)
        for key in ("weight", "bias", "tau", "r", "v_leak", "v_threshold", "v_reset"):
            if hasattr(wanted, key):
                assert np.array_equal(getattr(node, key), getattr(wanted, key)), key
    x = 8 * torch.randn(5, 3, 6)
    read = nir_exchange.import_from_nir(graph, step_mode="m")
    want_spikes = read(x)[0]
    assert 0 < want_spikes.mean() < 1
    if name != "plif":  # which is a LIF after either
        assert torch.equal(model(x), want_spikes)
    ours.reset()
    assert torch.equal(from_nir(want)(x), want_spikes)


def test_spike_linear_is_what_it_computes_in_inference():
    torch.manual_seed(1)
    first, second = SpikeLinear(6, 5, neuron=LIF(tau=1.5)), SpikeLinear(5, 4, norm=False)
    model = nn.Sequential(first, second)
    with torch.no_grad():
        for p in (first.bn.running_mean, first.bn.running_var, first.bn.weight, first.bn.bias):
            p.copy_(torch.rand(5) + 0.5)
        for m in (first.linear, second.linear):
            m.weight.mul_(4)
    model.eval()
    graph = to_nir(model)
    assert [type(n).__name__ for n in graph.nodes.values()] == [
        "Input", "Affine", "LIF", "Affine", "LIF", "Output",
    ]  # fmt: skip
    spikes = (torch.rand(6, 16, 6) < 0.5).float()
    with torch.no_grad():
        want = model(spikes)
        assert 0.02 < want.mean() < 0.9
        torch.testing.assert_close(from_nir(graph)(spikes), want)
    model.train()
    with pytest.raises(InvalidValue, match=r"module.0.bn must be in evaluation mode"):
        to_nir(model)


def test_neurons_alone_need_their_number():
    graph = to_nir(LIF(tau=3.0), features=7)
    assert graph.nodes["lif"].tau.shape == (7,)
    assert from_nir(graph, surrogate="atan", alpha=3.0, detach_reset=True)[0].alpha == 3.0
    with pytest.raises(InvalidValue, match="features must be given for neurons alone"):
        to_nir(LIF())
    with pytest.raises(InvalidValue, match="features must be a number >= 1"):
        to_nir(IF(), features=0)


def test_a_graph_in_float32_is_read():
    graph = to_nir(network(tau=7.3))
    node = graph.nodes["lif"]
    for key in ("tau", "r", "v_leak", "v_threshold", "v_reset"):
        setattr(node, key, getattr(node, key).astype(np.float32))
    assert from_nir(graph)[1].tau == 7.3


def test_float64_is_kept():
    model = network().double()
    assert torch.equal(from_nir(to_nir(model))[0].weight, model[0].weight)


class Transformer(nn.Module):
    pass


@pytest.mark.parametrize(
    "module, error, message",
    [
        (
            LIF(v_reset=None),
            InvalidValue,
            "module must reset to a value, .* soft reset, v_reset=None",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
            InvalidValue,
            "must not be a BatchNorm",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), InvalidValue, r"module.1 must be .* got ReLU"),
        (nn.Conv2d(1, 1, 1), InvalidValue, "must be LIF, IF, .* got Conv2d"),
        (atsnn.nn.SpikingSelfAttention(8, 2), InvalidValue, "no nodes for attention, halting"),
        (Transformer(), InvalidValue, "got Transformer"),
        (nn.Sequential(), InvalidValue, "a layer or a neuron, got none"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)),
            InvalidValue,
            "take the 3 features before",
        ),
        (None, InvalidType, "module must be an nn.Module, got NoneType"),
    ],
)
def test_what_nir_cannot_express_is_refused(module, error, message):
    with pytest.raises(error, match=f"to_nir: .*{message}"):
        to_nir(module, features=2)


def test_bad_timesteps_are_refused():
    for dt in (0, -1.0, float("nan"), "1"):
        with pytest.raises((InvalidValue, InvalidType), match="dt must be a number"):
            to_nir(nn.Linear(1, 1), dt=dt)
        with pytest.raises((InvalidValue, InvalidType), match="dt must be a number"):
            from_nir(None, dt=dt)


def lif(**changes):
    values = dict(tau=2e-4, r=1.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0) | changes
    return nir.LIF(**{key: np.full(3, value) for key, value in values.items()})


def affine(weight=None, bias=None):
    return nir.Affine(
        weight=np.ones((3, 3), np.float32) if weight is None else weight,
        bias=np.zeros(3, np.float32) if bias is None else bias,
    )


def uneven():
    node = lif()
    node.v_threshold = np.array([1.0, 1.0, 2.0])
    return node


def graph_of(*nodes, edges=None, drop=()):
    ends = nir.Input(input_type=np.array([3])), nir.Output(output_type=np.array([3]))
    named = {str(n): node for n, node in enumerate((ends[0], *nodes, ends[1])) if n not in drop}
    names = list(named)
    joined = list(itertools.pairwise(names)) if edges is None else edges
    return nir.NIRGraph(nodes=named, edges=joined, type_check=False)


FOREIGN = {
    "another kind": (graph_of(nir.LI(*(np.ones(3),) * 3)), "must be one of Affine, .* got LI$"),
    "a filter": (
        graph_of(nir.CubaLIF(*(np.ones(3),) * 6)), "node '1' must be one of .* got CubaLIF",
    ),
    "uneven thresholds": (graph_of(uneven()), "v_threshold of node '1' must be one finite number"),
    "NaN": (graph_of(lif(v_threshold=np.nan)), "must be one finite number"),
    "fast": (graph_of(lif(tau=1e-4)), r"tau of node '1' must be above dt = 0.0001, got 0.0001"),
    "resistance": (graph_of(lif(r=1.5)), "r of node '1' must be 1, or tau / dt = 2.0"),
    "leak": (graph_of(lif(v_leak=0.5)), "v_leak of node '1' must be its v_reset = 0.0"),
    "IF of another timestep": (
        graph_of(nir.IF(r=np.ones(3), v_threshold=np.ones(3))), "must be 1 / dt = 10000.0, got 1.0",
    ),
    "recurrence": (
        graph_of(lif(), edges=[("0", "1"), ("1", "1"), ("1", "2")]), "one chain .* after node '0'",
    ),
    "a branch": (
        graph_of(lif(), lif(), edges=[("0", "1"), ("0", "2"), ("1", "3"), ("2", "3")]), "one chain",
    ),
    "a cycle": (
        graph_of(lif(), lif(), edges=[("0", "1"), ("1", "2"), ("2", "1")]), "one chain",
    ),
    "no edges": (graph_of(lif(), edges=[]), "one chain .* after node '0'"),
    "an island": (graph_of(lif(), lif(), edges=[("0", "1"), ("1", "3")]), "one chain"),
    "no output": (graph_of(lif(), drop=(2,)), "one chain"),
    "no input": (graph_of(lif(), drop=(0,)), "must have one input, got 0"),
    "an edge to nowhere": (graph_of(lif(), edges=[("0", "9")]), "edges must join nodes, got '0'"),
    "weights of three dimensions": (
        graph_of(affine(np.ones((2, 3, 3), np.float32))), r"must have weight \(outputs, inputs\)",
    ),
    "another bias": (graph_of(affine(bias=np.zeros(2, np.float32))), r"got \(3, 3\) and \(2,\)"),
    "NaN weights": (
        graph_of(affine(np.full((3, 3), np.nan, np.float32))), "node '1' must be finite",
    ),
    "integers": (graph_of(affine(np.ones((3, 3), np.int64))), "must hold float32 .* got int64"),
    "two dtypes": (graph_of(affine(bias=np.zeros(3))), "of one dtype, got float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_graphs_are_refused(name):
    graph, message = FOREIGN[name]
    with pytest.raises((InvalidValue, InvalidType), match=f"^from_nir: .*{message}"):
        from_nir(graph)


def test_other_objects_are_refused():
    with pytest.raises(InvalidType, match="graph must be a nir.NIRGraph, got str"):
        from_nir("model.nir")


def test_without_nir_the_extra_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: to_nir(nn.Linear(1, 1)), lambda: from_nir(None)):
        with pytest.raises(MissingDependency, match=r"needs nir, .* 'atsnn\[nir\]'"):
            call()
