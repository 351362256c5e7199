"""Other people's counters against ours: PyTorch's FLOPs, SpikingJelly's synaptic operations."""

from __future__ import annotations

import doctest
from contextlib import nullcontext
from functools import cache, partial

import judge
import pytest
import torch
from cases import SMALL, operator_arguments
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.model.spikformer import spikformer_cifar10
from spikingjelly.activation_based.op_counter import (
    ACCounter,
    DispatchCounterMode,
    MACCounter,
    SynOpCounter,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import atsnn
from atsnn import counting
from atsnn.convert import from_spikingjelly
from atsnn.counting import Decomposing, ac_rules, flop_rules, mac_rules, synop_rules
from atsnn.reference import attention_order
from atsnn.testing import exact_images, exact_model

ATSNN, aten = torch.ops.atsnn, torch.ops.aten
# 16 tokens of 8 channels a head: attention in the order q (k^T v), until enough have halted.
SETTINGS = dict(in_channels=2, num_classes=5, embed_dim=32, depth=3, num_heads=4, T=3)
DENSE = {
    "kv first": dict(image_size=16),
    "qk first": dict(image_size=8),
    "imagenet": dict(image_size=32, stem="imagenet", mlp_ratio=2.5, bias=False),
    "pooled potentials": dict(image_size=16, pool="before_lif"),
    "spike-driven": dict(image_size=16, attention="sdsa"),
}
HALTED = {
    "rectangle": dict(image_size=16, halting="rectangle"),
    "depth": dict(image_size=16, halting="depth"),
    "sequential": dict(image_size=16, halting="sequential"),
    "spike-driven, halted": dict(image_size=16, halting="rectangle", attention="sdsa"),
    "merging": dict(image_size=16, halting="rectangle", merge_r=2),
}
RULES = {SynOpCounter: synop_rules, MACCounter: mac_rules, ACCounter: ac_rules}


@cache
def build(name):
    return exact_model(atsnn.SpikformerConfig(**SETTINGS, **{**DENSE, **HALTED}[name]))


def flops(run, rules=None, grad=False):
    with (
        nullcontext() if grad else torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=rules) as found,
    ):
        run()
    return found


def count(kind, run, rules=True, inference=False, apart=False, norms=True):
    """What a counter of SpikingJelly says of a call.

    ``apart``: with composite operations taken apart; ``norms``: with those of BatchNorm.
    """
    counter = kind(extra_rules=RULES[kind]() if rules else None)
    with (
        torch.inference_mode() if inference else torch.no_grad(),
        DispatchCounterMode([counter]),
        Decomposing() if apart else nullcontext(),
    ):
        run()
    skipped = 0 if norms else counter.records["Global"][aten.native_batch_norm.default]
    return counter.get_total() - skipped


def parts_of(found):
    """FLOPs of a counter by the parts of ``atsnn.cost``."""
    counts = {name: sum(v.values()) for name, v in found.get_flop_counts().items()}
    parts = {
        "stem": counts["ATSpikformer.patch_embed"],
        "mlp": sum(v for name, v in counts.items() if name.endswith(".mlp")),
        "head": counts["ATSpikformer.head"],
    }
    # The attention's modules are not called as such, so the counter has no name for them.
    return parts | {"attention": counts["Global"] - sum(parts.values())}


def parts_of_cost(found):
    return {part: found[part] for part in ("stem", "attention", "mlp", "head")}


# -- FLOPs ----------------------------------------------------------------------------------------


def readout_flops(model, batch):
    """The mean over the tokens, which the reference takes as a product with weights of one."""
    c = model.config
    return 2 * c.T * batch * c.grid**2 * c.embed_dim


@pytest.mark.parametrize("name", DENSE)
def test_dense_flops_are_those_of_flop_counter(name):
    model = build(name)
    images = exact_images(model.config, 2)
    want = atsnn.cost(model, images).flops
    got = flops(lambda: model(images), flop_rules())
    assert parts_of(got) == parts_of_cost(want)
    assert got.get_total_flops() == want.total == sum(parts_of_cost(want).values())


