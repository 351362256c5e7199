"""Sweeps: every point is measured once, a cut one goes on, and the table says what was measured."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

import atsnn
from atsnn import cli, data
from atsnn.bench.subject import with_changes
from atsnn.checks import InvalidValue
from atsnn.cost import cost
from atsnn.schedule import directed, policy_scores, undirected
from atsnn.sweep import Point, checkpoint_grid, sweep, table, training_grid
from atsnn.sweep.command import _separated
from atsnn.sweep.measure import counted, timed
from atsnn.sweep.output import draw, plots_of, summaries
from atsnn.testing import exact_model
from atsnn.train import TrainConfig, evaluate
from atsnn.train.settings import parse, value_of, with_settings

MODEL = atsnn.SpikformerConfig(
    image_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, T=2, halting="rectangle"
)
CONFIG = TrainConfig(MODEL, epochs=1, batch_size=32, limit=128, shift=1)


@pytest.fixture(autouse=True)
def no_poison(poisoned_memory):
    """Training is long enough without filling every buffer first."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_a_grid_is_every_combination():
    points = training_grid(CONFIG, {"target": [0.5, 0.75], "halting": ["depth"], "seed": [0, 1]})
    assert [(p.label, p.seed) for p in points] == [
        ("target=0.5 halting=depth", 0), ("target=0.5 halting=depth", 1),
        ("target=0.75 halting=depth", 0), ("target=0.75 halting=depth", 1),
    ]  # fmt: skip
    assert points[2].config == with_settings(
        CONFIG, {"target": 0.75, "halting": "depth", "seed": 0}
    )
    assert points[2].config.model.halting == "depth" and len({p.key for p in points}) == 4
    with pytest.raises(InvalidValue, match="expected settings among .*; got speed"):
        training_grid(CONFIG, {"speed": [1]})
    with pytest.raises(InvalidValue, match="a checkpoint can be run .* target, eps, .*; got depth"):
        checkpoint_grid({"eps": [0.1], "depth": [3]})
    with pytest.raises(InvalidValue, match="at least one setting to vary"):
        training_grid(CONFIG, {})


def test_settings_are_written_as_json_or_words():
    values = [value_of(text) for text in ("0.5", "3", "none", "null", "true", "depth", "[1,2]")]
    assert values == [0.5, 3, None, None, True, "depth", [1, 2]]
    assert _separated("a,b") == ["a", "b"] and _separated("[1,2],3") == ["[1,2]", "3"]
    assert _separated("static:2,1;static:1,1") == ["static:2,1", "static:1,1"]
    assert _separated("static:2,1") == ["static:2,1"]
    assert parse("x", "--vary", ["a=1=2", "b="]) == {"a": "1=2", "b": ""}
    for texts in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(InvalidValue, match="--vary must be name=value, each name once"):
            parse("x", "--vary", texts)


def test_a_sweep_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    points = training_grid(CONFIG, {"seed": [0, 1, 2]})
    trained = []

    class Cut(Exception):
        pass

    def counting(config, folder, **options):
        if len(trained) == 2:
            raise Cut
        trained.append(config.seed)
        return real(config, folder, **options)

    from atsnn.sweep import run

    real = run.train
    monkeypatch.setattr(run, "train", counting)
    with pytest.raises(Cut):
        sweep(points, tmp_path, batches=())
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    monkeypatch.setattr(run, "train", lambda c, f, **o: trained.append(c.seed) or real(c, f, **o))
    result = sweep(points, tmp_path, batches=(1,), rounds=1)
    assert trained == [0, 1, 2], "none twice"
    assert [row["seed"] for row in result["rows"]] == [0, 1, 2]
    for row, point in zip(result["rows"], points, strict=True):
        model = atsnn.from_pretrained(tmp_path / point.key)
        found = evaluate(model, data.load("digits", 8)["test"])
        assert row["accuracy"] == found.accuracy and row["cells"] == found.cells
        assert row["latency_ms"]["1"] > 0 and row["split"] == "test"
    again = sweep(points, tmp_path, batches=(), rounds=1)
    assert again["rows"] == result["rows"] and trained == [0, 1, 2]


