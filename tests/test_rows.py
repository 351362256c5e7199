"""Packed results are the dense ones, and the native kernels' are the reference's."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as nnf
from cases import assert_same, layouts
from hypothesis import given, settings

import atsnn.functional as F
from atsnn import TokenLayout, reference
from atsnn.cases import DIFFERENTIABLE, OPERATIONS, Numbers, gradients, ragged

BACKENDS = ("native", "reference")
FORMS = ("packed", "dense")
SEEDS = st.integers(0, 2**16)
# Channels a head, around the widths of vectors.
CHANNELS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33])
# Each of these examples is of four forms, forward and backward.
FEWER = settings(max_examples=settings.default.max_examples // 2)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_all_forms_agree(operation, layout, channels, dtype, seed):
    """Bit for bit: packed and dense, native and reference."""
    C = operation.channels(channels)
    inputs = operation.make(Numbers(seed), layout, C, dtype)
    before = {name: x.clone() for name, x in inputs.items()}
    want = operation.dense("reference", layout, **inputs)
    for form, backend in (("packed", "reference"), ("dense", "native"), ("packed", "native")):
        got = getattr(operation, form)(backend, layout, **inputs)
        assert_same(got, want, f"{form} {backend}")
    assert_same(tuple(inputs.values()), tuple(before.values()), "inputs are left as they were")


@pytest.mark.parametrize("name", OPERATIONS)
@given(layout=layouts(), channels=CHANNELS, double=st.booleans(), seed=SEEDS)
def test_packed_is_dense_and_native_is_the_reference(name, layout, channels, double, seed):
    dtype = torch.float64 if double else torch.float32
    assert_all_forms_agree(OPERATIONS[name], layout, channels, dtype, seed)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("shape", "channels"), [((3, 2, 70), 40), ((2, 1, 200), 8), ((1, 2, 5), 300), ((17, 1, 3), 64)]
)
def test_the_same_beyond_one_tile(name, shape, channels):
    """Many tokens, many channels and many timesteps: several tiles, both orders of attention."""
    assert_all_forms_agree(OPERATIONS[name], ragged(1, *shape), channels, torch.float32, 2)


def assert_gradients_close(ours, theirs, what):
    for name, want in theirs.items():
        got = ours[name]
        assert got.dtype == want.dtype and got.shape == want.shape, (what, name)
        tolerance = TOLERANCES[want.dtype]
        scale = 1 + (float(want.abs().max()) if want.numel() else 0)
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance * scale,
            msg=lambda m, n=name: f"{what}, {n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@FEWER
@given(layout=layouts(), channels=CHANNELS, double=st.booleans(), seed=SEEDS,
       which=st.integers(1, 3))  # fmt: skip
def test_gradients_are_the_references(name, layout, channels, double, seed, which):
    """Of all results or of one alone; that of an inactive cell is zero from packed rows."""
    operation = OPERATIONS[name]
    dtype = torch.float64 if double else torch.float32
    inputs = operation.make(Numbers(seed), layout, operation.channels(channels), dtype)
    found = {
        (form, backend): gradients(
            operation, form, backend, layout, inputs, Numbers(seed + 1), which
        )[1]
        for form in FORMS
        for backend in BACKENDS
    }
    want = found.pop(("dense", "reference"))
    for (form, backend), got in found.items():
        assert_gradients_close(got, want, f"{form} {backend}")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_beyond_one_tile(name):
    operation, layout = OPERATIONS[name], ragged(3, 3, 2, 70)
    inputs = operation.make(Numbers(4), layout, operation.channels(40), torch.float32)
    _, want = gradients(operation, "dense", "reference", layout, inputs, Numbers(5))
    assert any(g.count_nonzero() for g in want.values()), "something to compare"
    for form in FORMS:
        _, got = gradients(operation, form, "native", layout, inputs, Numbers(5))
        assert_gradients_close(got, want, form)


def test_final_potentials_by_hand():
    """In token order, after each token's last timestep; the initial one of a token with none."""
    layout = TokenLayout.from_active_steps(torch.tensor([[1, 0, 3]]), 3)
    assert layout.token.tolist() == [[2, 0, 1]]
    # An IF adds up: rows are (t0, token 2), (t0, token 0), (t1, token 2), (t2, token 2).
    rows = torch.tensor([1.0, 10.0, 2.0, 4.0]).view(-1, 1)
    v = torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1)
    for backend in BACKENDS:
        for given_v, want in ((v, [10.5, 0.25, 7.125]), (None, [10.25, 0.25, 7.25])):
            _, final = F.neuron(
                rows, given_v, kind="if", v_threshold=100.0, v_reset=0.25, layout=layout,
                backend=backend,
            )  # fmt: skip
            assert final.flatten().tolist() == want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [dict(r=1), dict(threshold=0.0)])
