"""Spiking and spike-driven self-attention against their definitions."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import atsnn.functional as F
import atsnn.nn as ann
from atsnn import reference, use_backend
from atsnn.checks import BackendError, InvalidType, InvalidValue


def spikes(*shape, rate=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < rate).float()


@given(
    T=st.integers(0, 3), B=st.integers(0, 3), N=st.integers(0, 9), heads=st.integers(1, 3),
    d=st.integers(1, 9), sized=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_spiking_attention_is_its_definition_in_both_orders(T, B, N, heads, d, sized, seed):
    q, k, v = (spikes(T, B, N, heads * d, seed=seed + i) for i in range(3))
    sizes = torch.randint(1, 5, (B, N)).float() if sized else None
    want = torch.zeros(T, B, N, heads * d)
    for t in range(T):
        for b in range(B):
            for head in range(heads):
                cut = slice(head * d, (head + 1) * d)
                for i in range(N):
                    for j in range(N):
                        weight = 1.0 if sizes is None else sizes[b, j]
                        dot = (q[t, b, i, cut] * k[t, b, j, cut]).sum()
                        want[t, b, i, cut] += 0.125 * dot * weight * v[t, b, j, cut]
    for order in ("q_kv", "qk_v"):
        got = reference.spiking_attention(q, k, v, heads, 0.125, sizes, order)
        assert torch.equal(got, want)
    assert torch.equal(F.spiking_attention(q, k, v, num_heads=heads, sizes=sizes), want)


def test_the_cheaper_order_is_taken():
    assert reference.attention_order(tokens=64, head_dim=32) == "q_kv"
    assert reference.attention_order(tokens=4, head_dim=32) == "qk_v"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_storage_sums_in_float32_and_rounds_once(dtype):
    ones = torch.ones(1, 1, 1100, 64, dtype=dtype)
    q, k, v = (spikes(1, 1, 1100, 64, rate=0.9, seed=i).to(dtype) for i in range(3))
    sizes = torch.full((1, 1100), 257.0)
    for a, b, c, scale in ((ones, ones, ones, 1 / 128), (q, k, v, 0.125 / 1024)):
        want = reference.spiking_attention(a.float(), b.float(), c.float(), 2, scale, sizes)
        for order in ("q_kv", "qk_v"):
            got = reference.spiking_attention(a, b, c, 2, scale, sizes, order)
            assert torch.equal(got, want.to(dtype))


def test_autocast_does_not_round_the_sums():
    q, k, v = (spikes(2, 1, 64, 64, rate=0.7, seed=i) for i in range(3))
    want = F.spiking_attention(q, k, v, num_heads=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.spiking_attention(q, k, v, num_heads=2)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@given(st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_spike_driven_attention_is_its_definition(T, sized, seed):
    B, N, C = 2, 5, 6
    q, k, v = (spikes(T, B, N, C, rate=0.5, seed=seed + i) for i in range(3))
    sizes = torch.randint(1, 4, (B, N)).float() if sized else torch.ones(B, N)
    potential = torch.zeros(B, C)
    want = torch.zeros(T, B, N, C)
    for t in range(T):
        total = (k[t] * v[t] * sizes[:, :, None]).sum(1)
        potential = potential + (total - potential) / 2
        fires = (potential >= 0.5).float()
        want[t] = q[t] * fires[:, None]
        potential = potential * (1 - fires)
    got, state = F.spike_driven_attention(
        q, k, v, num_heads=2, sizes=sizes if sized else None, return_state=True
    )
    assert torch.equal(got, want)
    assert torch.equal(state.squeeze(1), potential)


def test_spike_driven_attention_streams():
    q, k, v = (spikes(6, 2, 5, 4, seed=i) for i in range(3))
    whole = F.spike_driven_attention(q, k, v, num_heads=1)
    state, parts = None, []
    for cut in (slice(0, 2), slice(2, 6)):
        out, state = F.spike_driven_attention(
            q[cut], k[cut], v[cut], num_heads=1, state=state, return_state=True
        )
        parts.append(out)
    assert torch.equal(torch.cat(parts), whole)


def test_inactive_tokens_take_no_part():
    """Zeroed rows give what the attention over the others alone gives."""
    q, k, v = (spikes(2, 1, 8, 12, seed=i) for i in range(3))
    keep = torch.tensor([0, 2, 3, 7])
    mask = torch.zeros(8).index_fill_(0, keep, 1.0)[:, None]
    for function in (F.spiking_attention, F.spike_driven_attention):
        masked = function(q * mask, k * mask, v * mask, num_heads=3)
        alone = function(q[:, :, keep], k[:, :, keep], v[:, :, keep], num_heads=3)
        assert torch.equal(masked[:, :, keep], alone)
        assert masked.count_nonzero() == alone.count_nonzero()


def test_gradcheck():
    q, k, v = (torch.rand(2, 1, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes = torch.tensor([[1.0, 2.0, 1.0, 3.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *a: F.spiking_attention(*a, num_heads=2, sizes=sizes), (q, k, v)
    )


@pytest.mark.parametrize("layer", [ann.SpikingSelfAttention, ann.SpikeDrivenSelfAttention])
def test_modules_give_spikes_and_gradients(layer):
    torch.manual_seed(0)
    module = layer(12, 3)
    x = spikes(3, 2, 16, 12).requires_grad_()
    out = module(x)
    assert out.shape == x.shape and set(out.unique().tolist()) <= {0.0, 1.0}
    out.sum().backward()
    # The biases before a BatchNorm have none; everything else is reached.
    reached = [p for name, p in module.named_parameters() if not name.endswith("linear.bias")]
    assert all(p.grad is not None for p in reached) and x.grad.abs().sum() > 0
    with pytest.raises(InvalidValue, match=r"got \(3, 2, 16, 11\)"):
        module(x[..., :11])


@pytest.mark.parametrize("op", [F.spiking_attention, F.spike_driven_attention])
def test_bad_input_is_refused(op, monkeypatch):
    monkeypatch.setattr("atsnn.ops.triton.package_missing", "it is not here")
    q = torch.zeros(2, 3, 4, 6)
    with pytest.raises(InvalidValue, match=r"k must have the shape of q, \(2, 3, 4, 6\), got"):
        op(q, q[..., :5], q, num_heads=2)
    with pytest.raises(InvalidType, match="v must have the dtype of q, torch.float32"):
        op(q, q, q.double(), num_heads=2)
    with pytest.raises(InvalidValue, match="num_heads must divide the 6 channels, got 4"):
        op(q, q, q, num_heads=4)
    with pytest.raises(InvalidValue, match=r"q must have shape \(T, B, N, C\)"):
        op(q[0], q[0], q[0], num_heads=2)
    with pytest.raises(InvalidValue, match=r"sizes must have shape \(B, N\) = \(3, 4\)"):
        op(q, q, q, num_heads=2, sizes=torch.ones(4, 3))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="sizes must be finite"):
            op(q, q, q, num_heads=2, sizes=torch.full((3, 4), bad))
    with pytest.raises(InvalidValue, match="sizes must be at least 0, got -1"):
        op(q, q, q, num_heads=2, sizes=-torch.ones(3, 4))
    with pytest.raises(BackendError, match="cannot serve the call: it is not here"):
        op(q, q, q, num_heads=2, backend="triton")
    with pytest.raises(BackendError, match="cannot serve the call"), use_backend("triton"):
        op(q, q, q, num_heads=2)
    with pytest.raises(InvalidType, match="q must be one of float32"):
        op(q.int(), q.int(), q.int(), num_heads=2)
