"""The kit finds what it says it finds: planted mistakes, each by the cases named after it."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from torch import Tensor

import atsnn.functional as F
from atsnn import TokenLayout, reference
from atsnn.checks import InvalidType, InvalidValue
from atsnn.functional import MergePlan
from atsnn.kit import OPS
from atsnn.reference import SURROGATES
from atsnn.testing import ConformanceError, cases, check

# -- a neuron in plain PyTorch, with every mistake there is to make -------------------------------


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, surrogate, alpha, above):
        ctx.save_for_backward(z)
        ctx.settings = surrogate, alpha
        return (z > 0 if above else z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        surrogate, alpha = ctx.settings
        return grad * SURROGATES[surrogate].derivative(*ctx.saved_tensors, alpha), None, None, None


def charge(bug, v, x, kind, tau, inv_tau, rest, decay_input):
    if kind == "if":
        return v + x
    drive = x - (v - rest) if decay_input else v - rest
    sign = 1 if decay_input else -1
    after = 0 if decay_input else x
    if bug == "fused multiply-add":  # in float64, where the product is exact; rounded once
        divisor = torch.tensor(tau, dtype=x.dtype).double()
        wide = drive.double()
        product = wide / divisor if inv_tau is None else wide * inv_tau.double()
        return (v.double() + sign * product).to(x.dtype) + after
    if bug == "addcmul" and inv_tau is not None:
        factor = torch.full_like(drive, float(inv_tau)).double()
        return torch.addcmul(v.double(), drive.double(), factor, value=sign).to(x.dtype) + after
    if bug == "reciprocal" and inv_tau is None:
        return v + sign * (drive * (1 / torch.tensor(tau, dtype=x.dtype))) + after
    scaled = drive / torch.tensor(tau, dtype=x.dtype) if inv_tau is None else drive * inv_tau
    return v + scaled if decay_input else v - scaled + x


def step(bug, v, x, settings):
    """One timestep; ``settings`` are those of the neuron."""
    kind, tau, inv_tau, v_threshold, v_reset, decay_input, detach, surrogate, alpha = settings
    rest = 0.0 if v_reset is None else v_reset
    if bug == "reset first":
        v = torch.where(v >= v_threshold, torch.full_like(v, rest), v)
    u = charge(bug, v, x, kind, tau, inv_tau, rest, decay_input)
    s = Fire.apply(u - v_threshold, surrogate, alpha, bug == "above the threshold")
    if bug == "reset first":
        return s, u
    fired = s.detach() if detach and bug != "detach_reset ignored" else s
    soft = v_reset is None or bug == "soft for hard"
    if bug == "hard for soft":
        soft = False
    return s, u - fired * v_threshold if soft else (1 - fired) * u + fired * rest


def dense_neuron(bug, x, v, settings):
    spikes = []
    for x_t in x:
        s, v = step(bug, v, x_t, settings)
        spikes.append(s)
    return (torch.stack(spikes) if spikes else torch.empty_like(x)), v


def past(x: Tensor, rows: int) -> Tensor:
    """More rows than there are: what lies behind them in memory."""
    x = x.detach()
    return x.as_strided((x.shape[0] + rows, *x.shape[1:]), x.stride())


def packed_neuron(bug, x, v, settings, layout: TokenLayout):
    """Rank by rank, as a kernel would; ``past a run``: as if every run had N rows."""
    if bug in ("past a run", "past the end"):
        x = torch.cat([x, past(x, layout.N)[len(x) :]]) if x.stride(-1) == 1 else x
    rank = layout.token.argsort(1)
    spikes, state = {}, v.clone()
    ranked = list(state.gather(1, layout.token[:, :, None].expand(state.shape)).unbind(1))
    out = torch.zeros_like(x[: layout.num_rows])
    last = int(layout.offsets[-1])
    for t in range(layout.T):
        for b in range(layout.B):
            begin, end = layout.offsets[t * layout.B + b : t * layout.B + b + 2].tolist()
            for r in range(layout.N):
                active = begin + r < end
                row = begin + r
                reads = active
                if bug == "past a run":
                    reads = row < last
                elif bug == "past the end":
                    reads = active or row >= last
                if not reads and bug != "goes on after halting":
                    continue
                x_row = x[row] if reads else torch.zeros_like(x[0])
                s, u = step(bug, ranked[r][b], x_row, settings)
                ranked[r] = torch.stack([u if i == b else ranked[r][i] for i in range(layout.B)])
                if active:
                    spikes[row] = s
    if spikes:
        out = torch.stack([spikes[row] for row in range(last)])
    final = torch.stack(ranked, 1) if ranked else state
    if bug != "in rank order":
        final = final.gather(1, rank[:, :, None].expand(final.shape))
    return out, final


def neuron(
    x, v=None, *, kind="lif", tau=2.0, inv_tau=None, v_threshold=1.0, v_reset=0.0,
    decay_input=True, detach_reset=False, surrogate="sigmoid", alpha=None, layout=None, bug=None,
):  # fmt: skip
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    arithmetic = x.dtype if bug == "half precision" else dtype
    if bug == "writes into its input":
        x.detach().mul_(1.5)
    if v is None or bug == "state not carried in":
        shape = x.shape[1:] if layout is None else (layout.B, layout.N, x.shape[1])
        rest = 0.0 if v_reset is None or bug == "starts from 0" else v_reset
        v = x.new_full(shape, rest, dtype=arithmetic) + (0 * v if v is not None else 0)
    if alpha is None:
        alpha = 1.0 if bug == "another alpha" else SURROGATES[surrogate].alpha
    if bug == f"constant of {surrogate}":
        alpha = 1.25 * alpha
    inv_tau = inv_tau if inv_tau is None else inv_tau.to(arithmetic)
    settings = (kind, tau, inv_tau, v_threshold, v_reset, decay_input, detach_reset, surrogate,
                alpha)  # fmt: skip
    start, work = v.to(arithmetic), x.to(arithmetic)
    if layout is None:
        s, final = dense_neuron(bug, work, start, settings)
    else:
        # Reads past the end are of the memory that was handed over.
        s, final = packed_neuron(bug, x if x.dtype == arithmetic else work, start, settings, layout)
    if bug == "state not returned":
        final = start + 0 * final
    return s.to(x.dtype), final.to(dtype)


BUGS = {
    "fused multiply-add": [
        "no fused multiply-add",
        "no fused multiply-add, inv_tau learned",
        "no fused multiply-add, inv_tau learned, input not decayed",
    ],
    "addcmul": ["no fused multiply-add, inv_tau learned"],
    "reciprocal": ["a division by tau, no product with 1/tau"],
    "above the threshold": [
        "fires at the threshold exactly",
        "fires at the threshold exactly, kind if",
    ],
    "reset first": ["fires before it resets", "returns the membrane after the reset"],
    "soft for hard": ["a hard reset, to v_reset = 0", "a hard reset, to v_reset = -0.25"],
    "hard for soft": ["a soft reset, by v_threshold", "a soft reset, by v_threshold = 0.75"],
    "another alpha": ["gradient of the surrogate sigmoid", "gradient of the surrogate atan"],
    **{
        f"constant of {name}": [
            f"gradient of the surrogate {name}",
            f"gradient of the surrogate {name}, alpha = 1.5",
        ]
        for name in SURROGATES
    },
    "detach_reset ignored": [
        "gradient detached from a hard reset",
        "gradient detached from a soft reset",
    ],
    "state not carried in": [
        "starts from the membrane given",
        "gradient of the membrane given",
        "ragged: a token that never runs keeps the membrane given",
    ],
    "starts from 0": ["starts from v_reset where none is given"],
    "state not returned": ["returns the membrane after the last timestep"],
    "past a run": ["ragged: no read past the end of a run, where the next begins"],
    "past the end": ["ragged: no read past the last row"],
    "goes on after halting": ["ragged: a halted token keeps its membrane"],
    "in rank order": ["ragged: membranes are in token order"],
    "half precision": [
        "float16 in memory, float32 in arithmetic",
        "bfloat16 in memory, float32 in arithmetic",
    ],
}
# Cases that a mistake must leave alone: a name that says something else would mislead.
UNTOUCHED = {
    "fused multiply-add": ["a division by tau, no product with 1/tau"],
    "reciprocal": ["no fused multiply-add, inv_tau learned", "fires at the threshold exactly"],
    "soft for hard": ["a soft reset, by v_threshold"],
    "state not carried in": ["starts from v_reset where none is given"],
}


def failures(fn, op="neuron", only=None):
    report = check(fn, op, only=only, raises=False)
    assert not report.unsupported, str(report)
    return {f.case: f.detail for f in report.failures}


def test_a_correct_neuron_passes_everything():
    report = check(neuron)
    assert report.ok and {f.result for f in report.findings} == {"pass"}
    assert len(report.findings) == len(cases("neuron"))


@pytest.mark.parametrize("bug", BUGS)
def test_each_mistake_fails_the_cases_named_after_it(bug):
    named = BUGS[bug] + UNTOUCHED.get(bug, [])
    found = failures(partial(neuron, bug=bug), only=[f"neuron: {name}" for name in named])
    assert set(found) == set(BUGS[bug]), found
    for detail in found.values():
        assert "expected" in detail and "got" in detail and "differ)" in detail


def test_what_a_failure_says():
    found = failures(partial(neuron, bug="above the threshold"), only="*threshold exactly")
    assert found["fires at the threshold exactly"].startswith("spikes at [0, 0, 0, ")
    assert "(timestep 0): expected 1, got 0 (" in found["fires at the threshold exactly"]
    found = failures(partial(neuron, bug="past the end"), only="*past the last row")
    assert "got nan" in found["ragged: no read past the last row"]
    found = failures(partial(neuron, bug="constant of atan"), only="*surrogate atan")
    assert found["gradient of the surrogate atan"].startswith("gradient of x at [")

    def wrong_row(x, *, layout, **settings):
        s, v = F.neuron(x, layout=layout, **settings)
        s[layout.offsets[layout.B] + 1] += 1  # the second row of timestep 1
        return s, v

    layout = "neuron: ragged: no read past the end of a run, where the next begins"
    (detail,) = failures(wrong_row, only=layout).values()
    assert "(timestep 1, image 1, token 0)" in detail


# -- what is no wrong number ----------------------------------------------------------------------

FIRST = "neuron: starts from the membrane given"


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda x, v, **_: None, "expected 2 results, spikes, membrane; got NoneType"),
        (lambda x, v, **_: (x, v, v), "expected 2 results, spikes, membrane; got 3: (Tensor,"),
        (lambda x, v, **_: (x, 1.0), "membrane: expected a torch.Tensor, got float"),
        (lambda x, v, **_: (x[0], v), "spikes: expected torch.float32 of shape (6, 2, 3, 8)"),
        (lambda x, v, **_: (x, v.double()), "membrane: expected torch.float32 of shape"),
        (lambda x, v, **_: (x.to("meta"), v), "spikes: expected a tensor on cpu, got one on meta"),
        (lambda x, v, **_: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda x, v, **_: (torch.empty_like(x), v), "got nan"),
        (partial(neuron, bug="writes into its input"), "wrote into its argument x at [0, 0, 0, 0]"),
    ],
)  # fmt: skip
def test_results_of_another_kind_and_writes_are_failures(fn, message):
    report = check(fn, only=FIRST, raises=False)
    assert [f.result for f in report.findings] == ["fail"]
    assert message in report.failures[0].detail


def test_a_write_outside_of_an_input_is_a_failure():
    def kernel(x, **settings):
        x.as_strided((1,), (1,), x.storage_offset() - 1).zero_()
        return F.neuron(x, **settings)

    (detail,) = failures(kernel, only=FIRST).values()
    assert "wrote outside of its argument x" in detail

    def attend(q, k, v, *, layout, **settings):
        out = F.spiking_attention(q, k, v, layout=layout, **settings)
        layout.token[0, 0] += 1
        return out

    name = "spiking_attention: ragged: halted tokens left out"
    (detail,) = failures(attend, "spiking_attention", only=name).values()
    assert "wrote into its argument layout.token at [0, 0]: expected 0, got 1" in detail


def test_a_kernel_may_do_a_part():
    def kernel(x, v=None, *, tau=2.0, v_threshold=1.0, v_reset=0.0):
        if x.dtype != torch.float32:
            raise NotImplementedError("float32 alone")
        with torch.no_grad():
            return F.neuron(x, v, tau=tau, v_threshold=v_threshold, v_reset=v_reset)

    report = check(kernel)
    assert report.ok and "not supported" in report.counts
    reasons = {f.detail for f in report.unsupported}
    assert {"no parameter 'layout'", "no parameter 'kind'", "float32 alone"} <= reasons
    assert "no gradient: spikes does not require one" in reasons
    passed = {f.case for f in report.findings if f.result == "pass"}
    assert {"fires at the threshold exactly", "a soft reset, by v_threshold"} <= passed
    assert "no parameter 'layout'" in str(report)


def test_the_error_is_the_table_of_failures():
    with pytest.raises(ConformanceError, match="starts from the membrane given") as caught:
        check(partial(neuron, bug="state not carried in"))
    assert isinstance(caught.value, AssertionError) and not caught.value.report.ok
    text = str(caught.value)
    assert text.splitlines()[0] == "neuron as neuron on cpu, against the reference"
    assert text.splitlines()[-1] == caught.value.report.counts


def test_wrong_use():
    with pytest.raises(InvalidValue, match="op must be one of 'neuron', .*, got 'neurons'"):
        check(neuron, "neurons")
    with pytest.raises(InvalidType, match="fn must be a function, got int"):
        check(3)
    with pytest.raises(InvalidValue, match="x, w; got a function without w"):
        check(lambda x: x, "readout")
    with pytest.raises(InvalidValue, match="only must name cases of neuron"):
        check(neuron, only="no such case")
    with pytest.raises(InvalidValue, match="device must be one that is here, got 'nowhere'"):
        check(neuron, device="nowhere")


def test_gradients_can_be_left_out():
    assert all(case.leaves == () for case in cases("neuron", gradients=False))
    found = check(partial(neuron, bug="detach_reset ignored"), gradients=False)
    assert found.ok and torch.are_deterministic_algorithms_enabled() is not False


# -- our own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_our_backends_pass(backend, op):
    report = check(partial(getattr(F, op), backend=backend), op)
    assert {f.result for f in report.findings} == {"pass"}
    names = [case.name for case in cases(op)]
    assert len(set(names)) == len(names)


# -- the other operations -------------------------------------------------------------------------


def attention(q, k, v, *, num_heads, scale=0.125, sizes=None, layout=None, bug=None):
    if bug == "no scale":
        scale = 1.0
    if bug == "sizes ignored":
        sizes = None
    if bug == "heads ignored":
        num_heads = 1
    if bug == "half precision":
        weight = 1 if sizes is None else sizes.to(q.dtype)[None, :, :, None]
        if layout is not None:
            return F.spiking_attention(q, k, v, num_heads=num_heads, scale=scale, sizes=sizes,
                                       layout=layout)  # fmt: skip
        heads = (*q.shape[:3], num_heads, -1)
        q, k, v = (x.view(heads).transpose(2, 3) for x in (q, k, (v * weight).to(v.dtype)))
        out = (q @ (k.transpose(-2, -1) @ v)) * scale
        return out.transpose(2, 3).flatten(3)
    if bug == "softmax" and layout is None:
        heads = (*q.shape[:3], num_heads, -1)
        q, k, v = (x.reshape(heads).transpose(2, 3) for x in (q, k, v))
        return ((q @ k.transpose(-2, -1) * scale).softmax(-1) @ v).transpose(2, 3).flatten(3)
    if bug == "halted included" and layout is not None:
        return _every_run_whole(q, k, v, num_heads, scale, sizes, layout)
    return F.spiking_attention(q, k, v, num_heads=num_heads, scale=scale, sizes=sizes,
                               layout=layout)  # fmt: skip


def _every_run_whole(q, k, v, num_heads, scale, sizes, layout):
    """Sums over N rows from where a run begins, whoever's they are."""
    out = torch.empty_like(q)
    for run, (begin, end) in enumerate(zip(layout.offsets[:-1], layout.offsets[1:], strict=True)):
        b = run % layout.B
        whole = slice(int(begin), min(int(begin) + layout.N, len(q)))
        size = None
        if sizes is not None:
            size = sizes[b, layout.token[b]][: whole.stop - whole.start][None]
        part = F.spiking_attention(
            *(x[whole][None, None] for x in (q, k, v)), num_heads=num_heads, scale=scale, sizes=size
        )
        out[begin:end] = part[0, 0, : end - begin]
    return out


