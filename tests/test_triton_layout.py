"""Triton's kernels on layouts and from one layout to another, under the interpreter."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from cases import layouts, operator_arguments
from hypothesis import given
from interpreter import FEW, RUNS, guard  # noqa: F401

from atsnn import TokenLayout, reference
from atsnn.cases import Numbers, plan_of, ragged, sizes_of
from atsnn.checks import InvalidType, InvalidValue

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]

ours, native = torch.ops.atsnn_triton, torch.ops.atsnn
SEEDS = st.integers(0, 2**16)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fewer_steps(layout, seed):
    """Active steps of which each is at most the layout's."""
    share = torch.from_numpy(Numbers(seed).rng.random((layout.B, layout.N)))
    return (share * (layout.active_steps + 1)).long()


def bits_of(x):
    """What tells even zeros of different sign apart."""
    return x.contiguous().view(torch.uint8)


def assert_layouts_are_native(layout, to, spare):
    for got, want in zip(
        ours.token_layout(layout.active_steps, layout.T), (layout.token, layout.offsets),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)
    old, new = (layout.token, layout.offsets), (to.token, to.offsets)
    most = layout.T * layout.B * layout.N
    for rows in (None, to.num_rows, min(to.num_rows + spare, most), most):
        assert torch.equal(ours.layout_cells(*new, rows), native.layout_cells(*new, rows))
        assert torch.equal(ours.moved_rows(*old, *new, rows), native.moved_rows(*old, *new, rows))


@FEW
@given(layouts(), SEEDS, st.integers(0, 5))
def test_layouts_are_the_native_ones(layout, seed, spare):
    to = TokenLayout.from_active_steps(fewer_steps(layout, seed), layout.T)
    assert_layouts_are_native(layout, to, spare)


@pytest.mark.parametrize("shape", [(3, 2, 150), (45, 3, 5), (130, 1, 2), (1, 1, 0)])
def test_more_tokens_and_runs_than_a_program_takes(shape):
    layout = ragged(4, *shape)
    to = TokenLayout.from_active_steps(fewer_steps(layout, 5), layout.T)
    assert_layouts_are_native(layout, to, 7)


def test_steps_are_clamped():
    steps = torch.tensor([[5, -3, 2, 2**62, -(2**63)]])
    for got, want in zip(
        ours.token_layout(steps, 3), native.token_layout(steps.clamp(0, 3), 3), strict=True
    ):
        assert torch.equal(got, want)


def test_a_cell_that_is_not_active_in_the_old_layout_has_no_row():
    layout = TokenLayout.from_active_steps(torch.tensor([[1, 2, 0]]), 2)
    to = TokenLayout.full(2, 1, 3)
    old, new = (layout.token, layout.offsets), (to.token, to.offsets)
    assert ours.moved_rows(*old, *new).tolist() == [1, 0, -1, -1, 2, -1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (300,), (2, 3), (2, 0), (0,)])
def test_rows_can_be_taken_more_than_once(shape, dtype):
    numbers = Numbers(1)
    x = numbers.normal((9, *shape)).to(dtype)
    index = torch.tensor([3, 3, 0, 3, 0, 5] * 3 + [8, 1])
    assert torch.equal(ours.take_rows(x, index), native.take_rows(x, index))
    grad = -numbers.integers(0, 3, (len(index), *shape), bits=2).to(dtype)
    got = ours.take_rows_backward(grad, index, 9)
    assert torch.equal(bits_of(got), bits_of(native.take_rows_backward(grad, index, 9)))


def test_no_row_is_zeros():
    x = Numbers(2).normal((4, 5))
    index = torch.tensor([-1, 2, 4, -(2**63), 2**63 - 1, 0])
    got = ours.take_rows(x, index)
    assert torch.equal(got[[1, 5]], x[[2, 0]]) and not got[[0, 2, 3, 4]].any()
    grad = torch.ones(6, 5)
    got = ours.take_rows_backward(grad, index, 4)
    assert torch.equal(got, torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None].expand(4, 5))
    for rows in (0, 4):
        nothing = torch.zeros(0, dtype=torch.int64)
        assert not ours.take_rows_backward(torch.zeros(0, 5), nothing, rows).any()
        assert ours.take_rows(x[:rows], nothing).shape == (0, 5)
    assert not ours.take_rows(x[:0], index).any()


def views_of(x):
    """The same values behind other strides."""
    order = list(range(x.dim()))[::-1]
    yield x.permute(order).contiguous().permute(order)
    yield torch.stack([x, x + 1], -1)[..., 0]
    yield torch.cat([x + 1, x], 0)[len(x) :]


