"""With the sequential accumulator the engine's stem runs around the tokens that go on alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from test_engine import assert_same, traced

import atsnn
from atsnn.testing import exact_images, exact_model

BASE = atsnn.SpikformerConfig(
    image_size=32, in_channels=2, num_classes=5, embed_dim=32, depth=2, num_heads=2, T=4,
    halting="sequential",
)  # fmt: skip
STEMS = {
    "spikes pooled": dict(pool="after_lif"),
    "potentials pooled": dict(pool="before_lif"),
    "imagenet": dict(stem="imagenet", image_size=64),
    "pixels": dict(task="pixels"),
}


def conv_reads(wanted):
    """Which pixels a convolution reads for those wanted ``[M, H, W]``."""
    return nnf.max_pool2d(wanted.float().unsqueeze(1), 3, 1, 1)[:, 0] > 0


def pooling_reads(wanted):
    """Which pixels of a map twice as large a pooling of 3x3 with stride 2 reads."""
    spread = nnf.conv_transpose2d(
        wanted.float().unsqueeze(1), torch.ones(1, 1, 3, 3), stride=2, padding=1, output_padding=1
    )
    return spread[:, 0] > 0


def wanted_pixels(model, active):
    """Of the convolutions' sums and of the neurons, by layer: ``[T * B, side, side]``."""
    c, stem = model.config, model.patch_embed
    after = active.reshape(-1, c.grid, c.grid)
    sums, neurons = {"rpe": after}, {"rpe": after}
    for name in reversed(stem.names):
        after = conv_reads(after)  # of the layer that follows
        behind = after
        if name in stem.pooled:
            after = pooling_reads(after)
        sums[name] = after
        neurons[name] = after if stem.pool_spikes else behind
    return sums, neurons


def noted(model, images):
    """The stem's inputs and spikes, by name: ``[T, B, C, H, W]``."""
    found = {}
    with torch.no_grad():
        model.embed(images, lambda name, x, layout: found.update({name: x}))
    return found


@pytest.mark.parametrize("video", [False, True], ids=["still", "video"])
@pytest.mark.parametrize("name", STEMS)
def test_what_is_computed_is_what_the_tokens_that_go_on_look_at(name, video):
    model = exact_model(BASE.replace(**STEMS[name]), 3)
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 3, 5, T=4 if video else None)
    want, got = traced(model, images), engine.trace(images)
    whole = engine.trace(images, execution="masked")
    assert_same(got, whole)
    # Means over three timesteps are rounded, so that an order of additions shows in the last bit.
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.scores, want.scores) and torch.equal(got.active, want.active)
    active = want.active[0]  # [T, B, N]
    assert (active.any(2) & ~active.all(2)).any(), "some tokens must have halted, and some not"
    sums, neurons = wanted_pixels(model, active)
    maps = noted(model, images)
    T, B, _ = active.shape
    for layer in sums:
        pixels, spikes = sums[layer], neurons[layer]
        shown = maps[f"patch_embed.{layer}.input"]
        if layer == "proj" and not video:  # summed up once, for all timesteps
            pixels = torch.ones(B, *shown.shape[-2:], dtype=torch.bool)
            spikes = torch.ones(T * B, *spikes.shape[-2:], dtype=torch.bool)
        assert got.stem_pixels[layer] == int(pixels.sum()), layer
        read = shown.flatten(0, 1) * pixels.unsqueeze(1)
        rate = float(read.double().sum()) / (int(pixels.sum()) * shown.shape[2])
        assert got.firing_rates[f"patch_embed.{layer}.input"] == pytest.approx(rate, rel=1e-5)
        fired = maps[f"patch_embed.{layer}_lif"].flatten(0, 1) * spikes.unsqueeze(1)
        rate = float(fired.double().sum()) / (int(spikes.sum()) * fired.shape[1])
        assert got.firing_rates[f"patch_embed.{layer}_lif"] == pytest.approx(rate, rel=1e-5)
    assert whole.stem_pixels["proj3"] == T * B * shown_pixels(maps, "proj3")
    assert got.stem_pixels["proj3"] < whole.stem_pixels["proj3"]
    assert got.cost.flops.stem < whole.cost.flops.stem
    assert got.cost.sops.stem < whole.cost.sops.stem


def shown_pixels(maps, layer):
    return maps[f"patch_embed.{layer}.input"][0, 0, 0].numel()


@pytest.mark.parametrize("name", STEMS)
def test_a_stream_leaves_out_what_one_call_leaves_out(name):
    model = exact_model(BASE.replace(**STEMS[name]), 3)
    engine = atsnn.freeze(model)
    video = exact_images(model.config, 2, 5, T=4)
    want, state = engine.trace(video), atsnn.EngineState()
    computed = {}
    for frame in video:
        part = engine.trace(frame[None], state=state)
        for layer, pixels in part.stem_pixels.items():
            computed[layer] = computed.get(layer, 0) + pixels
    assert computed == want.stem_pixels
    assert torch.equal(part.logits, want.logits)


def test_when_nothing_goes_on_nothing_is_computed():
    """A budget so small that all tokens halt at the first timestep."""
    model = exact_model(BASE, 1)
    with torch.no_grad():
        model.halting.beta.fill_(30.0)
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 2, 3)
    got = engine.trace(images)
    assert_same(got, traced(model, images))
    assert not got.active[:, 1:].any()
    assert got.stem_pixels["proj3"] == 2 * shown_pixels(noted(model, images), "proj3")


def test_other_accumulators_need_all_of_it():
    """They run all timesteps of a block at once, before it is known which tokens go on."""
    model = exact_model(BASE.replace(halting="rectangle"), 3)
    images = exact_images(model.config, 2, 5)
    got = atsnn.freeze(model).trace(images)
    assert not got.active.all()
    maps = noted(model, images)
    for layer, pixels in got.stem_pixels.items():
        frames = 2 if layer == "proj" else 2 * 4
        assert pixels == frames * shown_pixels(maps, layer)
    assert got.cost.flops.stem == atsnn.cost(model, images).flops.stem
