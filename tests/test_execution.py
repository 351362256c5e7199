"""Packed and masked execution give the same numbers, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from test_model import SMALL, VARIANTS, small

import atsnn
import atsnn.functional as F
from atsnn.checks import InvalidValue
from atsnn.compare import compare_executions
from atsnn.measure import kept_bytes
from atsnn.testing import exact_images, exact_model

SAME = (
    "logits", "scores", "depth", "active", "weights", "sizes", "block_sizes", "source",
    "ponder_loss", "firing_rates",
)  # fmt: skip


def run(model, execution, images):
    model.execution = execution
    return model(images, return_trace=True)


def assert_same(ours, theirs):
    for name in SAME:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def test_packed_is_the_default():
    model = exact_model(small("rectangle"))
    assert model.execution == "packed"
    with pytest.raises(InvalidValue, match="execution must be one of"):
        model.execution = "sparse"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evaluation_is_the_same_bit_for_bit(variant, seed):
    model = exact_model(small(variant), seed)
    images = exact_images(model.config, 5, seed + 7)
    with torch.no_grad():
        packed = run(model, "packed", images)
        assert_same(packed, run(model, "masked", images))
        if model.config.adaptive:
            assert not packed.active.all(), "something must have halted or merged"
        assert torch.equal(packed.logits, model(images))


@pytest.mark.parametrize("accumulator", ["rectangle", "depth"])
@pytest.mark.parametrize("beta", [-60.0, 2.0, 20.0])
def test_the_same_when_all_none_or_nearly_all_halt(accumulator, beta):
    model = exact_model(atsnn.SpikformerConfig(**SMALL, halting=accumulator, merge_r=1))
    images = exact_images(model.config, 3)
    with torch.no_grad():
        model.halting.beta.fill_(beta)
        assert_same(run(model, "packed", images), run(model, "masked", images))


@pytest.mark.parametrize("T", [1, 5])
def test_the_same_on_video(T):
    model = exact_model(atsnn.SpikformerConfig(**{**SMALL, "T": T}, halting="rectangle", merge_r=2))
    images = exact_images(model.config, 2, T=T)
    with torch.no_grad():
        assert_same(run(model, "packed", images), run(model, "masked", images))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_the_same(variant, dtype, close):
    """The forward bit for bit, every parameter's gradient to a relative 1e-5 (1e-12)."""
    model = exact_model(small(variant)).train().to(dtype)
    images = exact_images(model.config, 4).to(dtype)
    traces, grads, buffers = {}, {}, {}
    for execution in ("packed", "masked"):
        twin = copy.deepcopy(model)
        trace = run(twin, execution, images)
        (trace.logits.square().sum() + 3 * trace.ponder_loss).backward()
        traces[execution] = trace
        grads[execution] = {n: p.grad for n, p in twin.named_parameters()}
        buffers[execution] = dict(twin.named_buffers())
    assert_same(traces["packed"], traces["masked"])
    assert all(torch.equal(b, buffers["masked"][n]) for n, b in buffers["packed"].items())
    for name, want in grads["masked"].items():
        got = grads["packed"][name]
        assert (got is None) == (want is None), name
        if want is None:
            continue
        scale = want.norm()
        if name.endswith("linear.bias"):
            # Before a BatchNorm that takes the mean off its gradient is zero but for rounding.
            scale = scale + grads["masked"][name.replace("bias", "weight")].norm()
        assert (got - want).norm() <= close * scale, (name, got, want)


def test_few_active_rows_leave_running_statistics_alone_in_both_forms():
    """Fewer than 32 rows: running statistics are used and not updated."""
    model = exact_model(small("rectangle")).train()
    images = exact_images(model.config, 1)  # 48 cells in block 1, fewer after it
    found = {}
    for execution in ("packed", "masked"):
        twin = copy.deepcopy(model)
        trace = run(twin, execution, images)
        rows = trace.active.sum((1, 2, 3)).tolist()
        assert rows[0] >= 32 > rows[2] > 0
        found[execution] = trace, dict(twin.named_buffers())
        before = dict(model.named_buffers())
        name = "block.2.mlp.fc1_bn.running_mean"
        assert torch.equal(found[execution][1][name], before[name])
    assert_same(found["packed"][0], found["masked"][0])


@pytest.mark.parametrize("variant", ["rectangle", "halting and merging", "sequential"])
def test_random_weights_agree_but_for_flipped_spikes(variant):
    """Sums come in another order, so a potential may cross its threshold: rarely, and counted."""
    torch.manual_seed(0)
    config = small(variant).replace(embed_dim=64, num_heads=4)
    model = atsnn.ATSpikformer(config).eval()
    with torch.no_grad():
        for bn in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)):
            bn.running_var.uniform_(0.01, 0.05)
            bn.bias.uniform_(0.0, 0.6)
        images = torch.rand(8, 2, 16, 16)
        packed, masked = run(model, "packed", images), run(model, "masked", images)
    flipped = [
        name
        for name, rate in packed.firing_rates.items()
        if abs(rate - masked.firing_rates[name]) > 1e-9
    ]
    print(f"{variant}: layers with flipped spikes: {flipped or 'none'}")
    if not flipped:
        torch.testing.assert_close(packed.logits, masked.logits, rtol=1e-5, atol=1e-6)
    assert (packed.active != masked.active).float().mean() < 0.01


def test_memory_and_work_follow_the_cells():
    """What the backward keeps of the blocks falls in proportion with the executed cells."""
    model = atsnn.ATSpikformer(
        atsnn.SpikformerConfig(**{**SMALL, "depth": 4, "embed_dim": 64}, halting="rectangle")
    ).train()
    tokens = torch.randint(0, 3, (3, 8, 16, 64)).float()

    def saved(beta):
        with torch.no_grad():
            model.halting.beta.fill_(beta)
        traces = []
        kept = kept_bytes(
            lambda: traces.append(model.forward_tokens(tokens, return_trace=True)),
            model.parameters(),
        )
        return kept, float(traces[0].active.float().mean())

    all_bytes, all_share = saved(-60.0)
    some_bytes, some_share = saved(0.0)
    assert all_share == 1.0 and 0.2 < some_share < 0.6
    assert some_bytes / all_bytes == pytest.approx(some_share, abs=0.05)


def test_comparison_counts_what_differs(monkeypatch):
    model = exact_model(small("rectangle"))
    images = exact_images(model.config, 5)
    same = compare_executions(model, images, batch=2)
    assert str(same) == "packed = masked on 5 images (bit for bit, no flipped spike)"
    assert same.spikes > 0 and model.execution == "packed"
    attention = F.spiking_attention
    # Attention that gives nothing on packed rows.
    monkeypatch.setattr(
        F,
        "spiking_attention",
        lambda q, k, v, **settings: attention(q, k, v, **settings) * (settings["layout"] is None),
    )
    found = compare_executions(model, images)
    assert found.spikes == same.spikes and found.flipped > 0 and found.logits > 0
    assert "spikes flipped" in str(found) and str(found.flipped) in str(found)
