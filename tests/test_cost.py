"""Costs against hand counts."""

from __future__ import annotations

import pytest
import torch

import atsnn
from atsnn.checks import InvalidType
from atsnn.cost import cost
from atsnn.testing import exact_images, exact_model

B, T, C, L, heads, d, N, side = 3, 2, 16, 3, 2, 8, 4, 8


def build(**changes):
    return exact_model(
        atsnn.SpikformerConfig(
            image_size=side, in_channels=1, num_classes=5, embed_dim=C, depth=L, num_heads=heads,
            T=T, **changes,
        )
    )  # fmt: skip


def test_dense_flops_by_hand():
    found = cost(build(), torch.rand(B, 1, side, side))
    macs = B * 64 * 9 * 1 * 2  # first convolution: a still image, once
    macs += B * T * 64 * 9 * (2 * 4 + 4 * 8)  # two more at 8x8
    macs += B * T * 16 * 9 * 8 * 16  # at 4x4 after the first pooling
    macs += B * T * 4 * 9 * 16 * 16  # position, at 2x2
    assert found.flops.stem == 2 * macs
    rows = B * T * N
    # N = 4 tokens < d = 8 channels a head: (q k^T) v is the cheaper order.
    inner = B * T * heads * N * N * d
    assert found.flops.attention == L * 2 * (4 * rows * C * C + 2 * inner)
    assert found.flops.mlp == L * 2 * 2 * rows * C * 4 * C
    assert found.flops.head == 2 * B * C * 5
    assert found.flops.halting == found.flops.merging == 0
    assert found.flops.total == sum(dict(found.flops).values())
    assert torch.equal(found.cells, torch.full((L, T), B * N))
    assert found.dense.flops == found.flops and found.dense.sops == found.sops


def test_video_runs_the_first_convolution_every_timestep():
    model = build()
    still = cost(model, torch.rand(B, 1, side, side)).flops.stem
    video = cost(model, torch.rand(T, B, 1, side, side)).flops.stem
    assert video - still == 2 * (T - 1) * B * 64 * 9 * 2


@pytest.mark.parametrize("accumulator", ["rectangle", "depth", "sequential"])
def test_halting_saves_in_proportion_to_cells(accumulator):
    model = build(halting=accumulator)
    images = exact_images(model.config, B)
    found = cost(model, images)
    with torch.no_grad():
        active = model(images, return_trace=True).active
    assert torch.equal(found.cells, active.sum((2, 3)))
    share = float(active.double().mean())
    assert 0 < share < 1
    assert found.flops.mlp == pytest.approx(share * found.dense.flops.mlp)
    assert found.flops.stem == found.dense.flops.stem
    tokens = active.sum(-1).flatten().tolist()
    inner = sum(heads * min(n * n * d, n * d * d) for n in tokens)
    assert found.flops.attention == 2 * (4 * sum(tokens) * C * C + 2 * inner)


def test_sops_and_energy_follow_the_firing_rates():
    model = build()
    images = exact_images(model.config, B)
    found = cost(model, images)
    with torch.no_grad():
        rates = model(images, return_trace=True).firing_rates
    rows = B * T * N
    sops = sum(
        rows * C * 4 * C * (rates[f"block.{b}.mlp.input"] + rates[f"block.{b}.mlp.fc1_lif"])
        for b in range(L)
    )
    assert found.sops.mlp == pytest.approx(sops)
    assert found.energy_pj.mlp == pytest.approx(0.9 * sops)
    assert found.sops.head == 0
    assert found.energy_pj.head == pytest.approx(4.6 * found.flops.head / 2)
    first = B * 64 * 9 * 2
    assert found.energy_pj.stem == pytest.approx(4.6 * first + 0.9 * found.sops.stem)


def test_merging_costs_and_saves():
    found = cost(build(merge_r=1), torch.rand(B, 1, side, side))
    assert found.flops.merging > 0 and found.dense.flops.merging == 0
    assert found.flops.mlp < found.dense.flops.mlp


def test_cost_leaves_the_model_as_it_was_and_refuses_others():
    model = build().train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    cost(model, torch.rand(B, 1, side, side))
    assert model.training
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with pytest.raises(InvalidType, match="must be an ATSpikformer, got Linear"):
        cost(torch.nn.Linear(2, 2), torch.rand(1))