def gate(q, k, v, *, bug=None, sizes=None, layout=None, **settings):
    settings["return_state"] = settings.get("return_state", False)
    if bug == "sizes ignored":
        sizes = None
    if bug == "state not carried in":
        settings.pop("state", None)
    if bug == "another threshold":
        settings["v_threshold"] = 1.0
    return F.spike_driven_attention(q, k, v, sizes=sizes, layout=layout, **settings)


def match(counts, *, r=None, threshold=None, active_steps=None, bug=None, **settings):
    if bug == "lifetimes ignored":
        active_steps = None
    if bug == "at the threshold" and threshold is not None:
        threshold = threshold - 1e-9
    if bug == "ties the wrong way":
        # Against the order of tokens, as a scan from the end would go.
        back = None if active_steps is None else active_steps.flip(1)
        plan = F.match_tokens(counts.flip(1), r=r, threshold=threshold, active_steps=back)
        return MergePlan.of(counts.shape[1] - 1 - plan.target.flip(1))
    if bug in ("product of counts", "silent tokens like no other"):
        same = reference.firing_similarity

        def product(c):
            return c.double() @ c.double().transpose(1, 2)

        def cosine(c):
            return same(c) * (product(c) > 0)

        try:
            reference.firing_similarity = product if bug == "product of counts" else cosine
            return reference.match_tokens(counts, r, threshold, active_steps)
        finally:
            reference.firing_similarity = same
    return F.match_tokens(counts, r=r, threshold=threshold, active_steps=active_steps)


