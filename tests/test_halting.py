"""Halting: the rules of docs/method.md, and the properties that follow from them."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import atsnn.functional as F
import atsnn.nn as ann
from atsnn import reference
from atsnn.checks import InvalidType, InvalidValue
from atsnn.nn.halting import starting_beta

EPS = 0.01
GRID = 2.0**-reference.SCORE_BITS


@st.composite
def scores(draw):
    """[L, T, B, N] on the grid, of the sizes that make tokens halt early, late and never."""
    L, T, B, N = (draw(st.integers(1, n)) for n in (6, 5, 2, 4))
    scale = draw(st.sampled_from([0.05, 0.2, 0.5, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    h = torch.rand(L, T, B, N, generator=g) * scale
    return torch.round(h / GRID) * GRID


def by_definition(h, accumulator):
    """active, H, weights, depth of one token, read off docs/method.md line by line."""
    L, T = len(h), len(h[0])
    active = [[False] * T for _ in range(L)]
    used = [[0.0] * T for _ in range(L)]
    H = [[0.0] * T for _ in range(L + 1)]
    spent = 0.0
    if accumulator == "sequential":
        for t in range(T):
            for block in range(L):
                active[block][t] = spent < 1 - EPS
                used[block][t] = h[block][t] if active[block][t] else 0.0
                spent += used[block][t]
    g = [[0.0] * T for _ in range(L)]
    for block in range(L):
        for t in range(T):
            if accumulator == "rectangle":
                active[block][t] = H[block][t] < 1 - EPS
            elif accumulator == "depth":
                active[block][t] = all(H[block][s] < 1 - EPS for s in range(t + 1))
            used[block][t] = h[block][t] if active[block][t] else 0.0
        for t in range(T):
            steps = range(t + 1) if accumulator == "rectangle" else [t]
            g[block][t] = sum(used[block][s] for s in steps)
            H[block + 1][t] = H[block][t] + g[block][t]
    depth = [sum(active[block][t] for block in range(L)) for t in range(T)]
    w = [[0.0] * T for _ in range(L)]
    for t in range(T):
        for block in range(depth[t]):
            w[block][t] = g[block][t] if block < depth[t] - 1 else 1 - H[block][t]
    return active, H[1:], w, depth


@pytest.mark.parametrize("accumulator", reference.ACCUMULATORS)
@given(h=scores())
def test_accumulate_is_its_definition(accumulator, h):
    state = F.accumulate(h, accumulator=accumulator, eps=EPS)
    for b in range(h.shape[2]):
        for k in range(h.shape[3]):
            active, H, w, depth = by_definition(h[:, :, b, k].tolist(), accumulator)
            assert state.active[:, :, b, k].tolist() == active
            assert state.H[:, :, b, k].tolist() == H
            assert state.weights[:, :, b, k].tolist() == w
            assert state.depth[:, b, k].tolist() == depth


@pytest.mark.parametrize("accumulator", reference.ACCUMULATORS)
@given(h=scores())
def test_properties_of_every_accumulator(accumulator, h):
    state = F.accumulate(h, accumulator=accumulator, eps=EPS)
    a = state.active
    assert not (a[1:] & ~a[:-1]).any(), "nested in depth"
    assert not (a[:, 1:] & ~a[:, :-1]).any(), "a prefix in time"
    assert a[0, 0].all(), "block 1 runs for every token"
    assert torch.equal(state.depth, a.sum(0))
    assert (state.depth[1:] <= state.depth[:-1]).all(), "later timesteps stop no deeper"
    total = state.weights.sum(0)
    assert torch.equal(total, (state.depth > 0).float()), "weights sum to one, exactly"
    assert (state.weights[a] > 0).all() or (h == 0).any()
    assert (state.weights[~a] == 0).all()
    assert (state.remainder[state.depth > 0] > EPS - GRID).all()


@given(h=scores())
def test_the_rectangle_grows_in_depth_and_time(h):
    H = F.accumulate(h).H
    assert (H[1:] >= H[:-1]).all() and (H[:, 1:] >= H[:, :-1]).all()


def test_rectangle_of_a_constant_score_by_hand():
    """h = 0.3: H[l, t] = 0.3 l t, so block l+1 runs while l * t < 3.3."""
    state = F.accumulate(torch.full((4, 4, 1, 1), 0.3))
    assert state.depth.flatten().tolist() == [4, 2, 2, 1]
    want = [[0.3, 0.6, 0.9, 1.0], [0.3, 0.4, 0.1, 0], [0.3, 0, 0, 0], [0.1, 0, 0, 0]]
    torch.testing.assert_close(state.weights[:, :, 0, 0], torch.tensor(want), rtol=0, atol=1e-6)
    # mean of D + w[D] over t: ((4 + .1) + (2 + .4) + (2 + .1) + (1 + 1)) / 4
    assert float(F.ponder_loss(state)) == pytest.approx((4.1 + 2.4 + 2.1 + 2.0) / 4)


def test_scores_with_no_timestep_block_or_token():
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)):
        state = F.accumulate(torch.zeros(shape))
        assert state.active.shape == state.weights.shape == shape
        assert state.depth.shape == shape[1:]
        assert state.remainder.shape == shape[1:]
        assert float(F.ponder_loss(state)) >= 0, "not NaN"


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_their_formula_on_the_grid(score, dtype):
    torch.manual_seed(1)
    x = torch.randint(0, 5, (3, 2, 4, 6)).to(dtype)
    weight = torch.randn(6) if score == "linear" else torch.tensor(0.7)
    bias = torch.tensor(-1.3)
    h = F.halting_scores(x, weight, bias, score=score)
    assert h.dtype == torch.float32 and h.shape == x.shape[:-1]
    assert torch.equal(h / GRID, (h / GRID).round())
    for place in [(0, 0, 0), (2, 1, 3), (1, 0, 2)]:
        token = x[place].double().tolist()
        if score == "linear":
            mean = sum(token) / 6
            var = sum((c - mean) ** 2 for c in token) / 6
            f = sum(
                (c - mean) / math.sqrt(var + 1e-5) * w
                for c, w in zip(token, weight.tolist(), strict=True)
            )
        else:
            f = {"first": token[0], "mean": sum(token) / 6, "constant": 0.0}[score] * float(weight)
        exact = 1 / (1 + math.exp(-(f + float(bias))))
        assert float(h[place]) == round(exact / GRID) * GRID


def test_score_gradients_pass_straight_through_the_rounding():
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(F.halting_scores(x, weight, bias).sum(), (x, weight, bias))
    smooth = torch.sigmoid(weight * x[:, 0] + bias)
    want = torch.autograd.grad(smooth.sum(), (x, weight, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_linear_score_is_detached_from_the_token():
    x = torch.rand(2, 3, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    h = F.halting_scores(x, weight, torch.zeros(()), score="linear")
    grads = torch.autograd.grad(h.sum(), (x, weight), allow_unused=True)
    assert grads[0] is None and grads[1] is not None


def test_scores_get_gradients_through_weights_and_remainder():
    h = torch.full((3, 2, 1, 1), 0.3, requires_grad=True)
    state = F.accumulate(h)  # depths 3 and 2: the remainders are blocks 3 and 2
    assert state.depth.flatten().tolist() == [3, 2]
    coefficient = torch.arange(1.0, 7.0).view(3, 2, 1, 1)
    (grad,) = torch.autograd.grad((state.weights * coefficient).sum(), h)
    # t=0: 1*h00 + 3*h10 + 5*(1 - h00 - h10); t=1: 2*(h00 + h01) + 4*(1 - h00 - h01)
    want = torch.tensor([[1 - 5 + 2 - 4, 2 - 4], [3 - 5, 0], [0, 0]]).float().view(3, 2, 1, 1)
    assert torch.equal(grad, want)
    (grad,) = torch.autograd.grad(F.ponder_loss(F.accumulate(h)), h)
    assert torch.equal(grad.flatten(), torch.tensor([-1.0, -0.5, -0.5, 0, 0, 0]))


# With the depth accumulator a constant score executes whole blocks: of 1, 3/4, 1/2 the first.
@pytest.mark.parametrize(
    ("accumulator", "attainable"), [("rectangle", 14 / 16), ("depth", 1.0), ("sequential", 14 / 16)]
)
def test_starting_beta_executes_the_attainable_share_nearest_85_percent(accumulator, attainable):
    beta = starting_beta(4, 4, accumulator)
    h = torch.sigmoid(torch.tensor(beta)).expand(4, 4, 1, 1)
    share = float(F.accumulate(h, accumulator=accumulator).active.double().mean())
    assert share == attainable
    higher = torch.sigmoid(torch.tensor(beta + 0.3)).expand(4, 4, 1, 1)
    assert float(F.accumulate(higher, accumulator=accumulator).active.double().mean()) < 0.85


def test_published_shares_of_the_constant_score():
    for beta, share in ((-2, 0.875), (-1.5, 0.69), (-1, 0.56), (-0.5, 0.44), (0, 0.31)):
        h = torch.sigmoid(torch.tensor(float(beta))).expand(4, 4, 1, 1)
        assert float(F.accumulate(h).active.double().mean()) == pytest.approx(share, abs=0.005)


def test_module_refuses_a_start_that_halts_everything():
    ann.Halting(8, beta=4.0)
    with pytest.raises(InvalidValue, match="must be below 0.99, got 0.9933 for beta = 5"):
        ann.Halting(8, beta=5.0)
    with pytest.raises(InvalidValue, match="score must be one of"):
        ann.Halting(8, score="last")
    with pytest.raises(InvalidValue, match="eps must be a number > 0 and < 1, got 1.0"):
        ann.Halting(8, eps=1.0)


def test_bad_input_is_refused():
    with pytest.raises(InvalidValue, match=r"h must lie in 0 .. 1, got values in 0.0 .. 1.5"):
        F.accumulate(torch.tensor([0.0, 1.5]).view(2, 1, 1, 1))
    with pytest.raises(InvalidValue, match="h must lie in"):
        F.accumulate(torch.full((1, 1, 1, 1), float("nan")))
    with pytest.raises(InvalidValue, match=r"h must have shape \(L, T, B, N\), got \(2, 1, 1\)"):
        F.accumulate(torch.zeros(2, 1, 1))
    with pytest.raises(InvalidType, match="h must be one of float32, float64"):
        F.accumulate(torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(InvalidValue, match="accumulator must be one of"):
        F.accumulate(torch.zeros(1, 1, 1, 1), accumulator="sum")
    x, one = torch.zeros(2, 3), torch.ones(())
    with pytest.raises(InvalidValue, match=r"weight must have shape \(\), got \(3\)"):
        F.halting_scores(x, torch.ones(3), one)
    with pytest.raises(InvalidValue, match=r"weight must have shape \(C\) = \(3\), got \(4\)"):
        F.halting_scores(x, torch.ones(4), one, score="linear")
    with pytest.raises(InvalidValue, match=r"x must have shape \(..., C\) with C >= 1"):
        F.halting_scores(torch.zeros(2, 0), one, one)