def test_strides():
    layout, numbers = ragged(2, 3, 2, 5), Numbers(3)
    dense = numbers.integers(-9, 9, (3, 2, 5, 4), bits=1).float()
    target, sizes = plan_of(numbers, layout), sizes_of(numbers, layout)
    to = layout.without(reference.MergePlan.of(target).merged)
    index = torch.arange(layout.num_rows).flip(0)
    for x, parts in (
        (dense, (None,) * 4),
        (layout.pack(dense), (layout.token, layout.offsets, to.token, to.offsets)),
    ):
        want = native.merge_tokens(x, target, sizes, *parts, 8)
        counts = native.firing_counts(x, *parts[:2])
        for view in views_of(x):
            assert torch.equal(ours.merge_tokens(view, target, sizes, *parts, 8), want)
            assert torch.equal(ours.firing_counts(view, *parts[:2]), counts)
            if parts[0] is not None:
                assert torch.equal(ours.take_rows(view, index), x[index])
    steps = layout.active_steps
    for view in views_of(counts.abs()):
        got = ours.match_tokens(view, steps.t().contiguous().t(), 2, None)
        assert torch.equal(got, native.match_tokens(counts.abs(), steps, 2, None))


@pytest.mark.parametrize("settings", [(3, None), (100, None), (0, None), (None, 0.9), (None, -1.0)])
def test_partners_are_exact_where_float32_is_not(settings):
    """Products far above 2^24, cosines that differ in the last bits, ties, and silent tokens."""
    numbers = Numbers(4)
    base = numbers.integers(60_000, 60_040, (1, 1, 40))
    counts = base + numbers.integers(0, 1, (2, 70, 40))
    counts[:, 30:40] = counts[:, 20:30]
    counts[:, 50:62] = 0
    steps = torch.from_numpy(numbers.rng.integers(0, 3, (2, 70)))
    want = reference.match_tokens(counts, *settings, steps).target
    assert torch.equal(ours.match_tokens(counts, steps, *settings), want)


def all_into_few(layout):
    """A plan in which many tokens of a lifetime merge into the first one of it."""
    steps = layout.active_steps
    same = steps.unsqueeze(2) == steps.unsqueeze(1)
    return torch.where(steps > 0, same.to(torch.int8).argmax(2), torch.arange(layout.N))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(), (5,), (2, 3)])
def test_many_members_and_any_channels(channels, dtype):
    """Values that round, halves among them, zeros of both signs, and sizes that add up to 0."""
    layout, numbers = ragged(7, 2, 2, 40), Numbers(8)
    target = all_into_few(layout)
    to = layout.without(reference.MergePlan.of(target).merged)
    sizes = numbers.integers(0, 3, (2, 40), bits=1).float()
    x = numbers.integers(-5, 5, (2, 2, 40, *channels), bits=8).to(dtype)
    x = torch.where(x == 0, -x, x)
    forms = [(layout.pack(x), (layout.token, layout.offsets, to.token, to.offsets))]
    if len(channels) < 2:
        forms.append((x, (None,) * 4))
    for rows, parts in forms:
        there, back = parts[:2], parts[2:]
        after = native.merge_tokens(rows, target, sizes, *parts, 8)
        got = ours.merge_tokens(rows, target, sizes, *parts, 8)
        assert torch.equal(bits_of(got), bits_of(after))
        for name, arguments in {
            "merge_tokens_backward": (after, target, sizes, *parts),
            "unmerge_tokens": (after, target, *back, *there),
            "unmerge_tokens_backward": (rows, target, *back, *there),
        }.items():
            got, want = (getattr(ops, name)(*arguments) for ops in (ours, native))
            assert torch.equal(bits_of(got), bits_of(want)), name


def test_buffers_of_a_capacity():
    """Rows past the end of a layout are not looked at, and not written."""
    layout, numbers = ragged(9, 3, 2, 7), Numbers(10)
    target, sizes = plan_of(numbers, layout), sizes_of(numbers, layout)
    to = layout.without(reference.MergePlan.of(target).merged)
    old, new = (layout.token, layout.offsets), (to.token, to.offsets)
    x = layout.pack(numbers.integers(-9, 9, (3, 2, 7, 4), bits=1)).float()
    y = native.merge_tokens(x, target, sizes, *old, *new, 8)
    R, S, most = len(x), len(y), 3 * 2 * 7
    spare = [torch.cat([z, torch.full((most - len(z), 4), torch.nan)]) for z in (x, y)]
    assert torch.equal(ours.firing_counts(spare[0], *old), native.firing_counts(x, *old))
    for got, want in (
        (ours.merge_tokens(spare[0], target, sizes, *old, *new, 8, most), y),
        (ours.merge_tokens_backward(spare[1], target, sizes, *old, *new, most),
         native.merge_tokens_backward(y, target, sizes, *old, *new)),
        (ours.unmerge_tokens(spare[1], target, *new, *old, most),
         native.unmerge_tokens(y, target, *new, *old)),
        (ours.unmerge_tokens_backward(spare[0], target, *new, *old, most),
         native.unmerge_tokens_backward(x, target, *new, *old)),
    ):  # fmt: skip
        assert got.shape == (most, 4) and torch.equal(got[: len(want)], want)
        assert got[len(want) :].isnan().all()
    with pytest.raises(InvalidValue, match=r"rows must lie in 0 .. 42 for this layout, got 43"):
        ours.merge_tokens(x, target, sizes, *old, *new, 8, most + 1)
    assert R > S