@pytest.mark.parametrize("name", ["kv first", "qk first", "imagenet"])
def test_dense_flops_are_those_of_pytorchs_own_operators(name):
    model = build(name)
    images = exact_images(model.config, 2)
    want = atsnn.cost(model, images).flops.total
    with atsnn.use_backend("reference"):
        found = flops(lambda: model(images)).get_total_flops()
    assert found == want + readout_flops(model, 2)
    # Without our rules the operator of the attention is opaque.
    assert flops(lambda: model(images)).get_total_flops() < want


def test_dense_flops_of_a_named_model_and_of_video():
    named, small = atsnn.create_model("spikformer_4_384").eval(), build("kv first")
    for model, images in (
        (named, torch.rand(1, 3, 32, 32)),
        (small, exact_images(small.config, 2, T=3)),
    ):
        want = atsnn.cost(model, images).flops.total
        found = flops(partial(model, images), flop_rules())
        assert found.get_total_flops() == want


@pytest.mark.parametrize("name", HALTED)
def test_flops_of_halted_models_by_part(name):
    model = build(name)
    images = exact_images(model.config, 3)
    cost = atsnn.cost(model, images)
    want = cost.flops
    assert want.mlp < cost.dense.flops.mlp and want.halting > 0
    got = flops(lambda: model(images), flop_rules())
    assert parts_of(got) == parts_of_cost(want)
    # What halting and merging add are no layers; the counter says nothing of them.
    assert got.get_total_flops() == want.total - want.halting - want.merging


def test_both_orders_occur_where_tokens_halt():
    model = build("rectangle")
    with torch.no_grad():
        trace = model(exact_images(model.config, 3), return_trace=True)
    orders = {attention_order(n, 8) for n in trace.active.sum(-1).flatten().tolist() if n}
    assert orders == {"q_kv", "qk_v"}


@pytest.mark.parametrize("layout", [SMALL, None], ids=["packed", "dense"])
@pytest.mark.parametrize("name", ["spiking_attention", "spike_driven_attention"])
def test_backward_counts_twice_the_forward(name, layout):
    one, two = (
        flops(
            partial(getattr(ATSNN, operator), **operator_arguments(operator, layout)), flop_rules()
        ).get_total_flops()
        for operator in (name, f"{name}_backward")
    )
    assert two == 2 * one > 0


def test_training_step_counts_what_pytorch_counts():
    model = build("kv first")
    images = exact_images(model.config, 2)

    def step():
        model(images).sum().backward()

    got = flops(step, flop_rules(), grad=True).get_total_flops()
    with atsnn.use_backend("reference"):
        want = flops(step, grad=True).get_total_flops()
    assert got == want - 2 * readout_flops(model, 2)  # forward, and the gradient of the tokens
    model.zero_grad()


# -- synaptic operations --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in (*DENSE, *HALTED) if n != "merging"])
def test_sops_are_those_of_spikingjellys_counter(name):
    model = build(name)
    images = exact_images(model.config, 3)
    cost = atsnn.cost(model, images)
    got = count(SynOpCounter, lambda: model(images))
    # Sequential halting attends once a timestep, with the rates of that one instead of all.
    assert got == pytest.approx(cost.sops.total, rel=0.01 if name == "sequential" else 1e-6)
    macs = count(MACCounter, lambda: model(images), norms=False)
    first = 3 * model.config.image_size**2 * 9 * 2 * 4
    assert macs == first + 3 * 32 * 5  # the first convolution and the head


def test_merged_rows_are_averages_and_no_counts():
    model = build("merging")
    images = exact_images(model.config, 3)
    plain = model.without_halting()
    macs = [count(MACCounter, partial(m, images)) for m in (model, plain)]
    assert macs[0] > macs[1]
    assert 0 < count(SynOpCounter, lambda: model(images)) < atsnn.cost(model, images).sops.total


