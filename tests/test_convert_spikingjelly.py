"""SpikingJelly's Spikformer: in and out, bit for bit, and nothing that we cannot express."""

from __future__ import annotations

import copy
import subprocess
import sys

import judge
import pytest
import torch
from judge import assert_same_state
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.spikformer import (
    Spikformer,
    spikformer_cifar10,
    spikformer_s,
    spikformer_ti,
)
from torch import nn

import atsnn
from atsnn.checks import InvalidType, InvalidValue, MissingDependency
from atsnn.convert import from_spikingjelly, to_spikingjelly
from atsnn.testing import exact_images, exact_model

SMALL = dict(image_size=16, in_channels=2, num_classes=5, embed_dim=32, depth=2, num_heads=4, T=4)


def jelly(**settings):
    sizes = dict(
        T=4, in_channels=2, img_size_h=16, img_size_w=16, patch_size=4, num_classes=5,
        embed_dims=32, num_heads=4, depths=2,
    )  # fmt: skip
    return Spikformer(**{**sizes, **settings})


def randomise(model):
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor))
        else:
            tensor.fill_(int(torch.randint(1000, ())))
    return model


def lively(theirs, seed=0):
    """A model of theirs given exact weights with which every layer fires."""
    ours = exact_model(from_spikingjelly(theirs).config, seed=seed)
    judge.carry_over(ours, theirs)
    return theirs.eval(), exact_images(ours.config, 3, seed=seed)


def firing_rates(model, images):
    rates, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, neuron.LIFNode):
            hook = lambda m, i, out, name=name: rates.update({name: float(out.mean())})  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return rates


CONSTRUCTORS = {
    "cifar10": lambda: spikformer_cifar10(T=2, num_classes=7),
    "ti": lambda: spikformer_ti(T=1, in_channels=1, img_size_h=32, img_size_w=32, num_classes=3),
    "s": lambda: spikformer_s(T=1, img_size_h=32, img_size_w=32, num_classes=3),
    "its own": jelly,
    "patch 16": lambda: jelly(patch_size=16, img_size_h=64, img_size_w=64, mlp_ratio=2.5),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_spikingjelly_round_trip(name):
    theirs = randomise(CONSTRUCTORS[name]())
    ours = from_spikingjelly(theirs)
    again = to_spikingjelly(ours)
    assert_same_state(again.state_dict(), theirs.state_dict())
    assert ours.training and again.training and ours.config.T == theirs.T
    back = from_spikingjelly(again.eval())
    assert back.config == ours.config and not back.training
    assert_same_state(back.state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["cifar10", "its own", "patch 16"])
def test_forward_is_spikingjellys_bit_for_bit(name):
    theirs, images = lively(CONSTRUCTORS[name](), seed=1)
    rates = firing_rates(theirs, images)
    assert len(rates) == 5 + 5 * len(theirs.blocks)
    assert min(rates.values()) > 0.01 and max(rates.values()) < 0.6, rates
    ours = from_spikingjelly(theirs)
    with torch.no_grad():
        got, steps = ours(images), run(theirs, images)
    # Each timestep of theirs is exact; ours sums them in float64 and rounds once.
    assert torch.equal(got, steps.double().mean(0).float())
    assert got.unique().numel() > 10


def run(model, images):
    """Its logits a timestep, from rest."""
    functional.reset_net(model)
    return model(images)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_spikingjellys(training):
    theirs, images = lively(jelly(surrogate_function=surrogate.ATan(3.0)))
    theirs.train(training)
    ours = from_spikingjelly(theirs)
    weights = torch.linspace(-1, 1, 5)
    (ours(images) * weights).sum().backward()
    (run(theirs, images).mean(0) * weights).sum().backward()
    functional.reset_net(theirs)  # its membranes hold the graph
    gradients = copy.deepcopy(theirs)
    with torch.no_grad():
        for target, source in zip(gradients.parameters(), theirs.parameters(), strict=True):
            target.copy_(source.grad)
    want = from_spikingjelly(gradients)
    for (name, got), expected in zip(ours.named_parameters(), want.parameters(), strict=True):
        assert got.grad.any(), name
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(
            got.grad, expected.data, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_neuron_settings_come_along():
    theirs = jelly()
    for module in theirs.modules():
        if isinstance(module, neuron.LIFNode):
            module.tau, module.surrogate_function = 1.5, surrogate.Erf(alpha=1.25)
    for block in theirs.blocks:
        block.attn.attn_lif.v_threshold, block.attn.scale = 0.25, 0.5
    ours = from_spikingjelly(theirs)
    c = ours.config
    assert (c.tau, c.surrogate, c.alpha, c.attn_threshold) == (1.5, "erf", 1.25, 0.25)
    assert c.attn_scale == 0.5
    node = to_spikingjelly(ours).blocks[1].attn.attn_lif
    assert (node.tau, node.v_threshold, node.surrogate_function.alpha) == (1.5, 0.25, 1.25)


def test_thresholds_that_were_set_one_by_one_come_along():
    """As atsnn.firing sets them: the configuration does not know them, the modules do."""
    ours = atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL, pool="before_lif", bias=False))
    ours.block[1].attn.attn_lif.v_threshold = 0.75
    theirs = to_spikingjelly(ours)
    assert [b.attn.attn_lif.v_threshold for b in theirs.blocks] == [0.5, 0.75]
    ours.block[1].attn.k_lif.v_threshold = 0.75
    with pytest.raises(
        InvalidValue, match=r"block.1.attn.k_lif, .* the same v_threshold, .* 0.75, 1"
    ):
        to_spikingjelly(ours)


