"""Where halting happens: counted by hand on a model whose halting is known."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.axes import Axes

import atsnn
from atsnn import cli, data
from atsnn.bench.subject import with_changes
from atsnn.checks import InvalidValue
from atsnn.insight import Insight, draw_classes, insight, insight_sheets, to_dict


@pytest.fixture(scope="module")
def split():
    return data.load("digits", 32)["test"][:50]


@pytest.fixture(scope="module")
def found(split):
    return insight(atsnn.from_pretrained("digits"), split, batch_size=16)


def test_it_sees_what_the_model_does(found, split):
    model = atsnn.from_pretrained("digits")
    with torch.no_grad():
        trace = model(split.images, return_trace=True)
        sure, without = model.without_halting()(split.images).softmax(1).max(1)
    assert torch.equal(found.predicted, trace.logits.argmax(1))
    assert torch.equal(found.without, without) and torch.allclose(found.confidence, sure)
    torch.testing.assert_close(found.cells, trace.active.float().mean((0, 1, 3)))
    torch.testing.assert_close(found.blocks, trace.depth.float().mean(0))
    corner = split.images[:, 0, :4, :4].amax((1, 2)) > 0.15
    assert torch.equal(found.ink[:, 0], corner)


def test_where_objects_are_is_what_the_data_set_says():
    scenes = data.load("cluttered-digits", 64)["test"][:6]
    model = atsnn.ATSpikformer(
        atsnn.SpikformerConfig(
            image_size=64, in_channels=1, embed_dim=16, num_heads=2, depth=1, T=1
        )
    )
    found = insight(model, scenes)
    objects = scenes.maps.view(6, 16, 4, 16, 4).amax((2, 4)).flatten(1) > 0
    assert torch.equal(found.ink, objects), "clutter is bright too"
    assert "background: no object's pixel." in insight_sheets(found)[2].note
    named = data.Split(scenes.pixels, scenes.labels, scenes.maps, tuple("abcdefghij"))
    assert insight(model, named[:2]).names[0] == "a"


def test_a_merged_token_ran_as_far_as_its_holder(split):
    merging = with_changes(atsnn.from_pretrained("digits"), merge_r=8)
    with torch.no_grad():
        trace = merging(split.images, return_trace=True)
    away = trace.source != torch.arange(64)
    assert away.any()
    blocks = insight(merging, split).blocks
    assert (blocks[away] > trace.active.sum(0).float().mean(0)[away]).any()
    assert (blocks >= 1).all(), "every token runs the first block"


def test_groups_by_hand():
    one = Insight(
        classes=torch.tensor([0, 0, 1, 1]),
        labels=torch.tensor([0, 0, 1, 1]), predicted=torch.tensor([0, 1, 1, 1]),
        without=torch.tensor([0, 0, 0, 1]), confidence=torch.tensor([0.9, 0.6, 0.5, 0.8]),
        cells=torch.tensor([0.2, 0.4, 0.6, 0.8]),
        blocks=torch.tensor([[1.0, 2.0], [1.0, 3.0], [2.0, 2.0], [4.0, 4.0]]),
        ink=torch.tensor([[True, False], [True, False], [True, True], [False, False]]),
        depth=4, names=("left", "right"),
    )  # fmt: skip
    numbers = to_dict(one)
    assert one.lost == 0.25 and one.won == 0.25
    zero, other = numbers["classes"]
    assert zero["cells"] == pytest.approx(0.3) and zero["accuracy"] == 0.5
    assert zero["accuracy_without"] == 1.0 and other["accuracy_without"] == 0.5
    assert [group["confidence"] for group in numbers["confidence"]] == pytest.approx(
        [0.5, 0.6, 0.8, 0.9]
    )
    assert [group["cells"] for group in numbers["confidence"]] == pytest.approx(
        [0.6, 0.4, 0.8, 0.2]
    )
    assert numbers["blocks_on_ink"] == 1.5 and numbers["blocks_on_background"] == pytest.approx(
        3.25
    )
    by_class, by_confidence, by_ink = insight_sheets(one)
    assert by_class.rows[0] == ["left", "2", "30.0 %", "50.00 %", "100.00 %"]
    assert "25.00 % of the images from right to wrong" in by_confidence.note
    assert by_ink.rows[1] == ["background", "50.0 %", "3.25"]
    assert "background: no pixel brighter than 0.15." in by_ink.note


def test_the_picture_shows_the_blocks_of_the_very_images(found, split, tmp_path, monkeypatch):
    shown, scales = [], set()
    draw = Axes.imshow

    def imshow(self, x, **k):
        shown.append(x)
        scales.add((k["cmap"], k.get("vmin"), k.get("vmax")))
        return draw(self, x, **k)

    monkeypatch.setattr(Axes, "imshow", imshow)
    draw_classes(found, split, tmp_path / "classes.png")
    # The colours of blocks end at those there are, not at the most that ran.
    assert {scale[1:] for scale in scales if scale[0] == "viridis"} == {(0, 4)}
    classes = found.classes.unique()
    assert len(shown) == 6 * len(classes)
    for k, drawn in zip(classes, zip(*[iter(shown)] * 6, strict=True), strict=True):
        chosen = (found.classes == k).nonzero().squeeze(1)
        cells = found.cells[chosen]
        for at, index in ((2, chosen[cells.argmax()]), (4, chosen[cells.argmin()])):
            assert (drawn[at] == split.images[index].mean(0).numpy()).all()
            assert (drawn[at + 1] == found.blocks[index].view(8, 8).numpy()).all()


def test_the_picture_and_the_command(found, split, tmp_path, capsys):
    path = draw_classes(found, split, tmp_path / "deep" / "classes.png")
    assert path.stat().st_size > 20_000
    options = ["eval", "--limit", "30", "--detail", "--json", str(tmp_path / "e.json")]
    assert cli.main([*options, "--plot", str(tmp_path / "b.png")]) == 0
    out = capsys.readouterr().out
    assert "By class" in out and "halting off" in out and "blocks run" in out
    detail = json.loads((tmp_path / "e.json").read_text())["detail"]
    assert sum(group["images"] for group in detail["classes"]) == 30
    assert cli.main([*options, "--plot", str(tmp_path / "b.gif")]) == 2


def test_splits_without_what_is_asked_for_are_refused(split):
    pixels = atsnn.SpikformerConfig(image_size=32, in_channels=1, embed_dim=16, num_heads=2,
                                    depth=1, T=1, task="pixels")  # fmt: skip
    with pytest.raises(InvalidValue, match="data set with the class of every pixel"):
        insight(atsnn.ATSpikformer(pixels), split)
    with pytest.raises(InvalidValue, match="at least one image"):
        insight(atsnn.from_pretrained("digits"), split[:0])
