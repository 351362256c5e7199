"""Options are refused where another one leaves them without effect, before any work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from atsnn import SpikformerConfig, cli
from atsnn.card import model_card
from atsnn.train import TrainConfig
from atsnn.train.options import command_of

BENCH = ["bench", "--config", "spikformer_2_384"]
TRAIN = ["train", "--epochs", "1", "--out", "/dev/null/never"]
SWEEP = ["sweep", "--vary", "eps=0.1", "--out", "/dev/null/never"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BENCH, "--checkpoint", "digits"], "random images; expected no --checkpoint with it"),
        ([*BENCH, "--data", "digits"], "expected no --data with it"),
        ([*BENCH, "--limit", "4"], "expected no --limit with it"),
        ([*BENCH, "--growth", "--halted", "0.4"], "of its own; expected no --halted with it"),
        ([*BENCH, "--growth", "--execution", "packed"], "expected no --execution with it"),
        (
            [*BENCH, "--growth", "batch", "--tokens", "16"],
            "batch does not vary tokens; expected no",
        ),
        (["bench", "--overheads", "--backends", "engine"], "expected no --backends with it"),
        (["bench", "--tokens", "16"], "only --growth and --overheads vary tokens; expected no"),
        ([*TRAIN, "--policy", "static:4,3,1,1", "--target", "0.5"], "expected no --target with it"),
        ([*TRAIN, "--no-budget", "--target", "0.6"], "no share of cells; expected no --target"),
        ([*TRAIN, "--no-budget", "--target-anneal", "1"], "expected no --target-anneal with it"),
        ([*TRAIN, "--halting", "none", "--target", "0.3"], "halts nothing; expected no --target"),
        ([*TRAIN, "--halting", "none", "--policy", "static:1,1,1,1"], "got None (--halting)"),
        ([*TRAIN, "--policy", "static:9,9,9,9"], "in 1 .. 4 for 'static', got 'static:9,9,9,9' (-"),
        ([*TRAIN, "--merge-threshold", "5"], "a number >= -1 and <= 1, got 5.0 (--merge-threshol"),
        ([*SWEEP, "--checkpoint", "digits", "--lr", "0.1"], "trains nothing; expected no --lr"),
        ([*SWEEP, "--test"], "expected both, got --test alone"),
        ([*SWEEP, "--no-budget", "--target", "0.6"], "expected no --target with it"),
        # Files, before the work and not after it.
        (["eval", "--plot", "x.svg"], "eval: --plot must end in .png, got x.svg"),
        (["eval", "--json", "/"], "eval: --json must be a file, got the folder /"),
        ([*TRAIN[:3], "--json", "/"], "train: --json must be a file, got the folder /"),
        ([*SWEEP, "--plot", "x.jpg"], "sweep: --plot must end in .png or .svg, got x.jpg"),
        (["info", "--json", "/proc/no/such"], "info: --json: expected a file that can be written"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refused_in_one_line_before_any_work(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("atsnn.train.train", None)
    monkeypatch.setattr("atsnn.checkpoint.load_trained", None)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_what_has_an_effect_is_taken(monkeypatch):
    monkeypatch.setattr(cli, "_train", lambda args: args.target)
    monkeypatch.setattr(cli, "_sweep", lambda args: 0)
    monkeypatch.setattr(cli, "_bench", lambda args: 0)
    for arguments in (
        [*TRAIN, "--halting", "none", "--no-budget"],  # as model cards have it
        [*TRAIN, "--policy", "random:0.5", "--no-budget"],
        [*SWEEP, "--checkpoint", "digits", "--validation", "99", "--test", "--limit", "9"],
        [*BENCH, "--growth", "tokens", "batch", "--tokens", "16"],
        ["bench", "--overheads", "--tokens", "16", "--halted", "0.4"],
    ):
        assert cli.main(arguments) in (0, 0.6), arguments
    with pytest.raises(SystemExit):
        cli.main([*TRAIN, "--save-every", "-5"])


@pytest.mark.parametrize(
    "changes",
    [dict(model=dict(halting=None)), dict(policy="static:2,2"), dict()],
)
def test_the_command_of_a_card_is_taken(monkeypatch, changes):
    small = SpikformerConfig(depth=2, T=2, in_channels=1, num_heads=4, halting="rectangle")
    run = {name: value for name, value in changes.items() if name != "model"}
    model = small.replace(**changes.get("model", {}))
    command = command_of(TrainConfig(model, target=0.7, target_anneal=0.5, **run))
    monkeypatch.setattr(cli, "_train", lambda args: cli.GOOD)
    assert cli.main(command.split()[1:]) == 0
    assert ("--target" in command) == (not changes and model.halting is not None)


@pytest.mark.parametrize(("depth", "halted"), [(1, [0.0]), (2, [0.2, 0.4]), (4, [0.2, 0.4, 0.6])])
def test_usual_shares_are_those_that_the_depth_allows(capsys, tmp_path, depth, halted):
    small = [f"depth={depth}", "T=2", "image_size=16", "embed_dim=16", "num_heads=2"]
    arguments = ["--batch", "1", "--rounds", "1", "--backends", "engine"]
    path = tmp_path / "bench.json"
    code = cli.main([*BENCH, "--set", *small, *arguments, "--json", str(path)])
    assert code == 0, capsys.readouterr().err
    names = {f"{100 * share:g} %" for share in halted}
    text = path.read_text()
    assert all(name in text for name in names), text[:500]


def test_the_card_of_a_rule_loads_it_under_its_rule(tmp_path):
    train = ["train", "--limit", "64", "--epochs", "1", "--batch-size", "32", "--image-size", "16",
             "--embed-dim", "16", "--depth", "2", "--timesteps", "2", "--heads", "2",
             "--policy", "static:2,1", "--out", str(tmp_path / "rule")]  # fmt: skip
    assert cli.main(train) == 0
    card = (tmp_path / "rule" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    code = f"import torch\nimages = torch.rand(3, 1, 16, 16)\n{code}"
    code += "assert model(images, return_trace=True).depth[1].eq(1).all()\n"
    code += "print((logits - model(images)).abs().max().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
    usual = model_card(SpikformerConfig(), {})
    assert 'atsnn.from_pretrained("FOLDER")' in usual and "load_trained" not in usual
