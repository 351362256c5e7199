"""Exported programs give the model's bits, on other batches and after a file."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import atsnn
from atsnn.checks import InvalidType, InvalidValue
from atsnn.export import export_model
from atsnn.testing import exact_images, exact_model

SMALL = dict(image_size=16, in_channels=2, num_classes=5, embed_dim=32, depth=2, num_heads=4, T=2)
VARIANTS = {
    "plain": {},
    "rectangle": dict(halting="rectangle"),
    "depth": dict(halting="depth", score="mean"),
    "sequential": dict(halting="sequential"),
    "last readout": dict(halting="rectangle", readout="last", score="linear"),
    "merging": dict(merge_r=2),
    "halting and merging": dict(halting="rectangle", merge_r=3),
    "merging by threshold": dict(halting="depth", merge_threshold=0.75, merge_sizes=False),
    "spike-driven": dict(attention="sdsa", halting="rectangle", merge_r=1),
}


def model_of(variant, **changes):
    return exact_model(atsnn.SpikformerConfig(**SMALL, **{**VARIANTS[variant], **changes}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_program_gives_the_models_bits(variant, tmp_path):
    model = model_of(variant)
    program = export_model(model, exact_images(model.config, 3))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert model.execution == "packed"
    for batch in (0, 1, 7):
        images = exact_images(model.config, batch, seed=batch)
        with torch.no_grad():
            want = model(images)
            assert torch.equal(program.module()(images), want)
            assert torch.equal(loaded.module()(images), want)


@pytest.mark.parametrize("variant", ["rectangle", "sequential", "halting and merging"])
@pytest.mark.parametrize("beta", [-30.0, 30.0], ids=["none-halt", "all-halt"])
def test_no_cell_or_every_cell_halts(variant, beta):
    """One program for each: which cells are active is not in the graph."""
    model = model_of(variant)
    images = exact_images(model.config, 4)
    program = export_model(model, images).module()
    with torch.no_grad():
        program.get_parameter("halting.beta").fill_(beta)
        model.halting.beta.fill_(beta)
        trace = model(images, return_trace=True)
        # Of the timesteps of a block that follows all or none run.
        assert trace.active[1].any() == (beta < 0)
        assert torch.equal(program(images), trace.logits)


@pytest.mark.parametrize("variant", ["rectangle", "sequential"])
def test_videos(variant):
    model = model_of(variant)
    program = export_model(model, exact_images(model.config, 1, T=2)).module()
    videos = exact_images(model.config, 5, T=2, seed=2)
    with torch.no_grad():
        assert torch.equal(program(videos), model(videos))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_examples_do_not_fix_the_batch(batch):
    model = model_of("rectangle")
    program = export_model(model, exact_images(model.config, 1)[:batch]).module()
    images = exact_images(model.config, 3)
    with torch.no_grad():
        assert torch.equal(program(images), model(images))


def test_float64():
    model = model_of("halting and merging").double()
    images = exact_images(model.config, 3).double()
    with torch.no_grad():
        assert torch.equal(export_model(model, images[:2]).module()(images), model(images))


def test_the_reference_can_be_exported():
    model = model_of("plain")
    images = exact_images(model.config, 2)
    with torch.no_grad(), atsnn.use_backend("reference"):
        program = export_model(model, images)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any(name.startswith("atsnn.neuron") for name in names)
    with torch.no_grad():
        assert torch.equal(program.module()(images), model(images))


def test_a_program_is_loaded_by_a_process_that_knows_the_operators_only(tmp_path):
    model = model_of("halting and merging")
    images = exact_images(model.config, 2)
    torch.export.save(export_model(model, images), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "data.pt")
    script = (
        "import sys, torch, atsnn.ops\n"
        "program = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "images, want = torch.load(sys.argv[1] + '/data.pt')\n"
        "assert torch.equal(program(images), want)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_other_shapes_are_refused_by_the_program():
    model = model_of("rectangle")
    program = export_model(model, exact_images(model.config, 2)).module()
    for shape in ((2, 2, 20, 20), (2, 3, 16, 16)):
        with pytest.raises(AssertionError, match="Guard failed"):
            program(torch.zeros(shape))


@pytest.mark.parametrize(
    "make, example, error, message",
    [
        (lambda: nn.Linear(2, 2), torch.zeros(1, 2, 16, 16), InvalidType, "an ATSpikformer, got"),
        (lambda: model_of("plain").train(), torch.zeros(1, 2, 16, 16), InvalidValue, "in eval"),
        (
            lambda: model_of("merging", merge_match="random"), torch.zeros(1, 2, 16, 16),
            InvalidValue, "random partners are drawn anew at each call",
        ),
        (lambda: model_of("plain"), torch.zeros(1, 2, 8, 8), InvalidValue, "images must have"),
        (lambda: model_of("plain"), torch.zeros(1, 2, 16, 16).double(), InvalidType, "dtype"),
        (lambda: model_of("plain"), None, InvalidType, "images must be a torch.Tensor, got None"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(make, example, error, message):
    with pytest.raises(error, match=f"export_model: .*{message}"):
        export_model(make(), example)