def test_of_partners_in_one_direction_the_first_is_taken(settings, backend):
    """Token 0 is as similar to token 1 as to token 3: their counts are multiples of the same.

    Rounding must not decide between them, differently in two backends: PyTorch's square root is
    not always the float64 next to the true one, as the kernels' is.
    """
    numbers = Numbers(0)
    first, direction = numbers.integers(1, 4, (2, 2000, 3))
    factors = numbers.integers(1, 4, (2, 2000, 1))
    counts = [first, factors[0] * direction, torch.zeros(2000, 3), factors[1] * direction]
    plan = F.match_tokens(torch.stack(counts, 1), backend=backend, **settings)
    partner = plan.target[:, 0]
    wrong = (partner != 1).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of 2000, {[c[wrong[0]].tolist() for c in counts]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulator", ["rectangle", "depth"])
@given(seed=SEEDS)
def test_halting_block_by_block_is_the_accumulation_of_all(backend, accumulator, seed):
    """``halt`` over the blocks, packed, gives what ``accumulate`` makes of all scores."""
    L, T, B, N = 4, 3, 2, 5
    bits = reference.SCORE_BITS
    h = Numbers(seed).integers(0, int(0.4 * 2**bits), (L, T, B, N), bits).float()
    want = F.accumulate(h, accumulator=accumulator)
    layout, H = TokenLayout.full(T, B, N), torch.zeros(T, B, N)
    for block in range(L):
        assert torch.equal(layout.mask, want.active[block])
        rows = layout.pack(h[block])
        w, last, after, steps = F.halt(
            rows, layout.pack(H), layout, accumulator=accumulator, final=block + 1 == L,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(layout.unpack(w), want.weights[block])
        assert torch.equal(layout.unpack(last), want.active[block] & (want.depth == block + 1))
        assert torch.equal(after, layout.pack(want.H[block]))
        layout, H = TokenLayout.from_active_steps(steps, T), layout.unpack(after)
    assert not layout.num_rows


@given(layouts(), SEEDS)
def test_rows_of_any_shape_can_be_taken(layout, seed):
    """One value a row, and rows of several dimensions."""
    numbers = Numbers(seed)
    steps = numbers.rng.integers(0, 10, layout.active_steps.shape)
    to = TokenLayout.from_active_steps(
        torch.minimum(layout.active_steps, torch.from_numpy(steps)), layout.T
    )
    for shape in ((), (2, 3), (0,)):
        x = numbers.normal((layout.T, layout.B, layout.N, *shape))
        for backend in BACKENDS:
            got = F.take_rows(layout.pack(x), layout, to, backend=backend)
            assert torch.equal(got, to.pack(x))


# -- derivatives that are known otherwise ---------------------------------------------------------

RAGGED = TokenLayout.from_active_steps(torch.tensor([[2, 1, 0, 2], [1, 2, 1, 1]]), 2)
SIZES = torch.tensor([[1.0, 2.0, 1.0, 3.0], [2.0, 1.0, 1.0, 5.0]])
TARGET = torch.tensor([[3, 1, 2, 3], [2, 1, 2, 2]])  # equal lifetimes; three into one
FULL = TokenLayout.full(2, 2, 4)
MERGED = reference.MergePlan.of(TARGET).merged
LAYOUTS = {"dense": None, "packed": RAGGED}


def doubles(seed, layout, *channels):
    layout = FULL if layout is None else layout
    return layout.pack(Numbers(seed).normal((2, 2, 4, *channels)))


def raw_merge(x, layout):
    """The merge without the rounding to 2^-8, through which differences cannot be taken."""
    parts = [None] * 4
    if layout is not None:
        to = layout.without(MERGED)
        parts = [layout.token, layout.offsets, to.token, to.offsets]
    return torch.ops.atsnn.merge_tokens(x, TARGET, SIZES, *parts, 46)


def unmerge(y, layout):
    return F.unmerge_tokens(y, reference.MergePlan.of(TARGET), layout=layout, backend="native")


def merged_rows(layout):
    return RAGGED.without(MERGED) if layout else FULL


def attend(q, k, v, layout):
    return F.spiking_attention(q, k, v, num_heads=2, sizes=SIZES, layout=layout, backend="native")


def read_out(x, layout):
    w = Numbers(9).normal((2, 2, 4)).float()
    w = layout.pack(w) if layout else w
    return F.readout(x, w, sizes=SIZES, layout=layout, backend="native")


def taken(x, layout):
    layout = FULL if layout is None else layout
    to = TokenLayout.from_active_steps((layout.active_steps - 1).clamp(min=0), 2)
    return F.take_rows(layout.pack(x) if x.dim() == 4 else x, layout, to, backend="native")


GRADCHECKS = {
    "attention": (attend, lambda L: [doubles(i, L, 4) for i in range(3)]),
    "readout": (read_out, lambda L: [doubles(0, L, 3)]),
    "merge": (raw_merge, lambda L: [doubles(0, L, 3) if L else doubles(0, L, 3).view(2, 2, 4, 3)]),
    "unmerge": (unmerge, lambda L: [doubles(0, merged_rows(L), 3)]),
    "take": (taken, lambda L: [doubles(0, L, 3)]),
}


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, form):
    function, make = GRADCHECKS[name]
    layout = LAYOUTS[form]
    inputs = make(layout)
    if layout is None and name != "take":
        inputs = [x.view(2, 2, 4, -1) for x in inputs]
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: function(*a, layout), inputs)