@pytest.mark.parametrize("name", ["kv first", "qk first"])
def test_sops_on_pytorchs_own_operators(name):
    model = build(name)
    images = exact_images(model.config, 3)
    want = count(SynOpCounter, lambda: model(images))
    with atsnn.use_backend("reference"):
        found = count(SynOpCounter, lambda: model(images))
    assert found == want + readout_flops(model, 3) // 2


def test_spikingjellys_spikformer_costs_what_ours_does():
    theirs = spikformer_cifar10(T=2)
    ours = exact_model(from_spikingjelly(theirs).config)
    judge.carry_over(ours, theirs.eval())
    images = exact_images(ours.config, 1)
    cost = atsnn.cost(ours, images)

    def run():
        functional.reset_net(theirs)
        theirs(images)

    found = count(SynOpCounter, run)
    assert found == pytest.approx(cost.sops.total, rel=1e-6)
    # It convolves the still image, and reads out, at each of both timesteps.
    again = 2 * 32 * 32 * 9 * 3 * 48 + cost.flops.head
    assert flops(run).get_total_flops() == cost.flops.total + again
    assert count(SynOpCounter, run, inference=True) == found
    assert count(SynOpCounter, run, rules=False, inference=True) == 0
    # Accelerated modules leave the work to those they replace while something counts.
    assert atsnn.accelerate(theirs).replaced
    assert count(SynOpCounter, run) == found


# -- where SpikingJelly's tool alone is wrong -----------------------------------------------------


def integers(*shape, most=3):
    torch.manual_seed(0)
    return torch.randint(0, most + 1, shape).float()


CALLS = {
    "linear": (nn.Linear(6, 5), (4, 6), 5),
    "linear of one row": (nn.Linear(6, 5), (6,), 5),
    "linear without bias": (nn.Linear(6, 5, bias=False), (2, 4, 6), 5),
    "conv1d": (nn.Conv1d(6, 5, 1), (2, 6, 4), 5),
    "conv2d": (nn.Conv2d(4, 6, 2, 2, groups=2), (3, 4, 8, 8), 3),
    "conv2d same": (nn.Conv2d(4, 6, 1, padding="same"), (3, 4, 8, 8), 6),
    "conv3d": (nn.Conv3d(2, 3, 1), (1, 2, 3, 3, 3), 3),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, 2), (3, 4, 5, 5), 4 * 6),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("inference", [False, True])
def test_an_integer_is_as_many_spikes(name, inference):
    layer, shape, fanout = CALLS[name]
    x = integers(*shape)
    macs = x.numel() * fanout
    run = partial(layer, x)
    assert count(SynOpCounter, run, inference=inference) == int(x.sum()) * fanout
    assert count(ACCounter, run, inference=inference) == int(x.sum()) * fanout
    assert count(MACCounter, run, inference=inference) == 0
    assert count(MACCounter, partial(layer, x - 0.5), inference=inference) == macs
    assert count(SynOpCounter, partial(layer, x - 1), inference=inference) == 0


def test_spikingjelly_alone_takes_integers_for_dense_and_counts_nothing_in_inference_mode():
    layer, x = nn.Linear(6, 5), integers(4, 6)
    assert count(SynOpCounter, partial(layer, x), rules=False) == 0
    assert count(MACCounter, partial(layer, x), rules=False) == 4 * 6 * 5
    spikes = integers(4, 6, most=1)
    for run in (partial(layer, spikes), partial(nn.Conv1d(4, 5, 1), spikes.expand(2, 4, 6))):
        for kind in (SynOpCounter, ACCounter):
            assert count(kind, run, rules=False) > 0
            assert count(kind, run, rules=False, inference=True) == 0
            assert count(kind, run, inference=True) == count(kind, run) > 0
    # Why: the composite operation arrives whole, and no rule knows it.
    counter = SynOpCounter()
    with torch.inference_mode(), DispatchCounterMode([counter]) as mode:
        layer(spikes)
    assert list(mode.get_unsupported(counter)) == ["aten.linear.default"]
    with torch.no_grad(), DispatchCounterMode([counter]) as mode:
        layer(spikes)
    assert "aten.addmm.default" not in mode.get_unsupported(counter)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("rules", [False, True], ids=["alone", "with rules"])
