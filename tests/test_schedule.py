"""Halting by a rule: static schedules, random depths, the tokens that fire most."""

from __future__ import annotations

import json

import pytest
import torch

import atsnn
from atsnn import cli, data
from atsnn.checkpoint import load_trained, save_pretrained
from atsnn.checks import CheckpointError, InvalidValue
from atsnn.compare import compare_engine
from atsnn.nn.blocks import Context
from atsnn.schedule import directed, policy_scores, rule_of, score_of, undirected
from atsnn.sweep import Point, sweep
from atsnn.train import TrainConfig, evaluate

MODEL = atsnn.SpikformerConfig(
    image_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, T=2, halting="rectangle"
)


def halted(policy, **changes):
    torch.manual_seed(0)
    config = MODEL.replace(**{"depth": 4, "T": 3, "halting": "depth", "image_size": 16, **changes})
    model = directed(atsnn.ATSpikformer(config).eval(), policy)
    with torch.no_grad():
        return model(data.load("digits", 16)["test"].images[:5], return_trace=True)


def test_one_schedule_for_all_tokens():
    depth = halted("static:4,2,1").depth
    assert all((depth[t] == d).all() for t, d in enumerate((4, 2, 1)))


def test_tokens_picked_at_random():
    trace = halted("random:0.6")
    assert float(trace.active.float().mean()) == pytest.approx(0.6, abs=0.06)
    assert len(trace.depth[0].unique()) > 1
    assert torch.equal(trace.depth, halted("random:0.6").depth), "the same ones in evaluation"
    model = directed(atsnn.ATSpikformer(MODEL.replace(halting="depth")), "random:0.75")
    images = data.load("digits", 8)["test"].images[:5]
    depths = [model(images, return_trace=True).depth for _ in range(2)]
    assert not torch.equal(*depths), "others in every step of training"


@pytest.mark.parametrize("policy", ["static:4,2,1", "random:0.6", "top:0.5,0.5,0.25"])
def test_a_rule_halts_the_same_cells_with_either_accumulator(policy):
    depth, rectangle = (halted(policy, halting=halting) for halting in ("depth", "rectangle"))
    assert torch.equal(depth.active, rectangle.active) and not depth.active.all()
    assert torch.equal(depth.logits, rectangle.logits)


def test_tokens_that_fire_most():
    trace = halted("top:0.5,0.5,0.25")
    by_block = trace.active.float().mean((1, 3))  # N = 16
    want = torch.tensor([1, 0.5, 0.5, 0.25])[:, None].expand(4, 5)
    assert torch.equal(by_block, want)
    # They are those that hold most spikes after the block.
    torch.manual_seed(0)
    config = MODEL.replace(depth=4, T=3, halting="depth", image_size=16)
    model = atsnn.ATSpikformer(config).eval()
    with torch.no_grad():
        x = model.embed(data.load("digits", 16)["test"].images[:5])
        spikes = model.block[0].forward_with_keys(x, Context())[0].sum((0, 3))
    kept = trace.active[1, 0]
    least = spikes.masked_fill(~kept, torch.inf).min(1).values
    assert (least >= spikes.masked_fill(kept, -1).max(1).values).all()


def test_rules_are_checked():
    model = atsnn.ATSpikformer(MODEL.replace(halting="depth"))
    for policy, message in {
        "static:1,2": "do not rise", "static:2": "name 2 numbers in 1 .. 2",
        "static:3,1": "name 2 numbers", "random:0.2": "in 0.5 .. 1", "top:0.5,0.2": "name 1",
        "best:1": "must be static:D1,D2", "static:x": "must be static:D1,D2",
    }.items():  # fmt: skip
        with pytest.raises(InvalidValue, match=message):
            directed(model, policy)
        with pytest.raises(InvalidValue, match=message):
            TrainConfig(model.config, policy=policy)
    for halting in (None, "sequential"):
        with pytest.raises(InvalidValue, match=f"be 'rectangle' or 'depth', .*got {halting!r}"):
            directed(atsnn.ATSpikformer(MODEL.replace(halting=halting)), "static:1,1")


