"""Spikformers of the published repository and of SpikingJelly: in and out, bit for bit."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import judge
import pytest
import torch
from published import published, published_logits, save_old, save_plain, save_safe

import atsnn
from atsnn.checks import InvalidValue
from atsnn.convert import from_spikformer, to_spikformer
from atsnn.testing import exact_images, exact_model

SMALL = dict(image_size=16, in_channels=2, num_classes=5, embed_dim=32, depth=2, num_heads=4, T=4)


def save_as_timm(state, folder):
    """As its CheckpointSaver does, from parallel training."""
    content = {
        "epoch": 3, "arch": "spikformer", "args": argparse.Namespace(lr=5e-4, mean=[0.5]),
        "state_dict": OrderedDict((f"module.{name}", t) for name, t in state.items()),
        "state_dict_ema": {name: t * 0 for name, t in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
    torch.save(content, folder / "svit.pth.tar")
    return folder / "svit.pth.tar"


def save_ema(state, folder):
    torch.save({"model_ema": state}, folder / "ema.pt")
    return folder / "ema.pt"


SAVES = {
    "plain": save_plain, "timm": save_as_timm, "old format": save_old, "ema": save_ema,
    "safetensors": save_safe,
}  # fmt: skip


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("variant", ["cifar", "imagenet"])
def test_published_round_trip(variant, save, tmp_path):
    state = published(variant)
    path = SAVES[save](state, tmp_path)
    for source in (path, str(path)):
        model = from_spikformer(source, num_heads=4)
        judge.assert_same_state(to_spikformer(model), state)
    path.write_bytes(b"")  # nothing of the model is still in the file
    judge.assert_same_state(to_spikformer(model), state)
    assert not model.training
    c = model.config
    assert (c.stem, c.embed_dim, c.depth, c.in_channels, c.num_classes) == (variant, 32, 2, 2, 5)
    assert (c.num_heads, c.mlp_ratio, c.bias, c.pool, c.T) == (4, 4.0, True, "after_lif", 4)
    assert c.image_size == {"cifar": 32, "imagenet": 224}[variant] and not c.adaptive


@pytest.mark.parametrize(
    "variant, dim, depth, classes, heads, save",
    [("cifar", 384, 4, 10, 12, "timm"), ("imagenet", 512, 8, 1000, 8, "safetensors")],
)
def test_published_sizes(variant, dim, depth, classes, heads, save, tmp_path):
    """Heads and image size come from the published model of this size."""
    state = published(variant, dim, depth, classes, channels=3)
    model = from_spikformer(SAVES[save](state, tmp_path))
    named = atsnn.create_model(f"spikformer_{depth}_{dim}", bias=True).config
    assert model.config == named and model.config.num_heads == heads
    judge.assert_same_state(to_spikformer(model), state)


@pytest.mark.parametrize("stem, size", [("cifar", 16), ("imagenet", 32)])
def test_published_weights_give_the_published_numbers(stem, size):
    config = atsnn.SpikformerConfig(**{**SMALL, "image_size": size}, stem=stem)
    ours = exact_model(config, seed=2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if stem == "imagenet" and name.endswith(tuple(f".{n}_linear.bias" for n in "qkv")):
                parameter.zero_()
    state = to_spikformer(ours)
    images = exact_images(ours.config, 3, seed=3)
    want = published_logits(state, images, 4, 4, stem, ours.config.bn_eps)
    model = from_spikformer(state, num_heads=4, image_size=size, T=4, bn_eps=ours.config.bn_eps)
    assert model.config == ours.config
    with torch.no_grad():
        trace = model(images, return_trace=True)
    lifs = [rate for name, rate in trace.firing_rates.items() if name.endswith("lif")]
    assert min(lifs) > 0.01 and max(lifs) < 0.6
    assert torch.equal(trace.logits, want) and want.unique().numel() > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype):
    state = published("imagenet", dtype=dtype)
    model = from_spikformer(state, num_heads=4)
    assert {p.dtype for p in model.parameters()} == {dtype}
    judge.assert_same_state(to_spikformer(model), state)


def test_odd_widths_of_the_mlp_are_read():
    """``int(C * mlp_ratio)`` must give the width back in spite of rounding."""
    for hidden in range(1, 200):
        state = published("cifar", depth=1, hidden=hidden)
        model = from_spikformer(state, num_heads=1)
        assert int(32 * model.config.mlp_ratio) == hidden


def test_layer_norms_may_be_missing():
    state = {n: t for n, t in published("cifar").items() if "norm" not in n}
    assert set(to_spikformer(from_spikformer(state, num_heads=4))) > set(state)


def test_biases_go_into_the_mean_where_there_is_no_place():
    """In exact arithmetic the numbers stay."""
    config = atsnn.SpikformerConfig(**SMALL)
    ours = exact_model(config, seed=4)
    assert all(block.attn.q_linear.bias.any() for block in ours.block)
    state = to_spikformer(ours, variant="imagenet")
    assert not any(name.endswith("q_conv.bias") for name in state)
    model = from_spikformer(
        state, num_heads=4, stem="cifar", image_size=16, T=4, bn_eps=ours.config.bn_eps
    )
    assert not model.block[0].attn.q_linear.bias.any() and model.config == ours.config
    images = exact_images(ours.config, 3)
    with torch.no_grad():
        assert torch.equal(model(images), ours(images))


def test_halting_and_merging_are_switched_on_trained_and_frozen():
    """The weights are those of the checkpoint, in a model whose tokens halt."""
    ours = exact_model(atsnn.SpikformerConfig(**SMALL), seed=5)
    state = to_spikformer(ours)
    settings = dict(image_size=16, T=4, bn_eps=ours.config.bn_eps, num_heads=4)
    model = from_spikformer(state, halting="rectangle", score="linear", merge_r=1, **settings)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    images = exact_images(model.config, 2)
    with torch.no_grad():
        assert torch.equal(model.without_halting()(images), ours(images))
        trace = model(images, return_trace=True)
        assert not trace.active.all()
        torch.testing.assert_close(atsnn.freeze(model)(images), trace.logits)
    model.train()(images).sum().backward()
    assert model.halting.weight.grad is not None
    with pytest.raises(InvalidValue, match="to_spikformer: .* got halting='rectangle', merge_r=1"):
        to_spikformer(model)
    dropped = to_spikformer(model, drop_halting=True)
    judge.assert_same_state(dropped, state | {n: dropped[n] for n in dropped if "_bn" in n})


def test_what_is_returned_is_a_copy(tmp_path):
    model = atsnn.ATSpikformer(atsnn.SpikformerConfig(**SMALL))
    state = to_spikformer(model)
    save_safe(state, tmp_path)  # which takes no shared memory
    for tensor in state.values():
        tensor.zero_()
    assert all(p.any() for name, p in model.named_parameters() if "weight" in name)
    source = published("cifar")
    loaded = from_spikformer(source, num_heads=4)
    source["head.weight"].zero_()
    assert loaded.head.weight.any()
