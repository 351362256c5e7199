"""Models that classify every pixel: the readout of tokens, halted and merged ones too."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_engine import assert_same

import atsnn
from atsnn import cli, data, reference
from atsnn.checks import InvalidValue
from atsnn.cost import cost
from atsnn.data.scenes import SCENES, compose
from atsnn.insight import insight, insight_sheets, to_dict
from atsnn.testing import exact_images, exact_model
from atsnn.train import TrainConfig, evaluate, train

BASE = atsnn.SpikformerConfig(
    image_size=32, in_channels=1, num_classes=11, embed_dim=32, depth=3, num_heads=2, T=3,
    halting="rectangle", task="pixels",
)  # fmt: skip
VARIANTS = {
    "plain": dict(halting=None),
    "rectangle": dict(),
    "depth": dict(halting="depth"),
    "sequential": dict(halting="sequential"),
    "merging": dict(halting=None, merge_r=6),
    "halting and merging": dict(merge_r=6),
    "last": dict(readout="last", merge_r=6),
}


@pytest.fixture(scope="module", autouse=True)
def small_scenes():
    """The data set, with few scenes: composing all of them takes half a minute."""
    kept = data.DATASETS["scenes-digits"]
    few = dataclasses.replace(SCENES, train=96, test=40)
    data.DATASETS["scenes-digits"] = dataclasses.replace(kept, recipe=few)
    yield
    data.DATASETS["scenes-digits"] = kept


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_and_masked_give_the_same_maps(name):
    model = exact_model(BASE.replace(**VARIANTS[name]), seed=1)
    images = exact_images(model.config, 3)
    found = {}
    for execution in ("packed", "masked"):
        model.execution = execution
        with torch.no_grad():
            found[execution] = model(images, return_trace=True)
    logits = found["packed"].logits
    assert logits.shape == (3, 11, 32, 32) and logits.std() > 0
    assert torch.equal(logits, found["masked"].logits)
    assert torch.equal(found["packed"].active, found["masked"].active)


@pytest.mark.parametrize("T", [None, 4], ids=["still", "video"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_gives_the_same_maps(name, T):
    model = exact_model(BASE.replace(**VARIANTS[name]), seed=1)
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 3, T=T)
    with torch.no_grad():
        want = model(images, return_trace=True)
    for execution in ("packed", "masked"):
        assert_same(engine.trace(images, execution=execution), want, execution)
    assert torch.equal(engine(images), want.logits)
    assert torch.equal(torch.cat([engine(images[..., b : b + 1, :, :, :]) for b in range(3)]),
                       want.logits)  # fmt: skip
    if T and not model.config.merging:
        state = atsnn.EngineState()
        for frame in images:
            logits = engine(frame[None], state=state)
        assert torch.equal(logits, want.logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_mean_over_tokens_is_the_readout_of_the_image(name):
    """The head is linear: of the mean it makes the mean of what it makes of each token."""
    changes = VARIANTS[name]
    pixels = exact_model(BASE.replace(**changes), seed=2)
    classes = exact_model(BASE.replace(**changes, task="classes"), seed=2)
    weights = pixels.state_dict()
    heads = [key for key in weights if key.startswith("head.")]
    weights |= {key: classes.state_dict()[key] for key in heads}
    classes.load_state_dict(weights)
    # One class a pixel of a patch: the same for all of them.
    for key in heads:
        given = classes.state_dict()[key]
        pixels.state_dict()[key].copy_(given.repeat_interleave(16, 0))
    images = exact_images(pixels.config, 2)
    with torch.no_grad():
        maps, logits = pixels(images), classes(images)
    torch.testing.assert_close(maps.mean((2, 3)), logits, rtol=1e-5, atol=1e-5)


def test_a_token_that_was_merged_away_takes_what_its_holder_has():
    model = exact_model(BASE.replace(halting=None, merge_r=8), seed=3)
    images = exact_images(model.config, 2)
    with torch.no_grad():
        trace = model(images, return_trace=True)
    patches = torch.nn.functional.pixel_unshuffle(trace.logits, 4).flatten(2)  # [B, K, N]
    source = trace.source[:, None].expand(patches.shape)
    assert (trace.source != torch.arange(64)).sum() == 2 * 16
    # Nothing halts, so all that is read is the last block's.
    assert torch.equal(patches, patches.gather(2, source))
    assert len(patches[0].T.unique(dim=0)) > 20, "the others keep their own"


def test_readout_of_tokens_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [0.0, 0.0]]]])  # T=2, B=1, N=2
    w = torch.tensor([[[0.5, 1.0]], [[1.0, 0.0]]])
    own = torch.tensor([[0, 1]])
    assert reference.readout_tokens(x, w, own).tolist() == [[[5.5, 7.0], [3.0, 4.0]]]
    held = torch.tensor([[0, 0]])
    assert reference.readout_tokens(x, w, held).tolist() == [[[5.5, 7.0], [5.5, 7.0]]]


def test_gradients_are_those_of_the_masked_form():
    model = atsnn.ATSpikformer(BASE.replace(merge_r=6)).double().train()
    images = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    grads = {}
    for execution in ("packed", "masked"):
        torch.manual_seed(0)
        model.execution = execution
        model.zero_grad()
        trace = model(images, return_trace=True)
        torch.nn.functional.cross_entropy(trace.logits, trace.logits.argmax(1)).backward()
        grads[execution] = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
    assert grads["packed"].keys() == grads["masked"].keys()
    for name, grad in grads["packed"].items():
        torch.testing.assert_close(grad, grads["masked"][name], rtol=1e-9, atol=1e-12, msg=name)


def test_evaluation_counts_pixels_by_hand():
    model = exact_model(BASE)
    split = data.load("scenes-digits", 32)["test"][:7]
    with torch.no_grad():
        guess = model(split.images).argmax(1)
    found = evaluate(model, split, batch_size=3)
    assert found.accuracy == pytest.approx(float((guess == split.maps).double().mean()))
    ious = [
        ((guess == k) & (split.maps == k)).sum() / ((guess == k) | (split.maps == k)).sum()
        for k in range(11)
        if ((guess == k) | (split.maps == k)).any()
    ]
    assert found.mean_iou == pytest.approx(float(torch.stack(ious).mean()))
    with pytest.raises(InvalidValue, match="a data set with the class of every pixel"):
        evaluate(model, data.load("digits", 32)["test"])


def test_it_learns_scenes(tmp_path, capsys):
    options = ["--data", "scenes-digits", "--task", "pixels", "--image-size", "32", "--embed-dim",
               "16", "--heads", "2", "--depth", "2", "--timesteps", "2", "--epochs", "2",
               "--batch-size", "16", "--lr", "0.01", "--target", "0.75"]  # fmt: skip
    out = str(tmp_path / "run")
    assert cli.main(["train", *options, "--out", out]) == 0
    assert "mean IoU" in capsys.readouterr().out
    history = json.loads((tmp_path / "run" / "training.json").read_text())["history"]
    assert history[1]["loss"] < history[0]["loss"] and 0 < history[1]["test_mean_iou"] < 1
    wide = ["--checkpoint", out, "--data", "scenes-digits"]
    assert cli.main(["eval", *wide]) == 0 and "mean IoU" in capsys.readouterr().out
    assert cli.main(["show", *wide, "--count", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 10_000
    card = (tmp_path / "run" / "README.md").read_text()
    assert "image-segmentation" in card and "--task pixels" in card and "freeze" in card


def test_what_classifies_images_alone_says_so(tmp_path):
    model = exact_model(BASE)
    with pytest.raises(InvalidValue, match="execution='padded' gives the class of an image"):
        model.execution = "padded"
    with pytest.raises(InvalidValue, match="expected a model of an image's class"):
        atsnn.convert.to_spikformer(model, drop_halting=True)
    config = TrainConfig(BASE.replace(num_classes=10), data="scenes-digits")
    with pytest.raises(InvalidValue, match="has 11 classes, got a model with num_classes = 10"):
        train(config, tmp_path / "run")
    with pytest.raises(InvalidValue, match="a data set with the class of every pixel"):
        train(TrainConfig(BASE, data="digits"), tmp_path / "run")


def test_the_head_runs_for_every_token():
    images = exact_images(BASE, 2)
    pixels = cost(exact_model(BASE), images).flops.head
    assert pixels == 2 * 2 * 64 * 32 * 11 * 16
    assert cost(exact_model(BASE.replace(task="classes")), images).flops.head == 2 * 2 * 32 * 11


def test_scenes_are_composed_once_for_runs_that_follow_each_other(monkeypatch):
    calls = []
    monkeypatch.setattr("atsnn.data.compose", lambda *a: calls.append(a) or compose(*a))
    first, second = (data.load("scenes-digits", 40) for _ in range(2))
    assert len(calls) == 1 and first["train"] is second["train"]


def test_insight_goes_pixel_by_pixel():
    scenes = data.load("scenes-digits", 32)["test"][:6]
    model = exact_model(BASE, seed=1).eval()
    found = insight(model, scenes, batch_size=4)
    with torch.no_grad():
        predicted = model(scenes.images).argmax(1)
        sure, without = model.without_halting()(scenes.images).softmax(1).max(1)
    assert torch.equal(found.predicted, predicted) and torch.equal(found.without, without)
    assert torch.equal(found.labels, scenes.maps) and torch.equal(found.classes, scenes.labels)
    assert (sure.amax((1, 2)) > sure.mean((1, 2)) + 0.01).all(), "pixels differ"
    torch.testing.assert_close(found.confidence, sure.mean((1, 2)))
    tiles = scenes.maps.view(6, 8, 4, 8, 4).amax((2, 4)).flatten(1) > 0
    assert torch.equal(found.ink, tiles)
    lost = (without == scenes.maps) & (predicted != scenes.maps)
    assert lost.any(), "halting changes something"
    assert found.lost == pytest.approx(float(lost.float().mean()))
    group = to_dict(found)["classes"][0]
    chosen = scenes.labels == group["class"]
    right = (predicted == scenes.maps)[chosen].float().mean()
    assert group["images"] == int(chosen.sum()) and group["accuracy"] == pytest.approx(float(right))
    assert "of the pixels from right" in insight_sheets(found)[1].note
    assert "background: no object's pixel." in insight_sheets(found)[2].note