def test_decomposing_counts_in_inference_mode_what_is_counted_elsewhere(kind, rules):
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(2)).eval()
    x = integers(3, 2, 8, 8, most=1)

    def run():
        torch.einsum("nchw,cd->nd", layers(x), x[0, 0, :4, :4])
        x.flatten(2) @ x.flatten(2).mT

    want = count(kind, run, rules)
    assert want > 0
    assert count(kind, run, rules, inference=True, apart=True) == want
    assert count(kind, run, rules, apart=True) == want


@pytest.mark.parametrize("name", ["kv first", "rectangle", "spike-driven, halted"])
def test_models_in_inference_mode(name):
    model = build(name)
    run = partial(model, exact_images(model.config, 2))
    want = count(SynOpCounter, run)
    assert count(SynOpCounter, run, inference=True) == want
    assert count(SynOpCounter, run, inference=True, apart=True) == want
    assert count(SynOpCounter, run, rules=False, inference=True) == 0
    macs = count(MACCounter, run)
    assert count(MACCounter, run, inference=True, apart=True) == macs
    # Alone it misses the layers on the residual stream, and takes them for dense.
    assert count(SynOpCounter, run, rules=False) < want
    assert count(MACCounter, run, rules=False) > macs


# -- the convention -------------------------------------------------------------------------------


def test_where_spikes_meet_spikes_the_fewer_drive():
    few, many = torch.zeros(4, 6), torch.ones(6, 5)
    few[0, :2] = 1
    for run in (lambda: few @ many, lambda: many.T @ few.T):
        assert count(SynOpCounter, run) == 2 * 5
    assert count(SynOpCounter, lambda: few @ torch.rand(6, 5)) == 2 * 5
    assert count(SynOpCounter, lambda: torch.rand(3, 4) @ few) == 2 * 3
    assert count(SynOpCounter, lambda: (3 * few) @ many) == 30 * 4  # spikes before counts


def test_a_convolution_counts_the_taps_on_its_padding_as_flops_do():
    layer, x = nn.Conv2d(1, 2, 3, padding=1), torch.ones(1, 1, 4, 4)
    assert count(SynOpCounter, partial(layer, x)) == 16 * 9 * 2
    assert flops(partial(layer, x)).get_total_flops() == 2 * 16 * 9 * 2
    assert count(SynOpCounter, partial(layer, x), rules=False) == 10 * 10 * 2


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, 0.5])
def test_what_is_no_count_is_multiplied(value):
    x = torch.tensor([[1.0, 2.0, value]])
    run = partial(nn.Linear(3, 5), x)
    assert count(SynOpCounter, run) == 0 and count(MACCounter, run) == 15


def test_integer_and_empty_tensors():
    assert count(SynOpCounter, lambda: torch.tensor([[1, 2]]) @ torch.tensor([[3], [-4]])) == 3
    empty = partial(nn.Linear(3, 5), torch.zeros(0, 3))
    assert count(SynOpCounter, empty) == count(MACCounter, empty) == 0
    complex_ = lambda: torch.ones(2, 2) * 1j @ torch.full((2, 2), 1j)  # noqa: E731
    assert count(MACCounter, complex_) == 8


# -- operators of bits ----------------------------------------------------------------------------


WINDOW = (3, 3, 2, 1, 1, 1)


def bits_of(x, maps=False):
    return ATSNN.pack_maps(x)[0] if maps else ATSNN.pack_spikes(x)


LIF = ("lif", 2.0, None, 1.0, 0.0, True)


