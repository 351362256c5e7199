"""The study's bookkeeping: what is run, what is compared with what, and what the page says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "benchmarks"))

import study  # noqa: E402
import study_page  # noqa: E402
import study_parts  # noqa: E402
import study_picture  # noqa: E402

from atsnn import SpikformerConfig  # noqa: E402
from atsnn.sweep.output import Summary  # noqa: E402
from atsnn.train import TrainConfig  # noqa: E402


def tiny() -> study_parts.Part:
    model = SpikformerConfig(
        image_size=16, in_channels=1, embed_dim=8, depth=2, num_heads=2, mlp_ratio=1, T=2
    )
    base = TrainConfig(model, limit=64, batch_size=16, epochs=1, validation=64, target=None)
    return study_parts.Part(
        "Tiny", "for a test", base, {"epochs": 1, "lr": 0.01},
        {
            "plain": study_parts.PLAIN,
            "halting": {**study_parts.HALTING, "target": 0.8},
            "static 2,1": study_parts.static(2, 1),
            "static 1,1": study_parts.static(1, 1),
            "1 timestep": {**study_parts.PLAIN, "T": 1},
        },
        seeds=1, headline=("plain", "halting"), more=2, once=("static 1,1",),
        pairs=(("halting", "plain"), ("halting", "static 2,1"), ("halting", "merging")),
    )  # fmt: skip


@pytest.fixture
def place(monkeypatch, tmp_path):
    monkeypatch.setitem(study.PARTS, "tiny", tiny)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "rows")
    return tmp_path


@pytest.mark.parametrize("name", sorted(study_parts.PARTS))
def test_every_method_of_a_part_is_a_run_of_its_own(name, tmp_path):
    part = study_parts.PARTS[name]()
    for seed in range(max(part.seeds, part.more)):
        points = part.points(seed, tmp_path)
        assert len({point.key for point in points.values()}) == len(points)
        first = None if part.second is None else points.pop(study_parts.FIRST)
        assert first is None or not first.config.halts
        assert points and set(points) <= set(part.methods)
        epochs = {point.config.epochs for point in points.values()}
        for point in points.values():
            c = point.config
            assert c.seed == seed and c.validation > 0
            # All have seen the same images as often, and go on from the same network, if any.
            assert {c.epochs} == epochs
            place = part.folder(seed, tmp_path)
            assert c.init == (None if first is None else str(place / first.key))
    assert part.pairs and {label for pair in part.pairs for label in pair} <= set(part.methods)


def test_who_runs_with_which_seed():
    part = tiny()
    labels = [list(part.points(seed, Path("runs"))) for seed in (0, 1)]
    assert labels == [
        ["pretrained", "plain", "halting", "static 2,1", "static 1,1", "1 timestep"],
        ["pretrained", "plain", "halting"],
    ]  # fmt: skip
    assert part.labels == labels[0]
    scratch = dataclasses.replace(part, second=None)
    points = scratch.points(0, Path("runs"))
    assert list(points) == scratch.labels == labels[0][1:]
    assert all(point.config.init is None for point in points.values())
    # The plain network from scratch is what the other part goes on from: it is trained once.
    settings = dataclasses.replace(part, methods={"plain": study_parts.PLAIN}).points(0, Path("r"))
    assert settings[study_parts.FIRST].key == points["plain"].key
    assert part.folder(0, Path("r")) == scratch.folder(0, Path("r")) != part.folder(1, Path("r"))


def test_a_part_from_its_runs_to_its_page(place, monkeypatch):
    study.run("tiny", 0, place / "runs", None)
    study.run("tiny", 1, place / "runs", ["plain", "halting"])
    rows = {row["label"]: row for row in study.read("tiny", 0)}
    assert list(rows) == tiny().labels
    assert all(row["split"] == "test" and row["images"] == 360 for row in rows.values())
    assert rows["static 2,1"]["cells"] == 0.75 and rows["plain"]["cells"] == 1
    assert "validation_accuracy" in rows["halting"]
    assert set(rows["halting"]["detail"]) > {"lost", "won", "confidence"}
    assert "detail" not in rows["static 2,1"]

    assert all("minutes" in row for row in rows.values())

    # Again: nothing is trained, nothing is lost.
    monkeypatch.setattr("atsnn.sweep.run.train", None)
    study.run("tiny", 0, place / "runs", ["halting"])
    again = {row["label"]: row for row in study.read("tiny", 0)}
    assert again == rows

    # Of a run that somebody else trained, or another call in part, the time is not known.
    study._path("tiny", 0).unlink()
    study.run("tiny", 0, place / "runs", ["halting"])
    (_, row) = study.read("tiny", 0)
    assert row["label"] == "halting" and "minutes" not in row
    study.overview()
    study._keep("tiny", 0, list(rows.values()))

    study.latency("tiny", place / "runs", ["plain", "static 2,1"])
    timed = {row["label"]: row.get("latency_ms") for row in study.read("tiny", 0)}
    assert set(timed["plain"]) == {"1", "16"} and timed["halting"] is None

    part = tiny()
    found = study_page.rows_of("tiny", part)
    assert [(row["label"], row["seed"]) for row in found][:3] == [
        ("plain", 0), ("plain", 1), ("halting", 0)
    ]  # fmt: skip
    # Shares are those of the plain network's, of which one timestep is a half.
    (short,) = (row for row in found if row["label"] == "1 timestep")
    assert rows["1 timestep"]["cells"] == 1 and short["cells"] == 0.5
    flops = rows["1 timestep"]["flops"] / rows["plain"]["flops"]
    assert short["flops_share"] == pytest.approx(flops)
    assert 0 < short["flops_share"] < 1
    # So are synaptic operations, of whatever weights: of the plain network's, over its seeds.
    plain = [row["sops"] for row in found if row["label"] == "plain"]
    (halts,) = (row for row in found if row["label"] == "halting" and row["seed"] == 0)
    assert len(plain) == 2
    assert halts["sops_share"] == pytest.approx(halts["sops"] / statistics.fmean(plain))
    assert halts["sops_share"] != pytest.approx(rows["halting"]["sops_share"])
    # Without a plain network all is known but what depends on its spikes.
    full = {"cells": 4.0, "steps": 2.0, "flops": study_page.flops_of(part.network)}
    alone = study_page._to_plain(rows["1 timestep"], full)
    assert alone["cells"] == 0.5 and alone["flops_share"] == short["flops_share"]
    assert alone["sops_share"] is None and alone["energy_share"] is None
    told = {"confidence": [{"cells": 0.8}], "blocks_on_ink": 1.5, "blocks_on_background": None}
    alone = study_page._to_plain({**rows["1 timestep"], "detail": told}, full)
    assert alone["detail"] == {
        "confidence": [{"cells": 0.4}], "blocks_on_ink": 0.75, "blocks_on_background": None
    }  # fmt: skip
    text = study_page.table(found)
    assert text.count("\n") == 6 and "ms at batch 1" in text
    halting = [row for row in found if row["label"] == "halting"]
    text = study_page.table([rows["plain"], *halting])
    assert "(seeds: 1) |" in text.splitlines()[3], "two rows, one pair"
    (figure,) = (f for f in study_page.figures({"tiny": found}) if f["method"] == "plain")
    assert figure["seeds"] == [0, 1] and figure["accuracy"][0] == rows["plain"]["accuracy"]
    assert set(figure["latency_ms"]) == {"1", "16"}
    lines = study_page.details(found).splitlines()
    lost = [100 * row["detail"]["lost"] for row in found if row["label"] == "halting"]
    assert len(lines) == 3 and lines[2].startswith("| halting | 2 | ")
    assert f"{statistics.fmean(lost):.2f} ± {statistics.stdev(lost):.2f} % |" in lines[2]
    json.dumps(study_page.figures({"tiny": found}))
    monkeypatch.setattr(study_page, "LEAST", 2)
    lines = study_page.headline({"tiny": found}).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["plain", "halting"]
    assert study_page.choices(part, found).count("\n") == 3
    assert study_page.choices(part, found).startswith("| candidate | validation accuracy |")
    fewer = [{**short, "label": "static 2", "mean_iou": 0.5, "validation_mean_iou": 0.5}]
    assert study_page.choices(part, fewer).startswith("| candidate | validation mean IoU |")
    assert study_page.choices(part, fewer).endswith(" 50.0 % |"), "of the full network's cells"
    first, second = study_page.verdicts(part, found).splitlines()
    assert first.startswith("- halting at ") and "against plain at 100.0 %" in first
    assert "(seeds: 2)" in first and "noise" in first and " ± " in first
    assert "static 2,1 at 75.0 %" in second and second.endswith("(seeds: 1)")


def test_a_method_that_there_is_not_is_refused(place):
    with pytest.raises(SystemExit, match=r"expected methods of seed 1 .* got \['static 1,1'\]"):
        study.run("tiny", 1, place / "runs", ["static 1,1"])


def test_differences_are_paired_by_seed():
    ours = Summary("a", tuple({"seed": s, "accuracy": x} for s, x in enumerate((0.5, 0.7, 0.9))))
    theirs = Summary("b", tuple({"seed": s, "accuracy": x} for s, x in enumerate((0.4, 0.5, 0.9))))
    found = study_page.difference(ours, theirs)
    low, high = stats.ttest_rel((0.5, 0.7, 0.9), (0.4, 0.5, 0.9)).confidence_interval(0.95)
    assert found.mean - found.bound == pytest.approx(low)
    assert found.mean + found.bound == pytest.approx(high)
    assert str(found) == "+10.00 ± 24.84"
    greater = stats.ttest_rel((0.5, 0.7, 0.9), (0.4, 0.5, 0.9), alternative="greater")
    assert found.least == pytest.approx(greater.confidence_interval(0.95).low)
    other = Summary("c", ({"seed": 7, "accuracy": 0.1},))
    assert study_page.difference(ours, other) is None
    one = Summary("d", ({"seed": 1, "accuracy": 0.6},))
    assert str(study_page.difference(ours, one)) == "+10.00"
    assert study_page.difference(ours, one).told == ""
    assert study_page.Difference(0.2, 0.001, 2).told == "", "of two seeds nothing is concluded"
    # Student's t for two degrees of freedom: 4.303.
    told = {m: study_page.Difference(m, 0.1 / 4.302, 3).told for m in (-0.2, -0.1, 0.1, 0.2)}
    assert told == {
        -0.2: "worse beyond the noise", -0.1: "no difference beyond the noise",
        0.1: "no difference beyond the noise", 0.2: "better beyond the noise",
    }  # fmt: skip


@pytest.mark.parametrize("methods", [12, 20])
def test_every_point_has_its_name_and_no_name_hides_another(methods):
    """In a corner, some of them at the very same place, with error bars; by what is drawn."""
    pytest.importorskip("matplotlib")
    from matplotlib import figure as figures
    from matplotlib import text as texts

    rng = random.Random(0)
    found = [
        Summary(
            rng.choice(study_picture.KINDS) + f" of number {n}",
            tuple(
                {"accuracy": 0.8 + 0.01 * (n % 3) + apart, "cells": (1.0, 0.01, 0.5)[n % 3]}
                for apart in (-0.004, 0.004)[: 1 + n % 2]
            ),
        )
        for n in range(methods)
    ]
    size = (study_picture.WIDTH, study_picture.HEIGHT)
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    plot = study_picture.picture("A title", "test accuracy", found, "accuracy")
    axes.set_title(plot.title)
    plot.draw(axes)
    figure.draw_without_rendering()
    drawn, labels = [text.get_text() for text in axes.texts], [s.label for s in found]
    legend = study_picture.legend("A title", found)
    if methods > study_picture.MOST_NAMED:
        assert sorted(drawn, key=int) == [str(n) for n in range(1, methods + 1)]
        beside = figures.Figure(figsize=size).add_subplot()
        legend.draw(beside)
        lines = [text.get_text() for text in beside.texts]
        numbers = [str(n) for n in range(1, methods + 1)]
        assert lines == [text for pair in zip(numbers, labels, strict=True) for text in pair]
    else:
        assert sorted(drawn) == sorted(labels) and legend is None
    frame = axes.get_window_extent()
    # Of the text alone, without the line to its point; of its height, what letters take.
    boxes = [texts.Text.get_window_extent(text).shrunk(1, 0.6) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(frame.x0 - 5 < box.x0 and box.x1 < frame.x1 + 5 for box in boxes)
    assert all(frame.y0 - 5 < box.y0 and box.y1 < frame.y1 + 5 for box in boxes)


def test_a_point_far_below_is_drawn_at_the_edge_with_its_value():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    found = [
        Summary(label, ({"accuracy": accuracy, "cells": cells},))
        for label, accuracy, cells in (("plain", 0.9, 1.0), ("halting", 0.89, 0.5),
                                       ("static 1", 0.71, 0.4), ("merging", 0.2, 0.7))
    ]  # fmt: skip
    axes = Figure().add_subplot()
    study_picture.picture("A title", "mean IoU", found, "accuracy").draw(axes)
    assert sorted(text.get_text() for text in axes.texts) == [
        "halting", "merging: 20.0 %", "plain", "static 1"
    ]  # fmt: skip
    low, high = axes.get_ylim()
    assert 60 < low < 71 < 90 < high
    drawn = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines]
    ((_, y),) = [point for point in drawn if point[0] == 70.0]
    assert low < y < low + 0.1 * (high - low)


def test_tables_are_put_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n")
    study_page.fill(page, {"one": r"new \1", "absent": "x"})
    want = "a\n<!-- one -->\nnew \\1\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    assert page.read_text() == want


def test_runs_that_parts_share_are_trained_once(monkeypatch, tmp_path):
    """All of a folder's parts in one queue; a failure is told of when the others are done."""
    calls = []

    def run(command, env, check=False):
        calls.append(command[command.index(str(tmp_path)) + 1 :])
        return subprocess.CompletedProcess(command, int(calls[-1] == ["fashion", "--seeds", "1"]))

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "PARTS", {n: study_parts.PARTS[n] for n in ("fashion", "pixels")}
                        | {"fashion-long": study_parts.PARTS["fashion-long"]})  # fmt: skip
    with pytest.raises(SystemExit, match=r"failed: \[\['fashion', '--seeds', '1'\]\]"):
        study.everything(tmp_path, 1)
    assert calls[:2] == [["fashion", "--seeds", "0"], ["fashion-long", "--seeds", "0"]]
    assert len(calls) == 3 + 5 + 5 and not any("--latency" in call for call in calls)
    del study.PARTS["fashion"]
    study.everything(tmp_path, 4)
    assert calls[-2:] == [["pixels", "--latency"], ["fashion-long", "--latency"]]
