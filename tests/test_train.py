"""Training: it learns, resumes exactly, keeps to its budget, and refuses bad input."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import atsnn
from atsnn import data
from atsnn.checks import CheckpointError, InvalidValue
from atsnn.train import TrainConfig, evaluate, train, training_loss
from atsnn.train.loss import executed_share
from atsnn.train.optimizer import optimizer_of
from atsnn.train.state import STATE

MODEL = atsnn.SpikformerConfig(
    image_size=8, in_channels=1, embed_dim=16, depth=2, num_heads=2, T=2, halting="rectangle"
)
CONFIG = TrainConfig(MODEL, epochs=2, batch_size=32, limit=128, shift=1)


@pytest.fixture(autouse=True)
def no_poison(poisoned_memory):
    """Training is long enough without filling every buffer first."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def test_writes_a_checkpoint_a_log_and_a_state(tmp_path):
    lines = []
    _, found = train(CONFIG, tmp_path / "run", log=lines.append)
    again = atsnn.from_pretrained(tmp_path / "run")
    assert evaluate(again, data.load("digits", 8)["test"]) == found
    assert found.images == 360 and 0 < found.cells <= 1
    log = json.loads((tmp_path / "run" / "training.json").read_text())
    assert len(log["history"]) == 2 and log["config"]["model"]["embed_dim"] == 16
    assert log["history"][-1]["test_accuracy"] == found.accuracy
    assert sum(line.startswith("epoch") for line in lines) == 2


