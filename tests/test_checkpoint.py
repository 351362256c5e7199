"""Checkpoints: what is written comes back, and nothing else is accepted."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shlex
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import atsnn
from atsnn import checkpoint, data
from atsnn.card import model_card
from atsnn.checkpoint import CARD, CONFIG, PACKAGED, WEIGHTS
from atsnn.checks import CheckpointError, InvalidValue
from atsnn.testing import exact_images, exact_model
from atsnn.train import TrainConfig, evaluate
from atsnn.train.options import add_options, command_of, config_of
from atsnn.train.settings import with_settings

CONFIGURATION = atsnn.SpikformerConfig(
    image_size=8, in_channels=1, num_classes=3, embed_dim=16, depth=2, num_heads=2, T=2,
    halting="rectangle", score="linear",
)  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    model = exact_model(CONFIGURATION)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_round_trip(saved):
    model, folder = saved
    again = atsnn.from_pretrained(folder)
    assert again.config == model.config and not again.training
    assert again.config.bn_eps == 2.0**-10, "not the default, which a loader might take"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    images = exact_images(CONFIGURATION, 3)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
    assert sorted(p.name for p in folder.iterdir()) == [CARD, CONFIG, WEIGHTS]


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_readable_as_the_umask_has_it(saved, tmp_path, mask):
    before = os.umask(mask)
    try:
        saved[0].save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys((CARD, CONFIG, WEIGHTS), 0o666 & ~mask)


def test_string_and_path_are_both_taken(saved):
    model, folder = saved
    assert atsnn.from_pretrained(str(folder)).config == model.config


def test_a_model_that_its_configuration_does_not_describe_is_not_saved(tmp_path):
    model = exact_model(CONFIGURATION)
    model.block[0].mlp.fc1_bn.eps = 0.5
    with pytest.raises(InvalidValue, match="must have the configuration's bn_eps = .* eps = 0.5"):
        model.save_pretrained(tmp_path)


def damage_truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def damage_pickle(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weights": [1, 2]}))


def damage_json(change):
    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


DAMAGES = {
    "truncated": (damage_truncate, "expected a safetensors file"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "expected a safetensors file"),
    "pickled": (damage_pickle, "expected a safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "expected a file model.safetensors, got none"),
    "no config": (lambda f: (f / CONFIG).unlink(), "expected a file config.json, got none"),
    "not json": (lambda f: (f / CONFIG).write_text("{"), "expected JSON"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "expected format 'atsnn', got 'list'"),
    "not ours": (
        damage_json(lambda c: c.update(format="bert")), "expected format 'atsnn', got 'bert'",
    ),
    "of another version": (
        damage_json(lambda c: c.update(version=2)), "expected checkpoint version 1, got 2",
    ),
    "no model": (damage_json(lambda c: c.pop("model")), "expected a mapping"),
    "an unknown setting": (damage_json(lambda c: c["model"].update(heads=3)), "got heads"),
    "a bad setting": (damage_json(lambda c: c["model"].update(T=0)), "T must be a number >= 1"),
    "a setting that is a list": (
        damage_json(lambda c: c["model"].update(stem=["cifar"])), r"stem must be .* got \['cif",
    ),
    "a setting of another type": (damage_json(lambda c: c["model"].update(T="4")), "got '4'"),
    "other shapes": (
        damage_json(lambda c: c["model"].update(num_classes=4)),
        r"head.weight must have shape \(4, 16\), got \(3, 16\)",
    ),
    "missing tensors": (damage_tensors(lambda t: t.pop("head.bias")), "1 missing"),
    "foreign tensors": (
        damage_tensors(lambda t: t.update(x=torch.zeros(1))), r"1 foreign \['x'\]",
    ),
    "not a number": (
        damage_tensors(lambda t: t["head.bias"].fill_(float("nan"))), "head.bias must be finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints_are_refused(saved, name):
    _, folder = saved
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        atsnn.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["digit", "no/such/folder", "", "./nowhere/at/all", "/dev/null/none"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(
        CheckpointError, match=r"expected a packaged name \(digits, digits-constant"
    ):
        atsnn.from_pretrained(name)


def test_a_file_is_refused(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match="got the file"):
        atsnn.from_pretrained(folder / WEIGHTS)


def test_hub_ids_go_to_the_hub_client(saved, monkeypatch):
    import huggingface_hub

    model, folder = saved
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
        if repo_id.startswith("missing/"):
            raise OSError("no such repository\nsecond line")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert atsnn.from_pretrained("someone/spikformer").config == model.config
    assert asked == {"repo_id": "someone/spikformer", "allow_patterns": [CONFIG, WEIGHTS]}
    with pytest.raises(CheckpointError, match="could not be fetched .* no such repository$"):
        atsnn.from_pretrained("missing/model")


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_checkpoints_load_and_are_small(name):
    model = atsnn.from_pretrained(name)
    assert model.config.image_size == (28 if name == "fashion-mnist" else 32)
    size = sum(p.stat().st_size for p in PACKAGED[name].iterdir())
    assert size < 3 * 2**20


# -- the hub --------------------------------------------------------------------------------------


class Hub:
    """A hub on this machine: what would go up is kept, and what is asked for is looked up."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, **_):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://example.org/{repo_id}"

    def snapshot_download(self, repo_id, allow_patterns, revision=None):
        if revision not in (None, "main"):
            raise FileNotFoundError(f"no revision {revision}")
        return str(self.folder / repo_id)


