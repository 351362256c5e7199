"""The whole model on Triton's kernels: the native numbers, and who waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from interpreter import RUNS, guard  # noqa: F401
from test_model import VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode

import atsnn
from atsnn import checks
from atsnn.checks import BackendError, InvalidValue
from atsnn.testing import exact_images, exact_model

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]

# The interpreter takes milliseconds a program.
TINY = dict(
    image_size=16, in_channels=1, num_classes=3, embed_dim=16, depth=3, num_heads=2, T=2
)  # fmt: skip
TRAINED = ["rectangle", "halting and merging", "spike-driven", "sequential"]
PADDED = ["rectangle", "depth", "linear score", "last readout", "merging", "halting and merging",
          "merging by threshold", "spike-driven"]  # fmt: skip


def tiny(variant):
    settings = dict(VARIANTS[variant])
    if settings.get("merge_r") == (3, 1):
        settings["merge_r"] = (3, 2)
    model = exact_model(atsnn.SpikformerConfig(**TINY, **settings))
    return model, exact_images(model.config, 2)


@pytest.mark.parametrize("variant", TRAINED)
def test_a_training_step_is_the_native_backends(variant):
    """Forward and running statistics bit for bit, every gradient to a relative 1e-5."""
    model, images = tiny(variant)
    model.train()
    traces, grads, buffers = {}, {}, {}
    for backend in ("native", "triton"):
        twin = copy.deepcopy(model)
        with atsnn.use_backend(backend):
            trace = twin(images, return_trace=True)
            (trace.logits.square().sum() + 3 * trace.ponder_loss).backward()
        traces[backend] = trace
        grads[backend] = {n: p.grad for n, p in twin.named_parameters()}
        buffers[backend] = dict(twin.named_buffers())
    ours, theirs = traces["triton"], traces["native"]
    for name in ("logits", "scores", "active", "depth", "weights", "sizes", "ponder_loss"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert not theirs.active.all() and ours.firing_rates == theirs.firing_rates
    assert all(torch.equal(b, buffers["native"][n]) for n, b in buffers["triton"].items())
    for name, want in grads["native"].items():
        got = grads["triton"][name]
        assert (got is None) == (want is None), name
        if want is not None:
            scale = want.norm()
            if name.endswith("linear.bias"):
                # Before a BatchNorm its gradient is zero but for rounding.
                scale = scale + grads["native"][name.replace("bias", "weight")].norm()
            assert (got - want).norm() <= 1e-5 * scale, name
    assert sum(g is not None and bool(g.any()) for g in grads["native"].values()) > 20


# -- who waits for the device ---------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for the device: values that come to Python or sizes."""

    NAMES = (
        "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique",
        "_assert_async", "repeat_interleave",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "atsnn_triton":
            # Into the launcher, which this mode would otherwise see as one operation.
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        indexed = name in ("index", "index_put") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if indexed or any(name.startswith(known) for known in self.NAMES):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def waits(model, images, monkeypatch):
    """What waits during the blocks; layouts, too, are made by Triton's kernels here."""
    monkeypatch.setattr(checks, "HOST_DEVICES", set())
    for name in ("token_layout", "layout_cells", "moved_rows"):
        monkeypatch.setattr(torch.ops.atsnn, name, getattr(torch.ops.atsnn_triton, name))
    with torch.no_grad(), atsnn.use_backend("triton"), Waits() as mode:
        tokens = model.embed(images)
        mode.found.clear()
        logits = model.forward_tokens(tokens)
    return logits, mode.found


@pytest.mark.parametrize("variant", PADDED)
def test_packed_waits_once_a_block_and_padded_never(variant, monkeypatch):
    model, images = tiny(variant)
    with torch.no_grad():
        want = model(images)
    packed, found = waits(model, images, monkeypatch)
    assert torch.equal(packed, want)
    assert found == ["_local_scalar_dense"] * (model.config.depth - 1), found
    model.execution = "padded"
    padded, found = waits(model, images, monkeypatch)
    assert torch.equal(padded, want)
    assert not found


@pytest.mark.parametrize("beta", [-60.0, 20.0])
def test_padded_when_none_or_all_halt(beta):
    model, images = tiny("halting and merging")
    with torch.no_grad():
        model.halting.beta.fill_(beta)
        want = model(images)
        model.execution = "padded"
        with atsnn.use_backend("triton"):
            assert torch.equal(model(images), want)


def test_padded_sees_new_weights():
    model, images = tiny("rectangle")
    model.execution = "padded"
    with torch.no_grad(), atsnn.use_backend("triton"):
        before = model(images)
        model.block[0].mlp.fc1_bn.bias.add_(1.0)
        after = model(images)
        model.execution = "packed"
        assert torch.equal(model(images), after) and not torch.equal(before, after)


def test_padded_is_refused_where_it_cannot_be():
    model, images = tiny("rectangle")
    model.execution = "padded"
    with pytest.raises(BackendError, match="execution='padded' needs Triton's kernels, got"):
        model(images)
    with atsnn.use_backend("triton"):
        with pytest.raises(InvalidValue, match="without a trace, got return_trace=True"):
            model(images, return_trace=True)
        with pytest.raises(InvalidValue, match="without a trace, got a model in training"):
            model.train()(images)
    sequential, _ = tiny("sequential")
    with pytest.raises(InvalidValue, match="got halting='sequential'"):
        sequential.execution = "padded"
