"""Training: it learns, resumes exactly, keeps to its budget, and refuses bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import atsnn
from atsnn import data
from atsnn.bench.subject import with_changes
from atsnn.checks import CheckpointError, InvalidValue
from atsnn.schedule import directed
from atsnn.train import TrainConfig, calibrate, evaluate, train, training_loss
from atsnn.train.augment import augmented
from atsnn.train.average import moving_average
from atsnn.train.loop import _model, _step, _warnings, splits_of
from atsnn.train.loss import executed_share
from atsnn.train.optimizer import optimizer_of, schedule_of
from atsnn.train.settings import with_settings
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

    def cut(line):
        if line.startswith("epoch"):
            raise Cut

    with pytest.raises(Cut):
        train(config, tmp_path / "cut", log=cut)
    resumed, _ = train(config, tmp_path / "cut", resume=True)
    same(whole, resumed)


class Cut(Exception):
    pass


def same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(ema=0.9), dict(erase=0.5, flip=True), dict(policy="random:0.75")],
    ids=["plain", "average", "augmented", "random halting"],
)
def test_resuming_in_the_middle_of_an_epoch(tmp_path, monkeypatch, changes):
    config = dataclasses.replace(CONFIG, **changes)
    whole, found = train(config, tmp_path / "whole")
    steps = []

    def step(*args):
        if len(steps) == 6:  # of 4 an epoch
            raise Cut
        steps.append(args)
        return _step(*args)

    with monkeypatch.context() as patch:
        patch.setattr("atsnn.train.loop._step", step)
        with pytest.raises(Cut):
            train(config, tmp_path / "cut", save_every=0)
    state = torch.load(tmp_path / "cut" / STATE, weights_only=True)
    assert state["progress"]["epoch"] == 1 and state["progress"]["batch"] == 2
    resumed, again = train(config, tmp_path / "cut", resume=True)
    same(whole, resumed)
    assert again == found
    logs = [
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


def test_a_killed_process_is_resumed(tmp_path):
    """Not an exception but a signal that cannot be caught, wherever it meets the run."""
    options = ["train", "--image-size", "8", "--embed-dim", "16", "--depth", "2", "--heads", "2",
               "--timesteps", "2", "--epochs", "3", "--batch-size", "32", "--shift", "1",
               "--threads", "1", "--save-every", "0"]  # fmt: skip
    command = [sys.executable, "-m", "atsnn", *options]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", tmp_path / "cut"], stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / STATE).exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    subprocess.run(
        [*command, "--out", tmp_path / "cut", "--resume"], check=True, capture_output=True
    )
    same(*(atsnn.from_pretrained(tmp_path / name) for name in ("whole", "cut")))


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


def test_evaluation_draws_the_same_pairs_and_takes_nothing_from_the_caller():
    """With random matching, whatever was drawn before; a number in a document is found again."""
    settings = {"merge_r": 8, "merge_match": "random"}
    model = with_changes(atsnn.from_pretrained("digits"), **settings)
    split = data.load("digits", 32)["test"][:60]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append((evaluate(model, split).loss, atsnn.cost(model, split.images[:8]).sops.total))
        assert torch.equal(torch.get_rng_state(), before)
        with torch.no_grad():
            drawn = model(split.images, return_trace=True).source
        assert not torch.equal(torch.get_rng_state(), before), "outside the caller's seed counts"
        found[-1] += (drawn,)
    assert found[0][:2] == found[1][:2] and not torch.equal(found[0][2], found[1][2])


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
    falling = dataclasses.replace(CONFIG, target=0.5, target_anneal=0.8)
    for progress, budget in ((0.0, 1.0), (0.4, 0.75), (0.6, 0.625), (0.8, 0.5), (1.0, 0.5)):
        loss = training_loss(trace, labels, falling, share, progress)
        torch.testing.assert_close(loss - plain, (share - budget) * trace.ponder_loss)


@pytest.mark.parametrize("score", ["first", "mean", "linear", "constant"])
@pytest.mark.parametrize("halting", ["rectangle", "depth", "sequential"])
def test_where_every_token_stops_after_block_1_scores_have_no_gradient(halting, score):
    """As the warning says, with a budget and without."""
    model = atsnn.ATSpikformer(MODEL.replace(halting=halting, score=score))
    for beta, learns in ((20.0, False), (-2.0, True)):
        nn.init.constant_(model.halting.beta, beta)
        trace = model(torch.rand(8, 1, 8, 8), return_trace=True)
        assert bool(trace.active[1:].any()) == learns
        for target in (0.9, None):
            config = dataclasses.replace(CONFIG, model=model.config, target=target)
            share = float(executed_share(trace))
            loss = training_loss(trace, torch.zeros(8, dtype=torch.int64), config, share)
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert any(float(p.grad.abs().sum()) for p in model.halting.parameters()
                       if p.grad is not None) == learns  # fmt: skip


def test_the_warning_of_halting_everything_fits_the_run(tmp_path):
    told = []
    config = dataclasses.replace(
        CONFIG, model=MODEL.replace(score="constant"), epochs=1, target=0.5
    )
    model, found = train(config, tmp_path / "low", log=told.append)
    assert found.cells == 0.5
    assert told[1:] == [
        "  warning: every token stops after block 1: beta is set for --target 0.5, and with a "
        "lower one more cells run than that; a larger --target lets tokens go on"
    ]
    assert 0.5 < calibrate(model, data.load("digits", 8)["train"], 0.8) <= 0.8
    free = dataclasses.replace(config, target=None)
    assert "--ponder-weight" in _warnings(found, free, True)[0]
    assert _warnings(found, free, True) == _warnings(found, free, False)
    (before,) = _warnings(found, config, False)
    assert "at the end beta is set" in before and "--target-anneal" in before
    some = dataclasses.replace(found, cells_by_block=[1.0, 0.5, 0.0])
    assert _warnings(some, config, True) == ["block 3 is never executed"]
    assert _warnings(some, dataclasses.replace(config, policy="static:2,1"), True) == []


def test_distilling_asks_for_the_checkpoint_s_answers_beside_the_labels():
    torch.manual_seed(0)
    labels, taught = torch.arange(8), torch.rand(8, 10).softmax(1)
    trace = atsnn.ATSpikformer(MODEL)(torch.rand(8, 1, 8, 8), return_trace=True)
    off = dataclasses.replace(CONFIG, model=MODEL.replace(halting=None), label_smoothing=0.0)
    by_hand = trace.logits.double().log_softmax(1)
    for share in (0.25, 1.0):
        config = dataclasses.replace(off, init="plain", distill=share)
        asked = (1 - share) * torch.eye(10)[labels] + share * taught
        loss = training_loss(trace, labels, config, 1.0, taught=taught)
        torch.testing.assert_close(loss.double(), -(asked * by_hand).sum(1).mean())


def test_distilling_alone_never_looks_at_labels(tmp_path):
    plain = dataclasses.replace(CONFIG, model=MODEL.replace(halting=None))
    train(plain, tmp_path / "plain")
    before = (tmp_path / "plain" / "model.safetensors").read_bytes()
    found = {}
    for share in (1.0, 0.5):
        for smoothing in (0.0, 0.9):
            config = dataclasses.replace(
                CONFIG, epochs=1, init=str(tmp_path / "plain"), distill=share,
                label_smoothing=smoothing,
            )  # fmt: skip
            name = f"{share}-{smoothing}"
            model, _ = train(config, tmp_path / name)
            found[name] = torch.cat([p.flatten() for p in model.parameters()])
    assert found["1.0-0.0"].equal(found["1.0-0.9"])
    assert not found["0.5-0.0"].equal(found["0.5-0.9"])
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == before
    with pytest.raises(InvalidValue, match="distill expected init"):
        dataclasses.replace(CONFIG, distill=0.5)


@pytest.mark.parametrize("halting", ["rectangle", "depth", "sequential"])
def test_a_falling_budget_begins_with_all_cells(halting):
    images = data.load("digits", 8)["train"][:2].images
    shares = []
    for anneal in (0.0, 0.5):
        torch.manual_seed(0)
        config = dataclasses.replace(
            CONFIG, model=MODEL.replace(halting=halting, T=512), target_anneal=anneal
        )
        shares.append(float(executed_share(_model(config)(images, return_trace=True))))
    assert shares[0] < 1 == shares[1]


def test_a_falling_budget_ends_at_its_target(tmp_path):
    config = dataclasses.replace(
        CONFIG, epochs=8, batch_size=16, lr=0.05, target=0.6, target_anneal=0.5
    )
    train(config, tmp_path)
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    cells = [epoch["cells"] for epoch in history]
    assert cells[0] > 0.9 and max(cells[-2:]) < 0.75, cells


def test_alpha_and_beta_learn_ten_times_as_fast_without_decay():
    slow, fast = optimizer_of(atsnn.ATSpikformer(MODEL), CONFIG).param_groups
    assert fast["lr"] == 10 * slow["lr"] and fast["weight_decay"] == 0 and len(fast["params"]) == 2


def test_the_linear_score_joins_after_half_the_run(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, model=MODEL.replace(score="linear"), limit=64)
    states = []
    monkeypatch.setattr(
        "atsnn.train.loop.evaluate",
        lambda m, s, f=evaluate: (
            states.append(m.halting.weight.clone() if m.halting else None) or f(m, s)
        ),
    )
    train(config, tmp_path / "scratch")
    assert (states[0] == 0).all() and (states[1] != 0).any()

    # At once where the weights are trained already.
    plain = dataclasses.replace(config, model=MODEL.replace(halting=None))
    train(dataclasses.replace(plain, epochs=1), tmp_path / "plain")
    states.clear()
    train(dataclasses.replace(config, init=str(tmp_path / "plain")), tmp_path / "tuned")
    assert (states[0] != 0).any()


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


# -- what users expect of training ----------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    model = atsnn.ATSpikformer(MODEL)
    config = dataclasses.replace(CONFIG, lr=0.1, warmup=0.2)
    optimizer = optimizer_of(model, config)
    schedule = schedule_of(optimizer, config, 50)
    rates = []
    for _ in range(50):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    slow = torch.tensor(rates)[:, 0]
    assert (slow[:10].diff() > 0).all() and slow.argmax() == 10 and slow.max() == pytest.approx(0.1)
    torch.testing.assert_close(slow[:10], 0.1 * torch.arange(1, 11) / 11)
    assert (slow[10:].diff() < 0).all() and 0 < slow[-1] < 1e-3
    assert all(fast == pytest.approx(10 * rate) for rate, fast in rates)
    middle = slow[30]  # half-way down the cosine
    assert middle == pytest.approx(0.05)


def test_the_average_is_what_is_saved(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    average = moving_average(model, dataclasses.replace(CONFIG, ema=0.75))
    assert moving_average(model, CONFIG) is None
    for value, want in ((4.0, 4.0), (8.0, 5.0), (1.0, 4.0)):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        assert float(average.module.weight.detach()) == want
    config = dataclasses.replace(CONFIG, epochs=1, ema=0.9)
    result, found = train(config, tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    saved = atsnn.from_pretrained(tmp_path)
    same(result, saved)
    assert evaluate(saved, data.load("digits", 8)["test"]) == found
    assert not torch.equal(saved.head.weight, state["model"]["head.weight"])
    assert torch.equal(saved.head.weight, state["average"]["module.head.weight"])


def test_beta_is_set_for_a_share():
    model, images = atsnn.from_pretrained("digits"), data.load("digits", 32)["train"][:128]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = calibrate(model, images, 0.5)
    assert found == evaluate(model, images).cells and 0.46 < found <= 0.5
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["halting.beta"] and model.halting.beta > before["halting.beta"]
    # All that a rectangle can save: three of four blocks.
    assert calibrate(model, images, 0.26) == 0.25
    # From wherever it begins, it ends there.
    model.halting.beta.data.fill_(-5.0)
    assert calibrate(model, images, 0.5) == found
    # A share below the first block's is out of reach: nothing is changed.
    kept = model.halting.beta.clone()
    assert calibrate(model, images, 0.2) == found and torch.equal(model.halting.beta, kept)
    with pytest.raises(InvalidValue, match="halting=None"):
        calibrate(model.without_halting(), images, 0.5)
    with pytest.raises(InvalidValue, match="target must be"):
        calibrate(model, images, 1.5)
    with pytest.raises(InvalidValue, match="got a policy"):
        calibrate(directed(model, "static:4,2,1,1"), images, 0.5)
    with pytest.raises(InvalidValue, match="at least one image"):
        calibrate(model, images[:0], 0.5)
    assert torch.equal(model.halting.beta, kept)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_budget_is_kept(tmp_path, ema):
    # No pull towards it in training: what is kept is kept at the end.
    config = dataclasses.replace(CONFIG, ema=ema, target=0.8, ponder_weight=0.0)
    result, _ = train(config, tmp_path)
    images = splits_of(config)[0]
    share = evaluate(result, images).cells
    assert share <= 0.8
    result.halting.beta.data -= 0.05
    assert evaluate(result, images).cells > 0.8, "no more than it takes"


def test_autocast_to_bfloat16_learns_too(tmp_path):
    config = dataclasses.replace(CONFIG, precision="bf16")
    model, _ = train(config, tmp_path / "low")
    _, _ = train(CONFIG, tmp_path / "full")
    assert model.head.weight.dtype == torch.float32
    logs = [json.loads((tmp_path / n / "training.json").read_text()) for n in ("low", "full")]
    losses = [[epoch["loss"] for epoch in log["history"]] for log in logs]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        dict(halting=None), dict(halting="rectangle", score="linear"), dict(halting="rectangle"),
        dict(halting="depth", score="mean"), dict(halting="sequential", score="constant"),
        dict(halting="rectangle", merge_r=2), dict(halting=None, merge_r=2, merge_match="random"),
        dict(halting="depth", policy="static:2,1"), dict(halting="depth", policy="random:0.7"),
        dict(halting="depth", policy="top:0.5"),
    ],
    ids=str,
)  # fmt: skip
def test_everything_that_halts_or_merges_trains_under_autocast(tmp_path, changes):
    config = with_settings(CONFIG, {"precision": "bf16", "epochs": 1, "limit": 64, **changes})
    losses = []
    for precision in ("bf16", "fp32"):
        train(dataclasses.replace(config, precision=precision), tmp_path / precision)
        log = json.loads((tmp_path / precision / "training.json").read_text())
        losses.append(log["history"][0]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_held_out_images_are_evaluated_and_the_test_images_left_alone(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, validation=50)
    model, found = train(config, tmp_path)
    _, held_out = data.load("digits", 8)["train"].held_out(50)
    assert found == evaluate(model, held_out) and found.images == 50
    (epoch,) = json.loads((tmp_path / "training.json").read_text())["history"]
    assert epoch["validation_accuracy"] == found.accuracy and "test_accuracy" not in epoch


def test_a_plain_spikformer_learns_to_halt(tmp_path):
    plain, _ = train(
        dataclasses.replace(CONFIG, model=MODEL.replace(halting=None), epochs=1), tmp_path / "plain"
    )
    still = dataclasses.replace(CONFIG, lr=1e-12, epochs=1, init=str(tmp_path / "plain"))
    tuned, _ = train(still, tmp_path / "tuned")
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(tuned.get_parameter(name), weight, msg=name)
    assert tuned.halting is not None
    card = (tmp_path / "tuned" / "README.md").read_text()
    first = "    atsnn train --image-size 8 --embed-dim 16 --depth 2 --heads 2"
    assert card.count(first) == 2 and card.count(f"--out {tmp_path / 'plain'}") == 1
    back = dataclasses.replace(
        still, model=MODEL.replace(halting=None), init=str(tmp_path / "tuned")
    )
    assert train(back, tmp_path / "back")[0].halting is None
    deeper = dataclasses.replace(still, model=MODEL.replace(depth=3, embed_dim=32))
    with pytest.raises(
        InvalidValue, match="--init expected the network of the run, got .* missing"
    ):
        train(deeper, tmp_path / "deeper")


def test_the_log_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(CONFIG, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "cells", "lr", "test/accuracy", "test/cells"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 9))
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    logged = [e.value for e in events.Scalars("test/accuracy")]
    assert logged == pytest.approx([epoch["test_accuracy"] for epoch in history])


def launch(folder, *options):
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0", "-m", "atsnn", "train", "--out", folder, *options,
    ]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


DISTRIBUTED = [
    "--image-size", "8", "--embed-dim", "32", "--depth", "3", "--heads", "2", "--timesteps", "2",
    "--epochs", "6", "--lr", "0.01", "--shift", "1", "--target", "0.5",
]  # fmt: skip


def test_two_processes_learn_as_one_does_with_twice_the_batch(tmp_path):
    """Blocks are skipped, statistics are each process's own; the loss falls as it does for one."""
    told = launch(tmp_path / "two", *DISTRIBUTED, "--batch-size", "32")
    assert told.count("epoch ") == 6 and told.count("checkpoint in") == 1, "one of them tells"
    from atsnn import cli

    one = [*DISTRIBUTED, "--batch-size", "64", "--threads", "1", "--out", str(tmp_path / "one")]
    assert cli.main(["train", *one]) == 0
    history = {
        name: json.loads((tmp_path / name / "training.json").read_text())["history"]
        for name in ("one", "two")
    }
    losses = {name: [epoch["loss"] for epoch in epochs] for name, epochs in history.items()}
    assert losses["two"] == pytest.approx(losses["one"], rel=0.12)
    assert losses["one"][-1] < 0.75 * losses["one"][0]
    cells = {name: epochs[-1]["cells"] for name, epochs in history.items()}
    assert cells["two"] == pytest.approx(cells["one"], abs=0.1)


