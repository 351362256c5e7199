"""Triton's scores, halting step and readout under the interpreter, beyond the shared tables."""

from __future__ import annotations

import pytest
import torch
from cases import SMALL, assert_same, flat, operator_arguments
from interpreter import RUNS, guard  # noqa: F401
from test_rows import assert_gradients_close

import atsnn.functional as F
from atsnn import TokenLayout, reference
from atsnn.cases import OPERATIONS, Numbers, gradients, ragged

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]

OPS = torch.ops.atsnn_triton
NATIVE = torch.ops.atsnn
HALTING = [name for name in OPERATIONS if name.split()[0] in ("score", "halt", "readout")]
NAMES = ("halting_scores", "halt", "readout")
BIG = 2**63 - 1


def scores_arguments(score, shape, dtype=torch.float32):
    x = Numbers(4).normal(shape).to(dtype)
    weight = Numbers(5).normal((shape[-1],) if score == "linear" else ()) * 0.5
    return x, weight.float(), torch.tensor(-0.7)


def other_layouts(x):
    """The same values, laid out in other ways."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    wider = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wider[..., 1:-2] = x
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    return wide[..., ::2], wider[..., 1:-2], swapped


@pytest.mark.parametrize("name", HALTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_native_kernels_bits(name, dtype):
    operation, layout = OPERATIONS[name], ragged(2, 3, 2, 20)
    inputs = operation.make(Numbers(7), layout, operation.channels(21), dtype)
    for form in ("packed", "dense"):
        want, want_grads = gradients(operation, form, "native", layout, inputs, Numbers(1))
        got, got_grads = gradients(operation, form, "triton", layout, inputs, Numbers(1))
        assert_same(got, want, form)
        for key, grad in want_grads.items():
            # Those of scores have passed an exponential, whose last bit is the device's own.
            if dtype in (torch.float32, torch.float64):
                assert_gradients_close({key: got_grads[key]}, {key: grad}, form)
            else:
                torch.testing.assert_close(got_grads[key], grad)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("C", [1, 100, 1024, 1030, 4096])
def test_scores_of_any_number_of_channels(score, C):
    x, weight, bias = scores_arguments(score, (5, C))
    assert torch.equal(OPS.halting_scores(x, weight, bias, score),
                       NATIVE.halting_scores(x, weight, bias, score))  # fmt: skip
    grad = Numbers(6).normal((5,)).float()
    ours = OPS.halting_scores_backward(grad, x, weight, bias, score)
    theirs = NATIVE.halting_scores_backward(grad, x, weight, bias, score)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", reference.SCORES)
def test_scores_of_more_rows_than_a_block(score):
    """Several programs add to one gradient; whole rows or few of them a program."""
    x, weight, bias = scores_arguments(score, (700, 8))
    assert torch.equal(OPS.halting_scores(x, weight, bias, score),
                       NATIVE.halting_scores(x, weight, bias, score))  # fmt: skip
    grad = Numbers(6).normal((700,)).float()
    ours = OPS.halting_scores_backward(grad, x, weight, bias, score)
    theirs = NATIVE.halting_scores_backward(grad, x, weight, bias, score)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_scores_of_any_shape_and_strides(score, shape):
    x, weight, bias = scores_arguments(score, shape)
    h = OPS.halting_scores(x, weight, bias, score)
    assert torch.equal(h, NATIVE.halting_scores(x, weight, bias, score))
    grad = torch.ones(()).expand(shape[:-1])
    want = NATIVE.halting_scores_backward(grad, x, weight, bias, score)
    for other in other_layouts(x) if len(shape) > 1 else ():
        assert torch.equal(OPS.halting_scores(other, weight, bias, score), h)
        found = OPS.halting_scores_backward(grad, other, weight, bias, score)
        for a, b in zip(found, want, strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("score", reference.SCORES)
def test_no_rows_have_no_scores(score):
    x, weight, bias = scores_arguments(score, (2, 0, 6))
    assert OPS.halting_scores(x, weight, bias, score).shape == (2, 0)
    _, *grads = OPS.halting_scores_backward(torch.zeros(2, 0), x, weight, bias, score)
    assert [g.shape for g in grads] == [weight.shape, bias.shape]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("score", reference.SCORES)
def test_rows_without_a_gradient_may_hold_anything(score):
    x, weight, bias = scores_arguments(score, (40, 6))
    grad = Numbers(6).normal((40,)).float()
    grad[30:] = 0
    want = OPS.halting_scores_backward(grad[:30], x[:30], weight, bias, score)
    x[30:] = torch.nan
    grad_x, *grads = OPS.halting_scores_backward(grad, x, weight, bias, score)
    assert_same(tuple(grads), want[1:])
    if len(grad_x):
        assert torch.equal(grad_x[:30], want[0]) and not grad_x[30:].any()


def test_first_reads_one_channel_a_row(guard):  # noqa: F811
    x, weight, bias = scores_arguments("first", (10, 4096))
    before = guard.accesses
    OPS.halting_scores(x, weight, bias, "first")
    assert guard.accesses - before < 40


# -- halt -----------------------------------------------------------------------------------------


def halt_arguments(layout, seed=3):
    h, H = OPERATIONS["halt depth"].make(Numbers(seed), layout, 1, torch.float32).values()
    return layout.pack(h), layout.pack(H), layout.token, layout.offsets


@pytest.mark.parametrize("accumulator", ["rectangle", "depth"])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("T", [0, 1, 7, 8, 9, 16, 31])
def test_a_halting_step_of_any_length_is_one_launch(guard, T, accumulator, final):  # noqa: F811
    layout = ragged(T, T, 2, 150)
    arguments = halt_arguments(layout)
    guard.launches.clear()
    found = OPS.halt(*arguments, accumulator, 0.01, final)
    assert guard.launches == ["halt_kernel"]
    assert_same(found, NATIVE.halt(*arguments, accumulator, 0.01, final))
    numbers = Numbers(9)
    grads = [numbers.integers(-8, 8, found[0].shape, bits=3).float() for _ in range(2)]
    for some in (grads, [grads[0], None], [None, grads[1]], [None, None]):
        guard.launches.clear()
        back = OPS.halt_backward(*some, found[1], *arguments[2:], accumulator)
        assert guard.launches == ["halt_backward_kernel"]
        assert_same(back, NATIVE.halt_backward(*some, found[1], *arguments[2:], accumulator))


def test_halting_where_a_score_is_no_number():
    h, H, token, offsets = halt_arguments(SMALL)
    h[0] = torch.nan
    for accumulator in ("rectangle", "depth"):
        found = OPS.halt(h, H, token, offsets, accumulator, 0.01, False)
        want = NATIVE.halt(h, H, token, offsets, accumulator, 0.01, False)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_thresholds_are_float32():
    """Accumulators on both sides of ``1 - eps``, which is no float32."""
    layout = TokenLayout.full(1, 1, 3)
    edge = torch.tensor(1 - 0.01)
    H = torch.stack([edge, edge.nextafter(torch.tensor(0.0)), edge.nextafter(torch.tensor(1.0))])
    arguments = torch.zeros(3), H, layout.token, layout.offsets, "depth", 0.01, False
    assert_same(OPS.halt(*arguments), NATIVE.halt(*arguments))


def test_strides_of_rows():
    h, H, token, offsets = halt_arguments(ragged(4, 3, 2, 9))
    pair = torch.stack([h, H], -1)
    rest = (token, offsets, "rectangle", 0.01, False)
    found = OPS.halt(pair[:, 0], pair[:, 1], *rest)
    assert_same(found, NATIVE.halt(h, H, *rest))
    last = torch.stack([found[1], ~found[1]], -1)[:, 0]
    sent = torch.ones(()).expand(len(h)), pair[:, 0]
    assert_same(OPS.halt_backward(*sent, last, *rest[:3]),
                NATIVE.halt_backward(*sent, last, *rest[:3]))  # fmt: skip


@pytest.mark.parametrize("more", [1, 3000])
def test_rows_past_the_end_weigh_nothing(more):
    layout = ragged(6, 3, 2, 5)
    h, H, token, offsets = halt_arguments(layout)
    R, nan = layout.num_rows, torch.full((more,), torch.nan)
    want = OPS.halt(h, H, token, offsets, "rectangle", 0.01, False)
    h, H = torch.cat([h, nan]), torch.cat([H, nan])
    *found, steps = OPS.halt(h, H, token, offsets, "rectangle", 0.01, False)
    assert_same((*(x[:R] for x in found), steps), want)
    assert all(len(x) == R + more and not x[R:].any() for x in found)
    sent = torch.ones(R + more)
    back = OPS.halt_backward(sent, sent, found[1], token, offsets, "rectangle")
    assert all(not x[R:].any() for x in back)
    cut = found[1][:R], token, offsets, "rectangle"
    assert_same(tuple(x[:R] for x in back), NATIVE.halt_backward(sent[:R], sent[:R], *cut))


# -- readout --------------------------------------------------------------------------------------


def readout_arguments(layout, C, dtype=torch.float32):
    made = OPERATIONS["readout sized"].make(Numbers(8), layout, C, dtype)
    return made["x"], made["w"], made["sizes"]


def test_readout_of_any_strides():
    layout = TokenLayout.full(3, 2, 70)
    x, w, sizes = readout_arguments(layout, 6)
    want = NATIVE.readout(x, w, sizes, None, None)
    grad = Numbers(1).integers(-8, 8, (6, 2), bits=2).T
    want_grads = NATIVE.readout_backward(grad, x, w, sizes, None, None)
    for other in other_layouts(x):
        for weights in (w, w.transpose(0, 2).contiguous().transpose(0, 2)):
            assert torch.equal(OPS.readout(other, weights, sizes, None, None), want)
            found = OPS.readout_backward(grad, other, weights, sizes, None, None)
            assert_same(found, want_grads)
    rows = layout.pack(x), layout.pack(w)
    for other in other_layouts(rows[0]):
        arguments = other, rows[1], sizes.T.contiguous().T, layout.token, layout.offsets
        assert torch.equal(OPS.readout(*arguments), want)
        found = OPS.readout_backward(grad, *arguments)
        assert_same(found, NATIVE.readout_backward(grad, *arguments))


@pytest.mark.parametrize("sized", [False, True])
def test_readout_of_a_buffer_with_room(sized):
    layout = ragged(6, 3, 2, 70)
    x, w, sizes = readout_arguments(layout, 200)
    x, w, R = layout.pack(x), layout.pack(w), layout.num_rows
    rest = sizes if sized else None, layout.token, layout.offsets
    grad = Numbers(1).integers(-8, 8, (2, 200), bits=2)
    want, want_grads = NATIVE.readout(x, w, *rest), NATIVE.readout_backward(grad, x, w, *rest)
    x = torch.cat([x, torch.full((50, 200), torch.nan)])
    w = torch.cat([w, torch.full((50,), torch.nan)])
    assert torch.equal(OPS.readout(x, w, *rest), want)
    found = OPS.readout_backward(grad, x, w, *rest)
    assert_same(tuple(g[:R] for g in found), want_grads)


def test_tokens_without_a_weight_are_not_read_out():
    x, w, sizes = readout_arguments(SMALL, 4)
    x[1], w[1] = torch.nan, 0
    found = OPS.readout(x, w, sizes, None, None)
    assert torch.equal(found, NATIVE.readout(x, w, sizes, None, None)) and found.isfinite().all()


# -- layouts that are none ------------------------------------------------------------------------


def garbage(numbers, T, B, N):
    """Numbers of all sizes, as a token and offsets."""
    values = torch.tensor([0, 1, 2, 5, 9, -1, -7, 2**31, -(2**31), 2**40, BIG, -BIG - 1])
    picks = [torch.from_numpy(numbers.rng.integers(0, len(values), n)) for n in (B * N, T * B + 1)]
    return values[picks[0]].view(B, N), values[picks[1]]


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_backward" for name in NAMES)])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_outside_is_touched_whatever_the_layout_is(name, seed):
    arguments = operator_arguments(name)
    if "token" in arguments:
        arguments["token"], arguments["offsets"] = garbage(
            Numbers(seed), 2 if seed % 3 else 9, 2, 3
        )
    results = flat(getattr(OPS, name)(**arguments))
    want = flat(getattr(NATIVE, name)(**operator_arguments(name)))
    assert [x.shape for x in results] == [x.shape for x in want]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
@pytest.mark.parametrize("C", [0, 5])
def test_of_nothing_there_is_nothing(shape, C):
    layout = TokenLayout.full(*shape)
    x, w, sizes = torch.zeros(*shape, C), torch.zeros(shape), torch.ones(shape[1:])
    rows = layout.pack(x), layout.pack(w), sizes, layout.token, layout.offsets
    for given in ((x, w, sizes, None, None), rows):
        assert_same((OPS.readout(*given),), (torch.zeros(shape[1], C, dtype=torch.float64),))
        grad = torch.zeros(shape[1], C, dtype=torch.float64)
        assert_same(OPS.readout_backward(grad, *given), given[:2])
    h, token, offsets = torch.zeros(0), layout.token, layout.offsets
    *found, steps = OPS.halt(h, h, token, offsets, "rectangle", 0.01, False)
    assert all(len(row) == 0 for row in found) and torch.equal(steps, torch.zeros(shape[1:]).long())
    last = torch.zeros(0, dtype=torch.bool)
    assert all(len(g) == 0 for g in OPS.halt_backward(h, h, last, token, offsets, "depth"))


def test_a_readout_without_channels_still_has_gradients_of_weights():
    x, w = torch.zeros(2, 2, 3, 0), torch.ones(2, 2, 3)
    grad_x, grad_w = OPS.readout_backward(torch.zeros(2, 0).double(), x, w, None, None, None)
    assert grad_x.shape == x.shape and torch.equal(grad_w, torch.zeros_like(w))


def test_the_functions_take_the_backend():
    x = Numbers(2).normal((2, 2, 3, 4)).float()
    layout = TokenLayout.full(2, 2, 3)
    weight, bias = torch.tensor([0.5]), torch.tensor([-1.0])
    h = F.halting_scores(x, weight, bias, backend="triton")
    assert torch.equal(h, F.halting_scores(x, weight, bias, backend="native"))
    found = F.halt(layout.pack(h), torch.zeros(12), layout, backend="triton")
    assert_same(found, F.halt(layout.pack(h), torch.zeros(12), layout, backend="native"))