def test_a_model_is_pushed_to_the_hub_and_pulled(saved, tmp_path, monkeypatch):
    model, _ = saved
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda token=None: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    model.extra = {"data": "digits", "test_accuracy": 0.5}
    assert model.push_to_hub("me/mine") == "https://example.org/me/mine"
    for again in (
        atsnn.from_pretrained("me/mine"),
        atsnn.ATSpikformer.from_pretrained("me/mine", revision="main"),
    ):
        assert again.config == model.config and again.extra == model.extra
        assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match="no revision 3"):
        atsnn.from_pretrained("me/mine", revision="3")
    model.save_pretrained(tmp_path / "both", push_to_hub=True, repo_id="me/other")
    assert (tmp_path / "both" / WEIGHTS).is_file() and (hub.folder / "me/other" / CARD).is_file()


def test_the_card_tells_what_is_known(tmp_path):
    config = TrainConfig(
        CONFIGURATION, epochs=3, flip=True, target=None, init="plain", policy=None, clip=2.0
    )
    extra = {"data": "digits", "seed": 3, "test_accuracy": 0.9123, "test_cells": 0.5,
             "command": command_of(config)}  # fmt: skip
    checkpoint.save_pretrained(exact_model(CONFIGURATION), tmp_path, extra)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "atsnn" and card.data.pipeline_tag == "image-classification"
    for text in ("91.23 %", "50.00 %", "| seed | 3 |", "--flip", "--init plain", "--no-budget",
                 "# and clip=2.0", "Limits", "halt over blocks and timesteps"):  # fmt: skip
        assert text in card.text, text
    (tmp_path / CARD).write_text("by hand")
    checkpoint.save_pretrained(exact_model(CONFIGURATION), tmp_path, extra)
    assert (tmp_path / CARD).read_text() == "by hand"
    plain = ModelCard(model_card(CONFIGURATION.replace(halting=None)))
    assert "Every block runs for every token" in plain.text and "Training" not in plain.text


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(halting=None), dict(policy="static:2,1", halting="depth"), dict(target=None),
     dict(target=0.7, target_anneal=0.5, ponder_warmup=0.25),
     dict(init="digits", distill=0.5, freeze_norms=True),
     dict(ema=0.9, erase=0.25, validation=7, precision="bf16", data="scenes-digits", task="pixels",
          num_classes=11, image_size=64)],
    ids=str,
)  # fmt: skip
def test_the_command_of_a_run_makes_it(changes):
    base = TrainConfig(CONFIGURATION.replace(num_classes=10), epochs=7, seed=5, lr=0.003)
    config = with_settings(base, changes)
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = shlex.split(command_of(config))
    assert words[:2] == ["atsnn", "train"]
    assert config_of(parser.parse_args(words[2:])) == config


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_what_ships_has_a_card(name):
    """Data, command, seed, accuracy and share of cells; the command is one of this version."""
    folder = PACKAGED[name]
    extra = checkpoint.read_config(folder)["extra"]
    model = atsnn.from_pretrained(name)
    assert (folder / CARD).read_text() == model_card(model.config, extra, name)
    assert {"data", "command", "seed", "epochs", "test_accuracy", "test_cells"} <= set(extra)
    words = shlex.split(extra["command"])
    assert words[:2] == ["atsnn", "train"]
    parser = argparse.ArgumentParser()
    add_options(parser)
    config = config_of(parser.parse_known_args(words[2:])[0])
    assert config.model == model.config and config.data == extra["data"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6


def test_the_shipped_fashion_model_does_what_its_card_says():
    try:
        split = data.load("fashion-mnist", 28)["test"]
    except data.DataError as error:
        pytest.skip(f"needs the images: {error}")
    extra = checkpoint.read_config("fashion-mnist")["extra"]
    model = atsnn.from_pretrained("fashion-mnist")
    found = evaluate(model, split)
    # Sums of floats depend on the machine: a few images of 10,000 may change.
    assert found.accuracy == pytest.approx(extra["test_accuracy"], abs=0.002)
    assert found.cells == pytest.approx(extra["test_cells"], abs=0.005)
    with torch.no_grad():
        engine = atsnn.freeze(model)(split[:64].images)
    assert torch.equal(engine.argmax(1), model(split[:64].images).argmax(1))
