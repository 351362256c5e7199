"""The command: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from atsnn import bench, cli, data, measure
from atsnn.checkpoint import from_pretrained, save_pretrained
from atsnn.sheets import milliseconds


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_info(capsys, tmp_path):
    code, out, err = run(capsys, "info", "--json", str(tmp_path / "info.json"))
    assert code == 0 and err == ""
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["backends"]["native"] is True and found["instruction_set"] in out
    assert "backend native" in out and "digits" in out


def test_bench_prints_the_numbers_it_writes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "deep" / "bench.json"
    code, out, err = run(
        capsys, "bench", "--limit", "40", "--batch", "1", "4", "--rounds", "2", "--json", str(path)
    )
    assert code == 0 and err == ""
    found = json.loads(path.read_text())
    split = data.load("digits", 32)["test"]
    with torch.no_grad():
        trace = from_pretrained("digits")(split.images[:40], return_trace=True)
    this = found["accuracy"]["this model"]
    assert this["images"] == 40
    assert this["accuracy"] == int((trace.logits.argmax(1) == split.labels[:40]).sum()) / 40
    assert this["cells"] == pytest.approx(float(trace.active.double().mean()))
    assert {"trained without halting", "constant score (control)"} < set(found["accuracy"])
    rows = [(row["batch"], row["backend"]) for row in found["latency"]]
    assert rows == [(1, "engine"), (1, "native"), (4, "engine"), (4, "native")]
    for row in found["latency"]:
        for scope in ("blocks", "model"):
            one = row[scope]
            assert one["realized_fraction"] == pytest.approx(
                one["latency_saved"] / one["flops_saved"]
            )
            assert milliseconds(one["on"]["median_s"]) in out
            assert f"{100 * one['flops_saved']:.1f} %" in out
    assert f"{100 * this['cells']:.1f} %" in out and "the packed form" in out
    assert "native = reference bit for bit" in out and "packed = masked on 32 images" in out


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(capsys, "bench", "--limit", "8", "--batch", "1", "--rounds", "1")
    assert code == 0
    assert max(len(line.rstrip()) for line in out.splitlines()) <= columns
    assert "…" not in out, "nothing is cut off"


def test_bench_reports_no_timing_on_a_wrong_result(capsys, monkeypatch):
    from atsnn import reference

    monkeypatch.setattr(
        reference, "neuron", lambda *a, f=reference.neuron: (1 - f(*a)[0], f(*a)[1])
    )
    code, out, err = run(capsys, "bench", "--limit", "4", "--batch", "1", "--rounds", "1")
    assert code == 1
    assert "expected the native backend to give the reference's" in err and "ms" not in out


def test_eval(capsys, tmp_path):
    path = tmp_path / "eval.json"
    code, out, err = run(capsys, "eval", "--limit", "30", "--json", str(path))
    assert code == 0 and err == ""
    found = json.loads(path.read_text())
    assert {"accuracy", "cells", "images"} <= set(found) and found["images"] == 30
    assert f"{100 * found['accuracy']:.2f} %" in out
    code, _, _ = run(capsys, "eval", "--limit", "30", "--halting-off", "--json", str(path))
    assert code == 0 and json.loads(path.read_text())["cells"] == 1.0


@pytest.fixture
def elsewhere(tmp_path):
    """A checkpoint trained on scenes, as it says itself."""
    folder = str(tmp_path / "elsewhere")
    save_pretrained(from_pretrained("digits"), folder, {"data": "scenes-digits"})
    return folder


# A command that loads a checkpoint, and where it tells which images it ran on.
LOADING = [
    (["eval", "--limit", "4"], "Accuracy on {}"),
    (["show", "--count", "1", "--out", "{tmp}/x.png"], ""),
    (["bench", "--limit", "2", "--batch", "1", "--rounds", "1"], "data {}"),
    (["sweep", "--limit", "4", "--batch", "--vary", "eps=0.1", "--out", "{tmp}/s"], "on {}"),
]


@pytest.mark.parametrize(("arguments", "told"), LOADING, ids=["eval", "show", "bench", "sweep"])
def test_a_checkpoint_runs_on_what_it_was_trained_on(
    capsys, tmp_path, monkeypatch, elsewhere, arguments, told
):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    asked, digits = [], data.load("digits", 32)

    def load(name, *rest):
        asked.append(name)
        return digits

    for module in (data, bench.subject):
        monkeypatch.setattr(module, "load", load)
    warning = f"atsnn: warning: {elsewhere} was trained on scenes-digits and runs on mnist here\n"
    for given, name, warned in (
        (["--checkpoint", elsewhere], "scenes-digits", ""),
        (["--checkpoint", elsewhere, "--data", "mnist"], "mnist", warning),
        (["--checkpoint", "digits"], "digits", ""),
    ):
        asked.clear()
        code, out, err = run(capsys, *arguments, *given)
        assert code == 0 and asked == [name] and err == warned
        assert told.format(name) in " ".join(out.split())


def test_data_that_is_not_recorded_or_not_known_is_the_digits(capsys, tmp_path, monkeypatch):
    for number, extra in enumerate((None, {}, {"data": "my photographs"})):
        folder = str(tmp_path / str(number))
        save_pretrained(from_pretrained("digits"), folder, extra)
        code, out, err = run(capsys, "eval", "--checkpoint", folder, "--limit", "2")
        assert code == 0 and "Accuracy on digits" in out
        assert ("was trained on my photographs and runs on digits here" in err) == (number == 2)


def test_show_draws_a_picture(capsys, tmp_path):
    from PIL import Image

    path = tmp_path / "pictures" / "digits.png"
    code, out, err = run(capsys, "show", "--count", "2", "--out", str(path))
    assert code == 0 and err == "" and str(path) in out.replace("\n", "")
    with Image.open(path) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(10**7)) > 50


def test_train_eval_and_resume(capsys, tmp_path):
    folder = tmp_path / "run"
    small = ["--limit", "64", "--batch-size", "32", "--embed-dim", "16", "--depth", "2",
             "--heads", "2", "--timesteps", "2", "--image-size", "8", "--shift", "1"]  # fmt: skip
    train = ["train", "--out", str(folder), "--epochs", "1", *small]
    code, out, err = run(capsys, *train)
    assert code == 0 and err == "" and "epoch   1/1" in out and "test accuracy" in out
    code, _, _ = run(capsys, "eval", "--checkpoint", str(folder), "--limit", "20")
    assert code == 0
    code, _, err = run(capsys, *train)
    assert code == 2 and "give --resume" in err
    code, out, _ = run(capsys, *train, "--resume")
    assert code == 0 and "all 1 epochs of the run are done" in out


WRONG = [
    (["eval", "--checkpoint", "nothing"], "expected a packaged name"),
    (["eval", "--checkpoint", "/etc"], "expected a file config.json, got none"),
    (["eval", "--data", "cifar"], "data must be one of 'digits', 'fashion-mnist'"),
    (["eval", "--data", "digits", "--data-dir", "/dev/null/nowhere"], "must be a directory"),
    (["eval", "--checkpoint", "fashion-mnist", "--data-dir", "/etc"], "expected the file train-im"),
    (["eval", "--limit", "0"], "--limit must be a number >= 1, got 0"),
    (["eval", "--limit", "4", "--json", "/proc/no/such"], "expected a file that can be written"),
    (["bench", "--batch", "0"], "batch must be a number >= 1"),
    (["bench", "--limit", "4", "--batch", "5"], "and <= 4, got 5"),
    (["bench", "--limit", "4", "--batch", "1", "--rounds", "0"], "rounds must be a number >= 1"),
    (["bench", "--threads", "0"], "--threads must be a number >= 1 and <= 1024, got 0"),
    (["bench", "--threads", "100000"], "--threads must be a number >= 1 and <= 1024"),
    (["show", "--count", "1", "--out", "/dev/null/x.png"], "--out: expected a file that can be"),
    (["train", "--out", "/dev/null/run"], "expected a folder that can be made"),
    (["show", "--count", "0"], "--count must be a number >= 1"),
    (["show", "--start", "360"], "and <= 359, got 360"),
    (["show", "--out", "picture.jpg"], "--out must end in .png, got picture.jpg"),
    (["train", "--data", "cifar"], "--data must be one of"),
    (["train", "--target", "0.1"], "target must be a number >= 0.25 and <= 1, got 0.1"),
    (["train", "--lr", "nan"], "lr must be a number > 0, got nan"),
    (["train", "--heads", "7"], "embed_dim must be a multiple of num_heads 7"),
    (["train", "--timesteps", "0"], "T must be a number >= 1 and <= 1048576, got 0 (--timesteps)"),
    (["train", "--validation", "100000"], "must be a number >= 1 and <= 1436, got 100000 (--valid"),
    (["train", "--data-dir", "/nope"], "must be a directory, got /nope (--data-dir)"),
    (["train", "--batch-size", "1"], "batch_size must be a number >= 2, got 1 (--batch-size)"),
    (
        ["sweep", "--vary", "T=0"],
        "point 'T=0': SpikformerConfig: T must be a number >= 1 and <= 1048576, got 0\n",
    ),
    (["bench", "--config", "spikformer_4_384", "--set", "T=0"], "and <= 1048576, got 0\n"),
    (["train", "--halting", "sequential", "--merge-r", "2"], "cannot merge tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda v: " ".join(v)[:40])
def test_wrong_use_exits_2_with_one_clear_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


EARLY = [
    ["train", "--init", "nope"],
    ["train", "--task", "pixels"],  # of data without maps
    ["train", "--validation", "100000"],
    ["train", "--epochs", "1", "--limit", "64"],  # one batch
    ["train", "--resume"],
    ["sweep", "--vary", "lr=0.1", "--init", "nope"],
    ["sweep", "--vary", "eps=0.1,5"],
    ["sweep", "--checkpoint", "digits", "--vary", "eps=0.1,0.1"],
    ["sweep", "--checkpoint", "digits", "--vary", "eps=0.1,5"],
    ["sweep", "--checkpoint", "digits", "--vary", "target=0.5,2"],
    ["sweep", "--checkpoint", "digits", "--vary", "halting=depth,none", "target=0.5"],
]


@pytest.mark.parametrize("arguments", EARLY, ids=" ".join)
def test_what_is_refused_leaves_no_folder(capsys, tmp_path, arguments):
    code, _, err = run(capsys, *arguments, "--out", str(tmp_path / "runs" / "x"))
    assert code == 2 and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["benhc"], [], ["eval", "--batch"], ["train", "--epochs", "x"]]
)
def test_unknown_words_exit_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: atsnn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", ["docs/method.md", "the share of cells that run is the cost", "default: digits"]),
        ("sweep", ["docs/method.md", "default: that of the checkpoint, or digits"]),
        ("eval", ["default: that of the checkpoint, or digits where it names none"]),
        ("show", ["default: that of the checkpoint"]),
        ("bench", ["default: that of the checkpoint"]),
    ],
)
def test_help(capsys, command, told):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(line in text for line in told)


def test_nothing_on_stderr_and_the_installed_command(tmp_path):
    command = [os.path.join(os.path.dirname(sys.executable), "atsnn"), "eval", "--limit", "8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "" and "digits" in result.stdout


def test_interleaved_runs_in_turns_and_reports_each_round():
    calls = []
    found = measure.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3, warmup=1, least_seconds=0,
    )  # fmt: skip
    # A warm-up each, then in every turn one call that is not timed and one that is.
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 3
    assert [len(t.seconds) for t in found.values()] == [3, 3]


def test_timing_and_realized_fraction_by_hand():
    timing = measure.Timing((1.0, 2.0, 3.0, 4.0, 10.0))
    assert timing.median == 3.0 and timing.spread == pytest.approx((7.0 - 1.5) / 3.0)
    assert measure.realized_fraction(10.0, 8.0, 100, 50) == pytest.approx(0.4)
    assert measure.realized_fraction(10.0, 8.0, 100, 100) is None


def test_gate_names_what_differs(monkeypatch):
    model = from_pretrained("digits")
    images = data.load("digits", 32)["test"].images[:2]
    assert "bit for bit on 2 images" in bench.check_gate(model, images)[0]


def test_interleaved_hands_out_what_timed_calls_returned(monkeypatch):
    counts = {"short": 0, "long": 0}

    def call(name):
        counts[name] += 1
        return counts[name]

    def run():
        counts.update(short=0, long=0)
        taken = []
        measure.interleaved(
            {name: lambda name=name: call(name) for name in counts}, rounds=2, warmup=1,
            least_seconds=0.0, taken=lambda *found: taken.append(found),
        )  # fmt: skip
        return taken

    # One call of warm-up; in each turn one that warms and one that is timed.
    assert run() == [("short", 3), ("long", 3), ("short", 5), ("long", 5)]
    monkeypatch.setattr(measure, "LONG", 0.0)  # everything is long: nothing warms
    assert run() == [("short", 2), ("long", 2), ("short", 3), ("long", 3)]


def test_kept_bytes_counts_each_storage_once_and_no_parameters():
    x, weight = torch.rand(8, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    assert measure.kept_bytes(lambda: (x * x).sum()) == x.nbytes
    assert measure.kept_bytes(lambda: x * weight) == x.nbytes + weight.nbytes
    assert measure.kept_bytes(lambda: x * weight, [weight]) == x.nbytes