def test_images_are_moved_with_their_maps():
    """Augmentation keeps a pixel and its class together."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 200, (6, 12, 12), generator=generator).to(torch.uint8)
    split = data.Split(maps[:, None].float() / 255, torch.zeros(6, dtype=torch.int64), maps)
    moved = augmented(
        split, dataclasses.replace(CONFIG, shift=3, flip=True), torch.Generator().manual_seed(1)
    )
    assert not torch.equal(moved.maps, maps)
    torch.testing.assert_close(moved.images[:, 0], moved.maps.float() / 255)
    kept = augmented(split, dataclasses.replace(CONFIG, shift=0), generator)
    assert torch.equal(kept.images, split.images)


def test_random_rectangles_are_erased():
    split = data.Split(torch.ones(400, 1, 20, 20), torch.zeros(400, dtype=torch.int64))
    config = dataclasses.replace(CONFIG, shift=0, erase=0.5)
    images = augmented(split, config, torch.Generator().manual_seed(0)).images[:, 0]
    holes = (images == 0).float().mean((1, 2))
    assert 150 < (holes > 0).sum() < 250
    assert holes.max() < 0.35 and 0.08 < holes[holes > 0].mean() < 0.2
    for image in images[holes > 0][:20]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert ((image == 0) == (rows[:, None] & columns[None])).all(), "a rectangle"