@pytest.mark.parametrize("changes", [{}, dict(merge_r=1, merge_match="random")], ids=str)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path, changes):
    config = dataclasses.replace(CONFIG, model=MODEL.replace(**changes))
    whole, _ = train(config, tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(line):
        if line.startswith("epoch"):
            raise Cut

    with pytest.raises(Cut):
        train(config, tmp_path / "cut", log=cut)
    resumed, _ = train(config, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_seed_is_a_run(tmp_path):
    short = dataclasses.replace(CONFIG, epochs=1, limit=64)
    runs = [
        train(dataclasses.replace(short, seed=s), tmp_path / str(i))[0].head.weight
        for i, s in enumerate((1, 1, 2))
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("epochs", "limit", "batch"), [(1, 80, 8), (1, 16, 8), (3, 8, 8)])
def test_short_runs_have_a_schedule(tmp_path, epochs, limit, batch):
    """Ten steps, two steps and three steps: the warm-up must not be empty."""
    config = dataclasses.replace(CONFIG, epochs=epochs, limit=limit, batch_size=batch)
    train(config, tmp_path)


def test_evaluation_leaves_the_modes_of_modules_alone():
    model = atsnn.ATSpikformer(MODEL).train()
    model.patch_embed.eval()
    split = data.load("digits", 8)["test"]
    few = data.Split(split.images[:4], split.labels[:4])
    evaluate(model, few)
    atsnn.cost(model, few.images)
    assert model.training and model.block.training and not model.patch_embed.training


def test_it_learns(tmp_path):
    """A fixed batch is learned by heart, within the budget."""
    torch.manual_seed(0)
    split = data.load("digits", 8)["train"]
    model = atsnn.ATSpikformer(MODEL.replace(embed_dim=32, depth=3, num_heads=4))
    config = TrainConfig(model.config, target=0.6, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(120):
        trace = model(split.images[:64], return_trace=True)
        share = float(executed_share(trace))
        loss = training_loss(trace, split.labels[:64], config, share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (trace.logits.argmax(1) == split.labels[:64]).float().mean() > 0.9
    assert share < 0.8


def test_the_budget_pulls_towards_its_target():
    torch.manual_seed(0)
    model = atsnn.ATSpikformer(MODEL)
    trace = model(torch.rand(8, 1, 8, 8), return_trace=True)
    labels = torch.zeros(8, dtype=torch.int64)
    share = float(trace.active.double().mean())
    off = dataclasses.replace(CONFIG, model=MODEL.replace(halting=None))
    plain = training_loss(trace, labels, off, share)
    for target, weight in ((0.5, 1.0), (1.0, 1.0), (0.7, 0.25)):
        config = dataclasses.replace(CONFIG, target=target, ponder_weight=weight)
        assert float(executed_share(trace)) == share
        loss = training_loss(trace, labels, config, share)
        torch.testing.assert_close(loss - plain, weight * (share - target) * trace.ponder_loss)
    fixed = dataclasses.replace(CONFIG, target=None, ponder_weight=0.1)
    loss = training_loss(trace, labels, fixed, share)
    torch.testing.assert_close(loss - plain, 0.1 * trace.ponder_loss)
    rising = dataclasses.replace(fixed, ponder_warmup=0.4)
    for progress, weight in ((0.0, 0.0), (0.1, 0.025), (0.4, 0.1), (0.9, 0.1)):
        loss = training_loss(trace, labels, rising, share, progress)
        torch.testing.assert_close(loss - plain, weight * trace.ponder_loss)


def test_alpha_and_beta_learn_ten_times_as_fast_without_decay():
    slow, fast = optimizer_of(atsnn.ATSpikformer(MODEL), CONFIG).param_groups
    assert fast["lr"] == 10 * slow["lr"] and fast["weight_decay"] == 0 and len(fast["params"]) == 2


def test_the_linear_score_joins_after_half_the_run(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, model=MODEL.replace(score="linear"), limit=64)
    states = []
    monkeypatch.setattr(
        "atsnn.train.loop.evaluate",
        lambda m, s, f=evaluate: states.append(m.halting.weight.clone()) or f(m, s),
    )
    train(config, tmp_path)
    assert (states[0] == 0).all() and (states[1] != 0).any()


def test_evaluate_counts_by_hand():
    model = atsnn.from_pretrained("digits")
    split = data.load("digits", 32)["test"]
    few = data.Split(split.images[:7], split.labels[:7])
    with torch.no_grad():
        trace = model(few.images, return_trace=True)
    for batch in (2, 7):
        found = evaluate(model, few, batch)
        assert found.accuracy == int((trace.logits.argmax(1) == few.labels).sum()) / 7
        assert found.cells == pytest.approx(float(trace.active.double().mean()))
        by_block = trace.active.double().mean((1, 2, 3)).tolist()
        assert found.cells_by_block == pytest.approx(by_block)
    with pytest.raises(InvalidValue, match="at least one image"):
        evaluate(model, data.Split(split.images[:0], split.labels[:0]))


def test_the_shipped_models_keep_what_is_promised():
    split = data.load("digits", 32)["test"]
    found = {
        name: evaluate(atsnn.from_pretrained(name), split)
        for name in ("digits", "digits-dense", "digits-constant")
    }
    assert found["digits"].accuracy >= 0.97
    assert found["digits"].cells <= 0.7
    assert found["digits"].accuracy >= found["digits-dense"].accuracy - 0.01
    assert found["digits-dense"].cells == 1.0
    assert found["digits-constant"].cells < 1.0


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InvalidValue, match="data must be one of 'digits'"):
        dataclasses.replace(CONFIG, data="nist")
    with pytest.raises(InvalidValue, match=r"target must be a number >= 0.5 and <= 1, got 0.3"):
        dataclasses.replace(CONFIG, target=0.3)
    with pytest.raises(InvalidValue, match="epochs must be a number >= 1, got 0"):
        dataclasses.replace(CONFIG, epochs=0)
    with pytest.raises(InvalidValue, match="limit must be a number >= 32, got 8"):
        dataclasses.replace(CONFIG, limit=8)
    with pytest.raises(InvalidValue, match="seed must be a number >= 0 and <= 2147483647"):
        dataclasses.replace(CONFIG, seed=2**60)
    with pytest.raises(InvalidValue, match="at least two batches in the run, got 0 of 2000"):
        train(dataclasses.replace(CONFIG, limit=None, batch_size=2000), tmp_path)
    with pytest.raises(InvalidValue, match="got a model with in_channels = 3"):
        train(dataclasses.replace(CONFIG, model=MODEL.replace(in_channels=3)), tmp_path)
    with pytest.raises(InvalidValue, match="10 classes, got a model with num_classes = 5"):
        train(dataclasses.replace(CONFIG, model=MODEL.replace(num_classes=5)), tmp_path)
    with pytest.raises(InvalidValue, match="--resume expected a file"):
        train(CONFIG, tmp_path, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidValue, match="with other files"):
        train(CONFIG, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(InvalidValue, match="the loss must be finite"):
        train(dataclasses.replace(CONFIG, lr=1e30), tmp_path / "diverges")


def test_resuming_refuses_other_settings_and_damaged_states(tmp_path):
    short = dataclasses.replace(CONFIG, epochs=1, limit=64)
    train(short, tmp_path)
    with pytest.raises(InvalidValue, match="holds an earlier run; give --resume"):
        train(short, tmp_path)
    other = dataclasses.replace(short, lr=0.5, model=MODEL.replace(depth=3))
    with pytest.raises(
        InvalidValue, match=r"got lr = 0.5 \(the run has 0.02\), model.depth = 3 \(the"
    ):
        train(other, tmp_path, resume=True)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    lines = []
    train(short, tmp_path, resume=True, log=lines.append)
    assert lines == ["all 1 epochs of the run are done"]
    atsnn.from_pretrained(tmp_path)  # written again from the state
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match="expected the state of an atsnn training run"):
        train(short, tmp_path, resume=True)