NAMES = [
    "token_layout", "layout_cells", "moved_rows", "take_rows", "take_rows_backward",
    "firing_counts", "match_tokens", "merge_tokens", "merge_tokens_backward", "unmerge_tokens",
    "unmerge_tokens_backward",
]  # fmt: skip
WILD = torch.tensor([-(2**63), -1, 0, 1, 2, 5, 40, 2**31, 2**62, 2**63 - 1])


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(seed=SEEDS, packed=st.booleans())
def test_garbage_is_harmless(name, seed, packed):
    """Whatever integers hold: nothing outside the tensors, nothing raised."""
    numbers = Numbers(seed)
    layout = ragged(seed, 2, 2, 5)
    arguments = operator_arguments(name, layout if packed else None, bare=not packed)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
            wild = WILD[torch.from_numpy(numbers.rng.integers(0, len(WILD), value.shape))]
            arguments[key] = torch.where(numbers.spikes(value.shape) > 0, wild, value)
    for key in ("offsets", "to_offsets"):  # the last one is how many rows to make
        if isinstance(arguments.get(key), torch.Tensor):
            arguments[key][-1] = numbers.rng.integers(0, 13)
    getattr(ours, name)(*arguments.values())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of what a GPU does not
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 0.3, 3e38])
def test_counts_that_are_none_are_harmless(value):
    counts = Numbers(1).integers(0, 2, (1, 40, 3)).float()
    counts[0, ::3] = value
    target = ours.match_tokens(counts, torch.ones(1, 40, dtype=torch.int64), 9, None)
    assert ((target >= 0) & (target < 40)).all()


def test_what_does_not_fit_is_refused():
    layout = ragged(1, 2, 2, 3)
    parts = (layout.token, layout.offsets)
    x = torch.zeros(layout.num_rows, 4)
    target, sizes = torch.arange(3).expand(2, 3), torch.ones(2, 3)
    none = (None,) * 4
    with pytest.raises(InvalidValue, match=r"active_steps must have shape \(B, N\), got \(3\)"):
        ours.token_layout(torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(InvalidType, match=r"active_steps must be one of int64, got torch.int32"):
        ours.token_layout(torch.zeros((2, 3), dtype=torch.int32), 2)
    with pytest.raises(InvalidValue, match=r"rows must lie in 0 .. 12 for this layout, got 13"):
        ours.layout_cells(*parts, 13)
    with pytest.raises(InvalidValue, match=r"both layouts must have \(T, B, N\) = \(2, 2, 3\)"):
        ours.moved_rows(*parts, torch.zeros((1, 3), dtype=torch.int64), layout.offsets)
    with pytest.raises(InvalidValue, match=r"grad must have the 2 rows of index, got \(3, 4\)"):
        ours.take_rows_backward(x.new_zeros(3, 4), torch.zeros(2, dtype=torch.int64), 5)
    with pytest.raises(InvalidValue, match="both or neither of the layouts must be given"):
        ours.merge_tokens(x, target, sizes, *parts, None, None, 8)
    with pytest.raises(InvalidValue, match=r"bits must lie in 0 .. 52, got 53"):
        ours.merge_tokens(torch.zeros(2, 2, 3, 4), target, sizes, *none, 53)
    with pytest.raises(InvalidValue, match=r"target must have shape \(B, N\) = \(2, 3\)"):
        ours.unmerge_tokens(torch.zeros(2, 2, 3, 4), target[:1], *none)
    with pytest.raises(InvalidValue, match="exactly one of r and threshold"):
        ours.match_tokens(torch.zeros(2, 3, 4), layout.active_steps, 1, 0.5)


@pytest.mark.parametrize("settings", [(5, None), (None, 0.5)], ids=["r", "threshold"])
def test_of_equal_partners_the_first_is_taken(settings):
    """Of one channel all cosines are 1: within a block of partners and from block to block."""
    counts = Numbers(1).integers(1, 3, (2, 70, 1)).float()
    steps = torch.full((2, 70), 2)
    target = ours.match_tokens(counts, steps, *settings)
    assert torch.equal(target, native.match_tokens(counts, steps, *settings))
    assert set(target.unique().tolist()) <= {1, *range(70)} and int((target == 1).sum()) > 4
