"""TokenLayout: which rows exist and in which order."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from atsnn import TokenLayout
from atsnn.checks import InvalidType, InvalidValue


@st.composite
def active_steps(draw):
    B, N, T = draw(st.integers(0, 4)), draw(st.integers(0, 9)), draw(st.integers(0, 5))
    n = draw(st.lists(st.integers(0, T), min_size=B * N, max_size=B * N))
    return torch.tensor(n, dtype=torch.int64).view(B, N), T


@given(active_steps())
def test_rows_are_ordered_by_timestep_image_and_rank(case):
    n, T = case
    B, N = n.shape
    layout = TokenLayout.from_active_steps(n, T)
    want = []  # (t, b, token) of each row, by the definition
    offsets = [0]
    for t in range(T):
        for b in range(B):
            ranked = sorted(range(N), key=lambda k: (-int(n[b, k]), k))
            want += [(t, b, k) for k in ranked if n[b, k] > t]
            offsets.append(len(want))
    assert layout.num_rows == len(want)
    assert layout.offsets.tolist() == offsets
    assert layout.index.tolist() == [(t * B + b) * N + k for t, b, k in want]
    assert layout.mask.nonzero().tolist() == sorted([t, b, k] for t, b, k in want)


@given(active_steps(), st.integers(0, 3))
def test_unpack_inverts_pack_on_active_cells(case, C):
    n, T = case
    layout = TokenLayout.from_active_steps(n, T)
    x = torch.randn(T, *n.shape, C)
    rows = layout.pack(x)
    assert rows.shape == (layout.num_rows, C)
    back = layout.unpack(rows, fill=-7.0)
    assert torch.equal(back, torch.where(layout.mask.unsqueeze(-1), x, -7.0))


def test_bad_input_is_refused():
    ones = torch.ones(2, 3, dtype=torch.int64)
    make = TokenLayout.from_active_steps
    with pytest.raises(InvalidValue, match=r"n must lie in 0 .. T = 2, got values in 1 .. 3"):
        make(ones.clone().index_fill_(1, torch.tensor([0]), 3), 2)
    with pytest.raises(InvalidValue, match="n must lie in"):
        make(-ones, 2)
    with pytest.raises(InvalidType, match="n must be an integer tensor, got torch.float32"):
        make(ones.float(), 2)
    with pytest.raises(InvalidValue, match=r"n must have shape \(B, N\), got \(2\)"):
        make(ones[:, 0], 2)
    with pytest.raises(InvalidValue, match="T must be a number >= 0 and <= 1048576, got -1"):
        make(ones, -1)
    layout = make(ones, 2)
    with pytest.raises(InvalidValue, match=r"x must have shape .* got \(2, 2, 4, 5\)"):
        layout.pack(torch.zeros(2, 2, 4, 5))
    with pytest.raises(InvalidValue, match="must have 6 rows"):
        layout.unpack(torch.zeros(5, 4))