def test_a_run_keeps_its_rule(tmp_path, capsys):
    options = ["--image-size", "8", "--embed-dim", "16", "--heads", "2", "--depth", "2",
               "--timesteps", "2", "--epochs", "1", "--halting", "depth", "--policy", "static:2,1",
               "--shift", "1"]  # fmt: skip
    out = str(tmp_path / "run")
    assert cli.main(["train", *options, "--out", out]) == 0
    assert cli.main(["eval", "--checkpoint", out, "--json", str(tmp_path / "e.json")]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["cells"] == 0.75
    rule = directed(atsnn.from_pretrained(out), "static:2,1")
    assert found["accuracy"] == evaluate(rule, data.load("digits", 8)["test"]).accuracy
    assert rule_of(rule) == "static:2,1" and rule_of(rule.without_halting()) is None


# -- a checkpoint that was trained under a rule ---------------------------------------------------


@pytest.fixture
def ruled(tmp_path):
    """The digits' weights as if they had been trained under a rule that runs half of the cells."""
    extra = {"data": "digits", "policy": "static:4,2,1,1"}
    return save_pretrained(atsnn.from_pretrained("digits"), tmp_path / "ruled", extra)


def test_bench_measures_it_under_its_rule(ruled, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--checkpoint", str(ruled), "--limit", "4", "--batch", "2", "--rounds", "1"]
    assert cli.main(["bench", *options, "--json", str(out)]) == 0, capsys.readouterr().err
    found = json.loads(out.read_text())
    (cost,) = found["patterns"].values()
    assert cost["cells"] == [[128] * 4, [128, 128, 0, 0], [128, 0, 0, 0], [128, 0, 0, 0]]
    assert found["accuracy"]["this model"]["cells"] == 0.5
    assert found["accuracy"]["this model"]["score"] == "static:4,2,1,1"
    assert {row["backend"] for row in found["latency"]} == {"engine", "native"}


def test_a_sweep_runs_it_under_its_rule_and_refuses_what_does_not_go_with_it(ruled, tmp_path):
    split = data.load("digits", 32)["test"][:8]
    points = [Point("as given", changes={}), Point("merged", changes={"merge_r": 4})]
    rows = sweep(points, tmp_path, checkpoint=ruled, split=split, batches=())["rows"]
    assert rows[0]["cells"] == 0.5 > rows[1]["cells"]
    for changes, message in {
        ("target", 0.5): "halts by its scores, got one that halts by a rule, static:4,2,1,1",
        ("halting", "sequential"): "halting must be 'rectangle' or 'depth', .* got 'sequential'",
        ("halting", None): "halting must be 'rectangle' or 'depth', .* got None",
    }.items():
        point = Point("other", changes=dict([changes]))
        with pytest.raises(InvalidValue, match=f"point 'other': .*{message}"):
            sweep([*points, point], tmp_path, checkpoint=ruled, split=split, batches=())


def test_an_engine_refuses_a_rule_and_takes_its_scores(ruled):
    model, images = load_trained(ruled), data.load("digits", 32)["test"][:3].images
    with pytest.raises(InvalidValue, match=r"freeze: .* halts by a rule \(static:4,2,1,1\)"):
        atsnn.freeze(model)
    engine = atsnn.freeze(undirected(model))
    ran = engine(images, return_trace=True, scores=policy_scores(model, images))
    assert ran.depth.unique().tolist() == [1, 2, 4]
    difference = compare_engine(model, images)
    assert difference.spikes > 0 and difference.cells == 0, "both run the cells of the rule"


def test_what_a_model_halts_by():
    own, plain = atsnn.from_pretrained("digits"), atsnn.from_pretrained("digits-dense")
    assert score_of(own) == own.config.score and score_of(plain) is None
    assert directed(own, None) is own and undirected(own) is own
    assert policy_scores(own, torch.zeros(1, 1, 32, 32)) is None


def test_a_recorded_rule_that_is_none_is_told_of(tmp_path):
    extra = {"data": "digits", "policy": "static:9"}
    folder = save_pretrained(atsnn.from_pretrained("digits"), tmp_path / "bad", extra)
    with pytest.raises(CheckpointError, match="config.json: .*name 4 numbers"):
        load_trained(folder)