def test_halting_is_switched_on_over_spikingjellys_weights():
    theirs, images = lively(jelly())
    ours = from_spikingjelly(theirs, halting="rectangle", merge_r=1)
    with torch.no_grad():
        assert torch.equal(ours.without_halting()(images), from_spikingjelly(theirs)(images))
        assert not ours(images, return_trace=True).active.all()
    with pytest.raises(InvalidValue, match="to_spikingjelly: .* got halting='rectangle'"):
        to_spikingjelly(ours)
    again = to_spikingjelly(ours, drop_halting=True)
    assert_same_state(again.state_dict(), theirs.state_dict())


def test_our_biases_go_into_spikingjellys_mean():
    ours = exact_model(atsnn.SpikformerConfig(**SMALL, pool="before_lif"), seed=6)
    images = exact_images(ours.config, 2)
    with torch.no_grad():
        got = from_spikingjelly(to_spikingjelly(ours))(images)
        assert torch.equal(got, ours(images))


def test_dtype_is_kept():
    theirs = randomise(jelly().double())
    ours = from_spikingjelly(theirs)
    assert ours.head.weight.dtype == torch.float64
    assert_same_state(to_spikingjelly(ours).state_dict(), theirs.state_dict())


def set_at(path, **settings):
    def apply(model):
        for name, value in settings.items():
            setattr(model.get_submodule(path), name, value)

    return apply


def add_bias(model):
    model.blocks[1].mlp.fc2[0] = nn.Conv1d(128, 32, 1)