def test_held_out_images_or_the_test_images(tmp_path):
    points = training_grid(CONFIG, {"validation": [60]})
    splits = data.load("digits", 8)
    held = sweep(points, tmp_path, batches=())["rows"][0]
    assert held["split"] == "validation" and held["images"] == 60
    test = sweep(points, tmp_path, batches=(), test=True)["rows"][0]
    assert test["split"] == "test" and test["images"] == len(splits["test"])
    model = atsnn.from_pretrained(tmp_path / points[0].key)
    assert held["accuracy"] == evaluate(model, splits["train"].held_out(60)[1]).accuracy
    assert test["accuracy"] == evaluate(model, splits["test"]).accuracy


def test_what_is_counted_and_timed():
    model = atsnn.from_pretrained("digits")
    split = data.load("digits", 32)["test"][:20]
    row = counted(model, split)
    found = atsnn.freeze(model).trace(split.images).cost
    whole = atsnn.freeze(model.without_halting()).trace(split.images).cost
    assert row["flops"] == pytest.approx(found.flops.total / 20)
    assert row["flops_share"] == pytest.approx(found.flops.total / whole.flops.total)
    assert row["sops_share"] == pytest.approx(found.sops.total / whole.sops.total)
    assert row["energy_uj"] == pytest.approx(found.energy_pj.total / 20 / 1e6)
    assert row["energy_share"] < 1 and row["images"] == 20
    rule = directed(atsnn.from_pretrained("digits"), "static:4,2,1,1")
    latency = timed({"own": model, "rule": rule}, split.images, (1, 8), rounds=1)
    assert latency.keys() == {"own", "rule"}
    assert all(set(row) == {"1", "8"} and min(row.values()) > 0 for row in latency.values())


def test_what_is_counted_is_what_the_engine_computes():
    """Of a sequential model the stem around the tokens that go on, which modules cannot leave out.

    Exact weights: the engine and the modules run the same cells.
    """
    config = atsnn.SpikformerConfig(
        image_size=32, in_channels=1, num_classes=11, embed_dim=16, num_heads=2, depth=2, T=4,
        halting="sequential", task="pixels",
    )  # fmt: skip
    model = exact_model(config, 3)
    images = (torch.rand(6, 1, 32, 32) * 255).to(torch.uint8)
    maps = torch.zeros(6, 32, 32, dtype=torch.int64)
    row = counted(model, data.Split(images, torch.zeros(6, dtype=torch.int64), maps))
    images = images / 255.0
    engine, modules = atsnn.freeze(model).trace(images), cost(model, images)
    assert row["flops"] == engine.cost.flops.total / 6 < modules.flops.total / 6
    assert row["flops_share"] == engine.cost.flops.total / modules.dense.flops.total
    assert engine.cost.flops.attention == pytest.approx(modules.flops.attention, rel=0.01)


def test_what_the_engine_does_not_take_is_not_timed_beside_it():
    ours = atsnn.from_pretrained("digits")
    at_random = with_changes(atsnn.from_pretrained("digits"), merge_r=4, merge_match="random")
    images = data.load("digits", 32)["test"][:4].images
    latency = timed({"ours": ours, "random": at_random}, images, (2,), rounds=1)
    assert latency["ours"]["2"] > 0 and latency["random"] == {}
    alone = timed({"random": at_random}, images, (2,), rounds=1)
    assert alone["random"]["2"] > 0, "the modules are what there is"


def test_a_rule_is_timed_with_its_own_cells():
    """The engine is told the scores of the rule: the cells it runs are those of the rule."""
    rule = directed(atsnn.from_pretrained("digits"), "static:4,2,1,1")
    images = data.load("digits", 32)["test"][:3].images
    with torch.no_grad():
        trace = rule(images, return_trace=True)
    ran = atsnn.freeze(undirected(rule))(
        images, return_trace=True, scores=policy_scores(rule, images)
    )
    assert torch.equal(ran.active, trace.active)
    torch.testing.assert_close(ran.logits, trace.logits, rtol=1e-3, atol=1e-3)