def on_bits(name):
    """A call of an operator on bits, and one that does the same on floats."""
    x = integers(2, 3, 5, 70, most=1)
    maps = integers(6, 70, 8, 9, most=1)
    torch.manual_seed(1)
    dense, conv = nn.Linear(70, 11), nn.Conv2d(70, 11, WINDOW[:2], WINDOW[2:4], WINDOW[4:])
    flat = conv.weight.detach().movedim(1, -1).flatten(1)
    packed = ATSNN.pack_linear(dense.weight.detach(), dense.bias.detach())
    window = ATSNN.pack_linear(flat, conv.bias.detach())
    q, k, v = x, x.roll(1, -1), (x * x.roll(2, -1))
    heads = partial(ATSNN.spiking_attention, q, k, v, None, None, None, 7, 0.125)
    driven = partial(ATSNN.spike_driven_attention, q, k, v, *[None] * 4, 0.5, 2.0, "sigmoid", 4.0)
    attend = partial(ATSNN.attend_lif, *map(bits_of, (q, k, v)), None, 70, 7)
    calls = {
        "spike_linear": (
            partial(ATSNN.spike_linear, bits_of(x), *packed, 11), partial(dense, x)
        ),
        "spike_linear of counts": (
            partial(ATSNN.spike_linear, 2 * x, *packed, 11), partial(dense, 2 * x)
        ),
        "spike_linear_lif": (
            partial(ATSNN.spike_linear_lif, bits_of(x), *packed, *[None] * 3, 11, *LIF, True),
            partial(dense, x),
        ),
        "spike_conv": (
            partial(ATSNN.spike_conv, bits_of(maps, True), *window, 11, WINDOW),
            partial(conv, maps),
        ),
        "spike_conv of counts": (
            partial(ATSNN.spike_conv, ATSNN.count_maps(3 * maps), *window, 11, WINDOW),
            partial(conv, 3 * maps),
        ),
        "spike_conv_lif": (
            partial(
                ATSNN.spike_conv_lif, bits_of(maps, True).unflatten(0, (2, 3)), *window, None, 11,
                WINDOW, True, 0, *LIF,
            ),
            partial(conv, maps),
        ),
        "spike_conv_lif of floats": (
            partial(
                ATSNN.spike_conv_lif, maps.unflatten(0, (1, 6)) / 2, *window, None, 11,
                WINDOW, False, 2, *LIF,
            ),
            partial(conv, maps / 2),
        ),
        "attend_lif": (partial(attend, 0.125, *LIF), heads),
        "attend_lif, spike-driven": (partial(attend, None, *LIF), driven),
    }  # fmt: skip
    return calls[name]


BITS = [
    "spike_linear", "spike_linear of counts", "spike_linear_lif", "spike_conv",
    "spike_conv of counts", "spike_conv_lif", "spike_conv_lif of floats", "attend_lif",
    "attend_lif, spike-driven",
]  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_operators_of_bits_count_as_those_of_floats(name):
    bits, floats = on_bits(name)
    found = flops(bits, flop_rules()).get_total_flops()
    assert found == flops(floats, flop_rules()).get_total_flops() > 0
    synops, macs = (count(kind, bits) for kind in (SynOpCounter, MACCounter))
    assert synops == count(SynOpCounter, floats) and macs == count(MACCounter, floats)
    assert (synops > 0) != (macs > 0)


def test_packed_linear_counts_the_rows_that_exist():
    arguments = operator_arguments("spike_linear_lif", SMALL)
    spikes, inputs = arguments["spikes"], arguments["weight"].shape[1]
    padded = arguments | {"spikes": torch.cat([spikes, torch.ones(3, *spikes.shape[1:])])}
    for given in (arguments, padded):
        run = partial(counting.flop_rules()[ATSNN.spike_linear_lif], **given)
        assert run() == 2 * SMALL.num_rows * inputs * arguments["outputs"]


def test_triton_operators_have_the_same_rules():
    names = {"spiking_attention", "spike_driven_attention", "spike_linear_lif"}
    assert {getattr(torch.ops.atsnn_triton, name) for name in names} <= flop_rules().keys()
    for rules in (synop_rules(), mac_rules(), ac_rules()):
        assert {getattr(torch.ops.atsnn_triton, name).default for name in names} <= rules.keys()


def test_examples():
    found = doctest.testmod(counting)
    assert found.attempted > 15 and not found.failed