LIFS = dict(spiking_neuron=neuron.LIFNode)
UNLIKE = {
    "another neuron": (jelly(spiking_neuron=neuron.IFNode), None, "0.neuron must be a LIFNode"),
    "one other neuron": (
        jelly(), set_at("blocks.1.mlp", neuron1=neuron.IFNode(step_mode="m")),
        r"blocks.1.mlp.neuron1 must be a LIFNode, got IFNode",
    ),
    "tau not everywhere": (jelly(tau=3.0), None, r"attn.qkv_lif must have tau = 3.0, .* 2.0"),
    "thresholds": (jelly(v_threshold=0.5), None, r"stages.0.neuron must have v_threshold = 1.0"),
    "soft reset": (jelly(v_reset=None), None, "neuron must have v_reset = 0.0, .* got None"),
    "no decay": (jelly(decay_input=False), None, "must have decay_input = True, .* got False"),
    "reset in the gradient": (jelly(**LIFS), None, "must have detach_reset = True, .* got False"),
    "step by step": (
        jelly(), set_at("blocks.0.mlp.neuron2", step_mode="s"), "must have _step_mode = 'm'",
    ),
    "a surrogate": (
        jelly(surrogate_function=surrogate.LeakyKReLU()), None,
        r"neuron.surrogate_function must be one of Sigmoid, .* got LeakyKReLU",
    ),
    "two surrogates": (
        jelly(), set_at("blocks.1.attn.proj_lif", surrogate_function=surrogate.ATan()),
        "blocks.1.attn.proj_lif.surrogate_function must be a Sigmoid, got ATan",
    ),
    "no spikes": (
        jelly(surrogate_function=surrogate.Sigmoid(spiking=False)), None, "have spiking = True",
    ),
    "momentum": (
        jelly(), set_at("patch_embed.stages.1.conv_bn.block.1", momentum=0.2),
        "stages.1.conv_bn.block.1 must have momentum = 0.1, .* got 0.2",
    ),
    "eps": (jelly(), set_at("blocks.1.mlp.fc1.1", eps=1e-3), "fc1.1 must have eps = 1e-05"),
    "no statistics": (
        jelly(), set_at("blocks.1.mlp.fc1.1", track_running_stats=False), "track_running_stats = T",
    ),
    "a bias": (jelly(), add_bias, "got blocks.1.mlp.fc2.0.bias besides"),
    "a stride": (
        jelly(), set_at("patch_embed.positional_encoding.conv_bn.block.0", stride=(2, 2)), "stride",
    ),
    "another pool": (
        jelly(), set_at("patch_embed.stages.3.conv_bn.block.2", kernel_size=5), "kernel_size = 3",
    ),
    "a layer more": (
        jelly(), lambda m: m.patch_embed.stages.append(nn.Identity()), "stages.4 besides",
    ),
    "a layer less": (
        jelly(), lambda m: m.blocks[1].mlp.fc1.pop(1), "blocks.1.mlp.fc1.1 must be a BatchNorm1d",
    ),
    "no stem": (jelly(), lambda m: delattr(m, "patch_embed"), "layers that Spikformer's constr"),
    "a scale": (jelly(), set_at("blocks.1.attn", scale=0.25), "1.attn must have scale = 0.125"),
    "heads": (jelly(), set_at("blocks.1.attn", num_heads=2), "must have num_heads = 4"),
    "oblong images": (jelly(img_size_h=32), None, "square images, got 32 by 16"),
    "images that do not fit": (
        jelly(img_size_h=18, img_size_w=18), None, "image_size must be a multiple of 4",
    ),
    "no blocks": (jelly(depths=0), None, "layers that Spikformer's constructor makes"),
    "NaN": (
        jelly(), lambda m: m.head.weight.data.fill_(float("nan")), "head.weight must be finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_models_that_we_cannot_express_are_refused(name):
    model, apply, message = UNLIKE[name]
    model = copy.deepcopy(model)
    if apply is not None:
        apply(model)
    with pytest.raises(InvalidValue, match=message):
        from_spikingjelly(model)


@pytest.mark.parametrize("model", [None, nn.Linear(1, 1), {}, layer.Linear(1, 1)])
def test_other_models_are_refused(model):
    with pytest.raises(InvalidType, match="model must be SpikingJelly's Spikformer, got"):
        from_spikingjelly(model)


def test_subclasses_are_refused_unless_they_are_ours():
    class Other(neuron.LIFNode):
        pass

    theirs = jelly(spiking_neuron=Other, tau=2.0, detach_reset=True)
    for block in theirs.blocks:
        block.attn.attn_lif.v_threshold = 0.5
    with pytest.raises(InvalidValue, match="must be a LIFNode, got Other"):
        from_spikingjelly(theirs)
    Other.__module__ = "atsnn.somewhere"
    assert from_spikingjelly(theirs).config.attn_threshold == 0.5


def test_an_accelerated_model_is_read_as_what_it_was():
    theirs = randomise(jelly()).eval()
    want = from_spikingjelly(theirs)
    atsnn.accelerate(theirs)
    assert type(theirs.patch_embed.stages[0].neuron) is not neuron.LIFNode
    got = from_spikingjelly(theirs)
    assert got.config == want.config
    assert_same_state(got.state_dict(), want.state_dict())


def test_counts_of_batches_that_differ_are_refused():
    ours = atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL, pool="before_lif", bias=False))
    ours.block[0].attn.k_bn.num_batches_tracked += 1
    with pytest.raises(
        InvalidValue, match="the same batches, .* got num_batches_tracked of 0, 1, 0"
    ):
        to_spikingjelly(ours)


def test_pooling_of_spikes_is_refused():
    ours = atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL))
    with pytest.raises(InvalidValue, match="expected pool='before_lif', .* got pool='after_lif'"):
        to_spikingjelly(ours)


def test_without_spikingjelly_the_extra_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"needs spikingjelly, .* 'atsnn\[peers\]'"):
        from_spikingjelly(jelly())
    ours = atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL, pool="before_lif"))
    with pytest.raises(MissingDependency, match="to_spikingjelly needs spikingjelly"):
        to_spikingjelly(ours)


def test_importing_atsnn_imports_no_spikingjelly():
    script = (
        "import sys, atsnn; assert not any(name.startswith('spikingjelly') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