def test_the_same_point_twice_is_refused(tmp_path):
    point = Point("one", config=CONFIG)
    with pytest.raises(InvalidValue, match="every point must differ .* got 'one' twice"):
        sweep([point, point], tmp_path)
    with pytest.raises(InvalidValue, match="expects a checkpoint, got None"):
        sweep([Point("eps", changes={"eps": 0.1})], tmp_path)
    with pytest.raises(InvalidValue, match="expects images, got split=None"):
        sweep([Point("eps", changes={"eps": 0.1})], tmp_path, checkpoint="digits")
    split = data.load("digits", 32)["test"][:8]
    with pytest.raises(InvalidValue, match="expects training images, got None"):
        sweep([Point("t", changes={"target": 0.5})], tmp_path, checkpoint="digits", split=split)


def test_a_table_shows_means_and_spreads(tmp_path):
    rows = [
        {"label": "a", "split": "test", "accuracy": 0.90, "cells": 0.5, "flops": 4e6,
         "flops_share": 0.8, "sops": 1e6, "sops_share": 0.7, "energy_uj": 3.0,
         "energy_share": 0.6, "latency_ms": {"1": 2.0}},
        {"label": "a", "split": "test", "accuracy": 0.94, "cells": 0.6, "flops": 4e6,
         "flops_share": 0.8, "sops": 1e6, "sops_share": None, "energy_uj": 3.0,
         "energy_share": 0.6, "latency_ms": {"1": 4.0}},
        {"label": "b", "split": "validation", "accuracy": 0.5, "cells": 1.0, "flops": 5e6,
         "flops_share": 1.0, "sops": 1e6, "sops_share": 1.0, "energy_uj": 3.0,
         "energy_share": 1.0},
    ]  # fmt: skip
    sheet = table({"rows": rows})
    a, b = sheet.rows
    spread = f"{100 * statistics.stdev([0.9, 0.94]):.2f}"
    assert a == ["a", "2", f"92.00 ± {spread} %", "55 %", "80 %", "70 %", "60 %", "3.00"]
    assert b == ["b", "1", "50.00 %", "100 %", "100 %", "100 %", "100 %", "-"]
    assert "test and validation images" in sheet.note
    one, _ = summaries(rows)
    assert one.mean("latency_ms.1") == 3.0 and one.mean("mean_iou") is None
    draw({"rows": rows}, tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert ">a<" in text and "accuracy, %" in text and "energy an image" in text


def test_axes_end_where_values_do():
    from matplotlib.figure import Figure

    rows = [{"label": "a", "accuracy": y, "cells": x} for x, y in ((0.01, 0.9), (0.9, 1.0))]
    axes = Figure().add_subplot()
    plots_of(rows)[0].draw(axes)
    assert axes.get_xlim()[0] == 0 and axes.get_ylim()[1] == 100, "bars reach beyond both"


def test_the_command_trains_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    options = ["sweep", "--image-size", "8", "--embed-dim", "16", "--heads", "2", "--depth", "2",
               "--timesteps", "2", "--epochs", "1", "--limit", "128", "--shift", "1",
               "--rounds", "1",
               "--halting", "depth", "--vary", "policy=static:2,1;static:1,1", "seed=0,1",
               "--out", str(tmp_path / "s"), "--json", str(tmp_path / "s.json")]  # fmt: skip
    assert cli.main(options) == 0
    out = capsys.readouterr().out
    assert "policy=static:2,1" in out and "75 %" in out and "50 %" in out
    found = json.loads((tmp_path / "s.json").read_text())
    assert [row["cells"] for row in found["rows"]] == [0.75, 0.75, 0.5, 0.5]
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 10_000 and found["machine"]["cores"]


def test_the_command_runs_a_checkpoint_in_other_ways(tmp_path, capsys):
    options = ["sweep", "--checkpoint", "digits", "--limit", "24", "--batch", "--vary",
               "eps=0.01,0.3", "merge_r=0,8", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*options, "--json", str(tmp_path / "s.json")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == [
        {"eps": 0.01, "merge_r": 0}, {"eps": 0.01, "merge_r": 8},
        {"eps": 0.3, "merge_r": 0}, {"eps": 0.3, "merge_r": 8},
    ]  # fmt: skip
    cells = [row["cells"] for row in rows]
    assert cells[0] > cells[1] > cells[3] and cells[0] > cells[2]
    split = data.load("digits", 32)["test"][:24]
    assert cells[0] == evaluate(atsnn.from_pretrained("digits"), split).cells
    assert not any("latency_ms" in row for row in rows)
    other = [*options[:2], "digits-dense", *options[3:]]  # in the same folder
    assert cli.main([*other, "--json", str(tmp_path / "o.json")]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"][0]["cells"] == 1.0
    assert cli.main([*options[:-2], "--out", str(tmp_path / "x"), "--plot", "x.txt"]) == 2
    assert "--plot must end in .png or .svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"eps": [0.3, 5]}, r"point 'eps=5': SpikformerConfig: eps must be .* got 5"),
        ({"target": [0.5, 2]}, "point 'target=2': .*target must be .* got 2"),
        ({"target": [0.5], "halting": ["depth", None]}, "halting=none': target expects a model"),
        ({"merge_r": [0, [1, 2]]}, "must name depth - 1 = 3 block boundaries, got 2"),
    ],
)
def test_all_points_are_checked_before_the_first_one_runs(tmp_path, vary, message):
    split = data.load("digits", 32)["test"][:4]
    told = []
    with pytest.raises(InvalidValue, match=message):
        sweep(checkpoint_grid(vary), tmp_path / "s", checkpoint="digits", split=split,
              training=split, batches=(), log=told.append)  # fmt: skip
    assert told == [] and not (tmp_path / "s").exists()
    with pytest.raises(InvalidValue, match="point 'T=0': SpikformerConfig: T must be"):
        training_grid(CONFIG, {"T": [1, 0]})


def test_a_checkpoint_on_images_that_were_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("atsnn.sweep.run.CALIBRATION", 64)
    options = ["sweep", "--checkpoint", "digits", "--limit", "24", "--batch", "--vary",
               "target=0.6", "--out", str(tmp_path)]  # fmt: skip
    training, held_out = data.load("digits", 32)["train"].held_out(100)
    seen = []
    monkeypatch.setattr(
        "atsnn.sweep.run.calibrate", lambda model, split, target: seen.append(split) or target
    )
    test = data.load("digits", 32)["test"]
    for more, name, split in ([], "validation", held_out), (["--test"], "test", test):
        assert cli.main([*options, "--validation", "100", *more, "--json",
                         str(tmp_path / "s.json")]) == 0  # fmt: skip
        (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
        assert row["split"] == name
        found = evaluate(atsnn.from_pretrained("digits"), split[:24])
        assert (row["accuracy"], row["cells"]) == (found.accuracy, found.cells)
        # What is measured on is not calibrated on.
        assert torch.equal(seen.pop().pixels, training[:64].pixels)


def test_a_checkpoint_at_other_shares_of_cells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("atsnn.sweep.run.CALIBRATION", 64)
    options = ["sweep", "--checkpoint", "digits", "--limit", "100", "--batch", "--vary",
               "target=0.35,0.5,0.6", "--out", str(tmp_path)]  # fmt: skip
    assert cli.main([*options, "--json", str(tmp_path / "s.json")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"target": t} for t in (0.35, 0.5, 0.6)]
    # No more than that, but as it was counted on training images; jumps are the scores' own.
    assert all(row["cells"] < row["settings"]["target"] + 0.02 for row in rows)
    assert 0.25 < rows[0]["cells"] < rows[1]["cells"] < rows[2]["cells"]
    capsys.readouterr()
    assert cli.main([*options[:7], "target=0.2", *options[8:]]) == 0
    assert "20% of the cells is out of reach; left at 6" in capsys.readouterr().out
    assert cli.main([*options[:2], "digits-dense", *options[3:]]) == 2
