"""Triton's kernels under its interpreter: the same cases, the same bits, and no address outside."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from cases import assert_same, layouts
from hypothesis import given
from interpreter import FEW, RUNS, guard  # noqa: F401
from test_rows import SEEDS, assert_gradients_close

from atsnn.cases import DIFFERENTIABLE, OPERATIONS, Numbers, gradients, ragged

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]

CHANNELS = st.sampled_from([1, 3, 8, 17])


@pytest.mark.parametrize("name", OPERATIONS)
@FEW
@given(layout=layouts(), channels=CHANNELS, double=st.booleans(), seed=SEEDS)
def test_triton_is_the_reference(name, layout, channels, double, seed):
    operation = OPERATIONS[name]
    dtype = torch.float64 if double else torch.float32
    inputs = operation.make(Numbers(seed), layout, operation.channels(channels), dtype)
    before = {name: x.clone() for name, x in inputs.items()}
    want = operation.dense("reference", layout, **inputs)
    for form in ("packed", "dense"):
        assert_same(getattr(operation, form)("triton", layout, **inputs), want, form)
    assert_same(tuple(inputs.values()), tuple(before.values()), "inputs are left as they were")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@FEW
@given(layout=layouts(), channels=CHANNELS, double=st.booleans(), seed=SEEDS,
       which=st.integers(1, 3))  # fmt: skip
def test_gradients_are_the_references(name, layout, channels, double, seed, which):
    operation = OPERATIONS[name]
    dtype = torch.float64 if double else torch.float32
    inputs = operation.make(Numbers(seed), layout, operation.channels(channels), dtype)
    found = {
        (form, backend): gradients(
            operation, form, backend, layout, inputs, Numbers(seed + 1), which
        )[1]
        for form in ("packed", "dense")
        for backend in ("triton", "reference")
    }
    want = found.pop(("dense", "reference"))
    for (form, backend), got in found.items():
        assert_gradients_close(got, want, f"{form} {backend}")


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("shape", "channels"), [((2, 1, 70), 20), ((1, 1, 5), 150), ((17, 1, 3), 6)]
)
def test_the_same_beyond_one_block(name, shape, channels):
    """Many tokens, many channels, many timesteps."""
    operation, layout = OPERATIONS[name], ragged(1, *shape)
    inputs = operation.make(Numbers(2), layout, operation.channels(channels), torch.float32)
    want, want_grads = gradients(operation, "packed", "reference", layout, inputs, Numbers(5))
    got, got_grads = gradients(operation, "packed", "triton", layout, inputs, Numbers(5))
    assert_same(got, want)
    assert_gradients_close(got_grads, want_grads, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_low_precision_is_float32_rounded_once(name, dtype):
    operation, layout = OPERATIONS[name], ragged(6, 3, 2, 7)
    inputs = operation.make(Numbers(3), layout, operation.channels(9), dtype)
    wide = {key: x.float() if x.dtype == dtype else x for key, x in inputs.items()}
    out, grads = gradients(operation, "packed", "triton", layout, inputs, Numbers(4))
    want_out, want_grads = gradients(operation, "packed", "triton", layout, wide, Numbers(4))
    ours, theirs = (*out, *grads.values()), (*want_out, *want_grads.values())
    assert_same(ours, tuple(b.to(a.dtype) for a, b in zip(ours, theirs, strict=True)))