@pytest.mark.parametrize("form", LAYOUTS)
def test_readout_weights_have_the_gradient_of_a_product(form):
    """``size * sum over c of grad * x``, in float64 and rounded to float32 once."""
    layout = LAYOUTS[form]
    x = doubles(1, layout, 3)
    grad = Numbers(2).normal((2, 3))
    rows = RAGGED if layout else FULL
    image = rows.index % 8 // 4
    want = rows.row_values(SIZES.double()) * (grad[image] * x).sum(1)
    if layout is None:
        x, want = x.view(2, 2, 4, 3), want.view(2, 2, 4)
    w = torch.zeros(x.shape[:-1], requires_grad=True)
    out = F.readout(x, w, sizes=SIZES, layout=layout, backend="native")
    (got,) = torch.autograd.grad(out, w, grad)
    torch.testing.assert_close(got, want.float(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_gradients_are_those_of_the_formula_before_rounding(backend, score, dtype):
    numbers = Numbers(11)
    x = numbers.normal((40, 19)).to(dtype).requires_grad_()
    weight = (numbers.normal((19,) if score == "linear" else ()) * 0.5).to(dtype).requires_grad_()
    bias = torch.tensor(-0.75, dtype=dtype, requires_grad=True)
    grad = numbers.normal((40,)).float()
    leaves = {"x": x, "weight": weight, "bias": bias}
    h = F.halting_scores(x, weight, bias, score=score, backend=backend)
    got = torch.autograd.grad(h, list(leaves.values()), grad, allow_unused=True)

    z = {
        "first": lambda x, w, b: w * x[:, 0] + b,
        "mean": lambda x, w, b: w * x.mean(1) + b,
        "linear": lambda x, w, b: nnf.layer_norm(x.detach(), (19,)) @ w + b,
        "constant": lambda x, w, b: b.expand(40),
    }[score]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves.values()]
    smooth = torch.sigmoid(z(*exact))
    assert (h.double() - smooth).abs().max() <= 2.0 ** -(reference.SCORE_BITS + 1)
    want = torch.autograd.grad(smooth, exact, grad.double(), allow_unused=True)
    for name, ours, theirs in zip(leaves, got, want, strict=True):
        if theirs is None:
            # Nothing flows: no gradient, or zeros where a score has no use for the weight.
            assert ours is None or not ours.count_nonzero(), name
            continue
        assert ours.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance * 1e-1 + 1e-13, msg=name
        )