def merge(x, plan, *, sizes=None, layout=None, bug=None):
    if bug == "sizes forgotten":
        sizes = None
    if bug == "not rounded":
        ones = torch.ones(plan.shape) if sizes is None else sizes
        return reference.merge_tokens(x, plan, ones, bits=40) if layout is None else F.merge_tokens(
            x, plan, sizes=sizes, layout=layout)  # fmt: skip
    out = F.merge_tokens(x, plan, sizes=sizes, layout=layout)
    return out.half().to(x.dtype) if bug == "all rounded" else out


def readout(x, w, *, sizes=None, layout=None, bug=None):
    if bug == "sizes ignored":
        sizes = None
    if bug == "float32 sums" and layout is None:
        weight = w if sizes is None else w * sizes
        return torch.einsum("tbn,tbnc->bc", weight, x.float()).double()
    out = F.readout(x, w, sizes=sizes, layout=layout)
    if bug == "a mean":
        return out / (x.shape[0] if layout is None else layout.T)
    return out


def halt(h, H, layout, *, accumulator="rectangle", eps=0.01, final=False, bug=None):
    if bug == "no sum over time":
        accumulator = "depth"
    if bug == "goes on at 1 - eps":
        eps = eps - 1e-6
    return F.halt(h, H, layout, accumulator=accumulator, eps=eps,
                  final=final and bug != "no remainder")  # fmt: skip


