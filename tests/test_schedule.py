"""Halting by a rule: static schedules, random depths, the tokens that fire most."""

from __future__ import annotations

import json

import pytest
import torch

import atsnn
from atsnn import data
from atsnn.checks import InvalidValue
from atsnn.nn.blocks import Context
from atsnn.schedule import directed, is_directed
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
        "static:1,2": "do not rise", "static:2": "expects 2 numbers in 1 .. 2",
        "static:3,1": "expects 2 numbers", "random:0.2": "in 0.5 .. 1", "top:0.5,0.2": "expects 1",
        "best:1": "must be static:D1,D2", "static:x": "must be static:D1,D2",
    }.items():  # fmt: skip
        with pytest.raises(InvalidValue, match=message):
            directed(model, policy)
        with pytest.raises(InvalidValue, match=message):
            TrainConfig(model.config, policy=policy)
    for halting in (None, "sequential"):
        with pytest.raises(InvalidValue, match=f"by 'rectangle' or 'depth', got {halting!r}"):
            directed(atsnn.ATSpikformer(MODEL.replace(halting=halting)), "static:1,1")


def test_a_run_keeps_its_rule(tmp_path, capsys):
    from atsnn import cli

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
    assert is_directed(rule) and not is_directed(rule.without_halting())
