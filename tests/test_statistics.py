"""BatchNorm statistics in training: measured as inference sees them, or kept."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_train import CONFIG, MODEL, no_poison, same  # noqa: F401

import atsnn
from atsnn import data
from atsnn.checks import InvalidValue
from atsnn.nn.model import batch_norms
from atsnn.train import train
from atsnn.train.loop import splits_of
from atsnn.train.state import STATE
from atsnn.train.statistics import measure_statistics


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_statistics_are_those_of_the_weights_that_are_saved(tmp_path, ema):
    """What the first convolution puts out with them, over the first epoch's batches."""
    config = dataclasses.replace(CONFIG, epochs=1, ema=ema, shift=0)
    result, _ = train(config, tmp_path)
    images, size = splits_of(config)[0], config.batch_size
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    used = images[order[: len(images) // size * size]].images
    bn = result.patch_embed.proj_bn
    with torch.no_grad():
        out = result.patch_embed.proj_conv(used).double()
    torch.testing.assert_close(bn.running_mean.double(), out.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert int(bn.num_batches_tracked) == len(images) // size and bn.momentum == 0.1
    state = torch.load(tmp_path / STATE, weights_only=True)["model"]
    kept = torch.allclose(bn.running_mean, state["patch_embed.proj_bn.running_mean"], rtol=0.02)
    assert kept == (ema == 0)


@pytest.mark.parametrize("halting", [None, "rectangle", "depth"])
def test_statistics_are_those_of_inputs_that_inference_sees(halting):
    """Of every BatchNorm, with all before it as in inference; the batch's own would be others."""
    torch.manual_seed(0)
    model = atsnn.ATSpikformer(MODEL.replace(halting=halting, embed_dim=64))
    batches = data.load("digits", 8)["train"][:256].images.split(64)
    measure_statistics(model, batches)
    means, hooks = {}, []
    for norm in batch_norms(model):
        norm.eval()
        means[norm] = []
        hooks.append(
            norm.register_forward_pre_hook(
                lambda norm, x: means[norm].append(
                    x[0].double().mean([d for d in range(x[0].dim()) if d != 1])
                )
            )
        )
    with torch.no_grad():
        for images in batches:
            model(images)
    assert all(len(found) == len(batches) for found in means.values())
    for norm, found in means.items():
        torch.testing.assert_close(
            norm.running_mean.double(), torch.stack(found).mean(0), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("spoiled", [0.0, 1e6])
def test_no_odd_batch_is_left_in_measured_statistics(spoiled):
    torch.manual_seed(0)
    model = atsnn.ATSpikformer(MODEL)
    other = copy.deepcopy(model)
    for norm in batch_norms(other):
        norm.running_mean.fill_(spoiled)
        norm.running_var.fill_(spoiled)
    batches = data.load("digits", 8)["train"][:96].images.split(32)
    for one in (model, other):
        measure_statistics(one, batches)
    same(model, other)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("halting", ["sequential", "rectangle"])
def test_statistics_that_no_batch_updates_are_kept(halting):
    """Of a sequential accumulator's blocks, and of a block in which no token is active."""
    torch.manual_seed(0)
    model = atsnn.ATSpikformer(MODEL.replace(halting=halting))
    model.halting.beta.data.fill_(20.0)  # everything halts after the first block
    for norm in batch_norms(model):
        norm.running_mean.fill_(0.25)
    measure_statistics(model, [data.load("digits", 8)["train"][:32].images])
    changed = {
        name.rpartition(".")[0]
        for name, value in model.named_buffers()
        if name.endswith("running_mean") and not bool((value == 0.25).all())
    }
    assert "patch_embed.proj_bn" in changed
    blocks = {name.split(".")[1] for name in changed if name.startswith("block.")}
    assert blocks == (set() if halting == "sequential" else {"0"})


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("halting", [None, "rectangle", "sequential"])
def test_frozen_norms_keep_the_statistics_of_the_checkpoint(tmp_path, halting, ema):
    train(dataclasses.replace(CONFIG, model=MODEL.replace(halting=None)), tmp_path / "plain")
    begun = atsnn.from_pretrained(tmp_path / "plain")
    config = dataclasses.replace(
        CONFIG, model=MODEL.replace(halting=halting), init=str(tmp_path / "plain"), ema=ema,
        freeze_norms=True,
    )  # fmt: skip
    model, _ = train(config, tmp_path / "frozen")
    for before, after in zip(batch_norms(begun), batch_norms(model), strict=True):
        assert before.running_mean.equal(after.running_mean)
        assert before.running_var.equal(after.running_var)
    learned = [
        not before.weight.equal(after.weight)
        for before, after in zip(batch_norms(begun), batch_norms(model), strict=True)
    ]
    assert all(learned)
    with pytest.raises(InvalidValue, match="freeze_norms expected init"):
        dataclasses.replace(CONFIG, freeze_norms=True)