OTHERS = {
    (attention, "spiking_attention"): {
        "no scale": ["the result is scaled, 0.125", "the result is scaled, 0.25"],
        "sizes ignored": ["sizes weigh the tokens", "ragged: halted tokens left out, sized"],
        "halted included": ["ragged: halted tokens left out"],
        "softmax": ["sums, no softmax"],
        "heads ignored": ["heads apart", "heads of one channel"],
        "half precision": ["float16 in memory, float32 in sums"],
    },
    (gate, "spike_driven_attention"): {
        "sizes ignored": ["sizes weigh the tokens"],
        "state not carried in": ["starts from the potential given"],
        "another threshold": ["fires at the threshold exactly"],
    },
    (match, "match_tokens"): {
        "ties the wrong way": ["ties go to the lower index"],
        "lifetimes ignored": ["equal lifetimes only", "tokens that never run stay out"],
        "at the threshold": ["no pair at the threshold itself"],
        "product of counts": ["a cosine, no product of counts"],
        "silent tokens like no other": ["silent tokens are alike"],
    },
    (merge, "merge_tokens"): {
        "sizes forgotten": ["means weighed by size", "gradient, by size"],
        "not rounded": ["means rounded to 2^-8, ties to even"],
        "all rounded": ["tokens that take none in are left as they are"],
    },
    (readout, "readout"): {
        "sizes ignored": ["sizes weigh the tokens", "ragged: sizes are those of the tokens"],
        "float32 sums": ["summed in float64"],
        "a mean": ["a sum weighed by w, no mean"],
    },
    (halt, "halt"): {
        "no sum over time": ["a rectangle adds up over time"],
        "goes on at 1 - eps": ["an accumulator at 1 - eps stops"],
        "no remainder": ["the last block takes the remainder"],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "fn, op, bug",
    [(fn, op, bug) for (fn, op), bugs in OTHERS.items() for bug in (None, *bugs)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_mistakes_of_other_operations(fn, op, bug):
    found = failures(functools.partial(fn, bug=bug), op)
    assert set(OTHERS[fn, op].get(bug, [])) <= set(found), found
    assert bug or not found
