"""What does not fit is refused, with a message that says what was expected and what came.

The operators must be safe from any caller: no mistake may reach a kernel. The functions above them
raise atsnn's own errors for the same mistakes.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from cases import OPERATORS, SMALL, operator_arguments, signature

import atsnn.functional as F
from atsnn import TokenLayout
from atsnn.checks import InvalidType, InvalidValue
from atsnn.reference import MergePlan

BIG = 2**63 - 1
BACKENDS = ("native", "reference")


def call(name, arguments):
    return getattr(torch.ops.atsnn, name)(**arguments)


# -- layouts --------------------------------------------------------------------------------------

TOKEN = [[0, 1, 2], [0, 1, 2]]
OFFSETS = [0, 2, 5, 6, 8]


def test_the_layout_of_the_tables():
    assert SMALL.token.tolist() == TOKEN and SMALL.offsets.tolist() == OFFSETS


def offsets(*values):
    return TOKEN, list(values)


# What is done to the layout of 2 timesteps, 2 images, 3 tokens, and what is said of it.
DAMAGE = {
    "offsets begin late": (offsets(1, 2, 5, 6, 8), r"offsets\[0\] must be 0, got 1"),
    "offsets decrease": (offsets(0, 2, 1, 6, 8), r"not decrease, got 2 before offsets\[2\] = 1"),
    "offsets are negative": (offsets(0, -3, 5, 6, 8), "not decrease, got 0 before"),
    "offsets are huge": (offsets(0, BIG, BIG, BIG, BIG), "(at most 3|end at the number of rows)"),
    "offsets end far away": (offsets(0, 2, 5, 6, BIG), "(at most 3|end at the number of rows)"),
    "differences overflow": (offsets(0, -BIG - 1, BIG, 6, 8), "not decrease, got 0 before"),
    "a difference wraps to one that fits": (
        offsets(0, BIG, -BIG, 6, 8), "(at most 3|not decrease|end at the number of rows)",
    ),
    "more than the tokens": (offsets(0, 4, 5, 6, 8), "at most 3 active tokens at timestep 0"),
    "a token comes back": (offsets(0, 2, 5, 8, 8), "at most 2 active tokens at timestep 1"),
    "too few offsets": (offsets(0, 2, 5, 8), r"shape \[T \* B \+ 1\] with B = 2, got \[4\]"),
    "no offsets": (offsets(), r"offsets must have shape \[T \* B \+ 1\].*got \[0\]"),
    "offsets in two dimensions": ((TOKEN, [OFFSETS]), r"offsets must have shape.*got \[1, 5\]"),
    "a token out of range": (([[0, 1, 3], TOKEN[1]], OFFSETS), "each token 0 .. 2 once, got 3"),
    "a negative token": (([[0, 1, 2], [0, 1, -1]], OFFSETS), "each token 0 .. 2 once, got -1"),
    "a huge token": (([[0, 1, BIG], TOKEN[1]], OFFSETS), "each token 0 .. 2 once, got 9223"),
    "a token twice": (([[0, 1, 2], [1, 0, 1]], OFFSETS),
                      "once, got 1 at rank 2 of image 1"),
    "tokens in one dimension": (([0, 1, 2], OFFSETS), r"token must have shape \[B, N\], got"),
    "tokens of no image": ((torch.zeros(0, 3, dtype=torch.int64), OFFSETS), "with B = 0"),
    "offsets of another type": (
        (TOKEN, torch.tensor(OFFSETS, dtype=torch.int32)), "offsets must be Long, got Int"),
    "real offsets": ((TOKEN, torch.tensor(OFFSETS).double()), "offsets must be Long, got Double"),
    "tokens of another type": (
        (torch.tensor(TOKEN, dtype=torch.int32), OFFSETS), "token must be Long, got Int"),
    "real tokens": ((torch.tensor(TOKEN).float(), OFFSETS), "token must be Long, got Float"),
}  # fmt: skip
# Each layout that an operator takes.
PREFIXES = [
    (name, prefix)
    for name in sorted(OPERATORS)
    for prefix in ("", "to_")
    if f"{prefix}token" in signature(name)
]
LEFT_OUT = [(name, p) for name, p in PREFIXES if name not in ("layout_cells", "moved_rows", "halt",
                                                              "halt_backward")]  # fmt: skip


def tensor(values):
    return torch.tensor(values, dtype=torch.int64) if isinstance(values, list) else values


@pytest.mark.parametrize(("name", "prefix"), PREFIXES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_operators_refuse_layouts_that_are_none(name, prefix, damage):
    parts, message = DAMAGE[damage]
    arguments = operator_arguments(name)
    # The layout of an unmerge's rows is that after the merge, which merged nothing here.
    if "target" in arguments:
        arguments["target"] = torch.arange(3).repeat(2, 1)
        whole = dict(token=SMALL.token, offsets=SMALL.offsets, rows=None)
        arguments |= whole | {f"to_{key}": whole[key] for key in ("token", "offsets")}
        for key in ("y", "grad"):
            if key in arguments:
                arguments[key] = torch.zeros(SMALL.num_rows, 4)
        call(name, arguments)  # fits as it is
    arguments[f"{prefix}token"], arguments[f"{prefix}offsets"] = map(tensor, parts)
    error = TypeError if "Long" in message else ValueError
    with pytest.raises(error, match=f"{name}.*: .*(the layout|layouts?).*{message}"):
        call(name, arguments)


@pytest.mark.parametrize(("name", "prefix"), LEFT_OUT)
@pytest.mark.parametrize("part", ["token", "offsets"])
def test_operators_refuse_half_a_layout(name, prefix, part):
    arguments = operator_arguments(name)
    arguments[prefix + part] = None
    with pytest.raises(ValueError, match=r"layout.*(both|neither)|(both|neither).*layout"):
        call(name, arguments)


@pytest.mark.parametrize("name", [n for n in sorted(OPERATORS) if "to_token" in signature(n)])
@pytest.mark.parametrize("prefix", ["", "to_"])
def test_operators_refuse_one_layout_of_two(name, prefix):
    if name == "moved_rows":
        pytest.skip("its layouts cannot be left out")
    arguments = operator_arguments(name)
    arguments |= dict.fromkeys((f"{prefix}token", f"{prefix}offsets"))
    with pytest.raises(ValueError, match=r"layouts must|must have"):
        call(name, arguments)


ROWS = [
    (name, key)
    for name, keys in {
        "neuron": "x", "neuron_backward": "x grad_spikes", "spiking_attention": "q k v",
        "spiking_attention_backward": "q k v grad", "spike_driven_attention": "q k v",
        "spike_driven_attention_backward": "q k v grad", "firing_counts": "keys",
        "merge_tokens": "x", "merge_tokens_backward": "grad", "unmerge_tokens": "y",
        "unmerge_tokens_backward": "grad", "halt": "h H", "halt_backward": "last grad_w grad_H",
        "readout": "x w", "readout_backward": "x w", "take_rows_backward": "grad",
        "halting_scores_backward": "grad",
    }.items()
    for key in keys.split()
]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), ROWS)
@pytest.mark.parametrize("change", [-1, 1])
def test_operators_refuse_rows_that_are_missing_or_too_many(name, key, change):
    arguments = operator_arguments(name)
    x = arguments[key]
    arguments[key] = x[:change] if change < 0 else torch.cat([x, x[:1]])
    with pytest.raises(ValueError, match=r"(must (have|end|lie)).*got"):
        call(name, arguments)


# -- everything else that an operator is given ----------------------------------------------------


def changed(**changes):
    return lambda a: a | changes


def of(key, change):
    return lambda a: a | {key: change(a[key])}


NEURON = ("neuron", "neuron_backward")
SPIKING = ("spiking_attention", "spiking_attention_backward")
DRIVEN = ("spike_driven_attention", "spike_driven_attention_backward")
MERGE = ("merge_tokens", "merge_tokens_backward")
PLANS = (*MERGE, "unmerge_tokens", "unmerge_tokens_backward")
SIZED = (*SPIKING, *DRIVEN, *MERGE, "readout", "readout_backward")
SCORES = ("halting_scores", "halting_scores_backward")
HALT = ("halt", "halt_backward")
TAKE = ("take_rows", "take_rows_backward")
V, T = ValueError, TypeError

MISTAKES = [
    (NEURON, of("v", lambda v: v[:, :2]), V, r"v must have shape \[2, 3, 4\], got \[2, 2, 4\]"),
    (NEURON, of("v", lambda v: v.double()), T, "v must be Float, got Double"),
    (NEURON, of("x", lambda x: x[..., None]), V, r"x must have shape \[R, C\], got"),
    (NEURON, of("x", lambda x: x.int()), T, "Int"),
    (NEURON, changed(surrogate="relu"), V, "unknown surrogate 'relu'"),
    (NEURON, changed(kind="spike"), V, "kind must be one of .*'spike'|unknown kind 'spike'"),
    (NEURON, changed(inv_tau=None), V, "needs inv_tau"),
    (("neuron_backward",), of("grad_v", lambda v: v[:1]), V, "grad_v must have shape"),
    ((*SPIKING, *DRIVEN), of("k", lambda k: k[:, :3]), V, r"k must have shape \[8, 4\], got"),
    ((*SPIKING, *DRIVEN), of("v", lambda v: v.double()), T, "v must be Float, got Double"),
    ((*SPIKING, *DRIVEN), lambda a: a | {k: a[k].int() for k in "qkv"}, T, "Int"),
    (SPIKING, changed(num_heads=3), V, "num_heads must divide the 4 channels, got 3"),
    (SPIKING, changed(num_heads=0), V, "num_heads must divide the 4 channels, got 0"),
    (SPIKING, changed(num_heads=-2), V, "num_heads must divide the 4 channels, got -2"),
    (SPIKING[1:], of("grad", lambda g: g[:, :2]), V, r"grad must have shape \[8, 4\], got"),
    (SPIKING[1:], of("grad", lambda g: g.double()), T, "grad must be Float, got Double"),
    (DRIVEN, of("state", lambda s: s[:, 0]), V, r"state must have shape \[2, 1, 4\], got \[2, 4\]"),
    (DRIVEN, of("state", lambda s: s.double()), T, "state must be Float, got Double"),
    (DRIVEN, changed(surrogate="relu"), V, "unknown surrogate 'relu'"),
    (DRIVEN[1:], of("grad_state", lambda s: s[:1]), V, "grad_state must have shape"),
    (SIZED, of("sizes", lambda s: s.T), V, r"sizes must have shape \[2, 3\], got \[3, 2\]"),
    (SIZED, of("sizes", lambda s: s[:1]), V, r"sizes must have shape \[2, 3\], got \[1, 3\]"),
    (SIZED, of("sizes", lambda s: s.flatten()), V, r"sizes must have shape \[2, 3\], got \[6\]"),
    (TAKE, of("index", lambda i: i.index_fill(0, tensor([2]), 8)), V,
     "index must lie in 0 .. 7, got 8 at position 2"),
    (TAKE, of("index", lambda i: i.index_fill(0, tensor([0]), -1)), V,
     "index must lie in 0 .. 7, got -1 at position 0"),
    (TAKE, of("index", lambda i: i.index_fill(0, tensor([0]), BIG)), V, "got 9223372036854775807"),
    (TAKE, of("index", lambda i: i.int()), T, "index must be Long, got Int"),
    (TAKE[:1], of("index", lambda i: i[:8].view(2, 4)), V, r"index must have shape \[R\], got"),
    (TAKE[:1], lambda a: a | {"x": torch.tensor(1.0)}, V, r"x must have shape \[R, ...\]"),
    (TAKE[1:], changed(rows=3), V, "index must lie in 0 .. 2, got 3"),
    (TAKE[1:], changed(rows=-1), V, "rows must be at least 0, got -1"),
    (("firing_counts",), of("keys", lambda k: k[..., None]), V, r"keys must have shape"),
    (("match_tokens",), of("counts", lambda c: c[0]), V, r"counts must have shape \[B, N, C\]"),
    (("match_tokens",), of("active_steps", lambda n: n.T), V, r"shape \[2, 3\], got \[3, 2\]"),
    (("match_tokens",), of("active_steps", lambda n: n.int()), T, "must be Long, got Int"),
    (("match_tokens",), changed(threshold=0.5), V, "exactly one of r and threshold"),
    (("match_tokens",), changed(r=None), V, "exactly one of r and threshold"),
    (("match_tokens",), changed(r=-1), V, "r must be at least 0, got -1"),
    (PLANS, of("target", lambda t: t[:1]), V, r"target must have shape \[2, 3\], got \[1, 3\]"),
    (PLANS, of("target", lambda t: t.T), V, r"target must have shape \[2, 3\], got \[3, 2\]"),
    (PLANS, of("target", lambda t: t.int()), T, "target must be Long, got Int"),
    (PLANS, changed(target=tensor([[0, 1, 2], [0, 3, 2]])), V,
     "targets must lie in 0 .. 2, got 3 for token 1 of image 1"),
    (PLANS, changed(target=tensor([[0, -1, 2], [0, 1, 2]])), V, "got -1 for token 1 of image 0"),
    (PLANS, changed(target=tensor([[0, 1, BIG], [0, 1, 2]])), V, "got 9223372036854775807"),
    (PLANS, changed(target=tensor([[0, 1, 2], [1, 0, 2]])), V,
     "must stay, got token 1 of image 1, which merges into 0"),
    (PLANS, changed(target=tensor([[1, 2, 2], [0, 1, 2]])), V, "must stay, got token 1"),
    # Token 2 of image 0 is never active: it cannot be in the rows of token 0.
    (PLANS, changed(target=tensor([[0, 1, 0], [0, 1, 2]])), V,
     "token 2 of image 0 must be active for the 2 timesteps of the token that holds it, 0, got 0"),
    (PLANS, changed(rows=99), V, r"rows must be \d+ for this layout, got 99"),
    (MERGE[:1], changed(bits=-1), V, "bits must lie in 0 .. 52, got -1"),
    (MERGE[:1], changed(bits=4096), V, "bits must lie in 0 .. 52, got 4096"),
    (SCORES, changed(score="last"), V, "unknown score 'last'"),
    (SCORES, changed(score="linear"), V, r"weight must have 4 elements, got \[\]"),
    (SCORES, of("weight", lambda w: w.repeat(4)), V, r"weight must have 1 elements?, got \[4\]"),
    (SCORES, of("bias", lambda b: b.repeat(2)), V, r"bias must have 1 element, got \[2\]"),
    (SCORES, of("x", lambda x: x[:, :0]), V, r"x must have shape \[..., C\] with C >= 1"),
    (SCORES[:1], of("x", lambda x: x.int()), T, "Int"),
    (SCORES[1:], of("grad", lambda g: g[:, None]), V, r"grad must have shape \[8\], got \[8, 1\]"),
    (SCORES[1:], of("grad", lambda g: g.double()), T, "grad must be Float, got Double"),
    (HALT, changed(accumulator="sequential"), V, "accumulator must be .* got 'sequential'"),
    (HALT[:1], of("H", lambda h: h[:, None]), V, r"H must have shape \[R\], got \[8, 1\]"),
    (HALT[:1], of("h", lambda h: h.double()), T, "h must be Float, got Double"),
    (HALT[1:], of("last", lambda x: x.float()), T, "last must be Bool, got Float"),
    (("readout", "readout_backward"), of("x", lambda x: x[:, 0]), V, "x must have shape"),
    (("readout", "readout_backward"), of("w", lambda w: w[:, None]), V, r"w must have shape \[8\]"),
    (("readout", "readout_backward"), of("w", lambda w: w.double()), T, "w must be Float, got D"),
    (("readout_backward",), of("grad", lambda g: g.T), V, r"grad must have shape \[2, 4\], got"),
    (("readout_backward",), of("grad", lambda g: g.float()), T, "grad must be Double, got Float"),
    (("token_layout",), changed(T=1), V, "active_steps must lie in 0 .. T = 1, got 2"),
    (("token_layout",), changed(T=-1), V, "T must lie in 0 .. 1048576, got -1"),
    (("token_layout",), of("active_steps", lambda n: -n), V, "must lie in 0 .. T = 2, got -2"),
    (("token_layout",), of("active_steps", lambda n: n[0]), V, r"must have shape \[B, N\], got"),
    (("token_layout",), of("active_steps", lambda n: n.int()), T, "must be Long, got Int"),
    (("moved_rows",), changed(to_token=tensor([[0, 1, 2]]), to_offsets=tensor([0, 1, 2])), V,
     "both layouts must have the same T, B, N, got 2, 2, 3 and 2, 1, 3"),
    (("moved_rows",), changed(to_token=SMALL.token, to_offsets=tensor([0, 3, 6, 7, 9])), V,
     "every cell of the new layout must be active in the old one"),
]  # fmt: skip
CALLS = [
    (name, change, error, message) for names, change, error, message in MISTAKES for name in names
]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), CALLS, ids=[f"{c[0]}: {c[3][:40]}" for c in CALLS]
)
def test_operators_refuse_what_does_not_fit(name, change, error, message):
    arguments = change(operator_arguments(name))
    if name.startswith("unmerge") and "target" in arguments:
        # Of layouts that merged nothing, so that what is wrong is the plan alone.
        arguments |= dict(
            token=SMALL.token, offsets=SMALL.offsets, to_token=SMALL.token,
            to_offsets=SMALL.offsets, rows=arguments["rows"] if arguments["rows"] == 99 else None,
        )  # fmt: skip
        arguments["y" if "y" in arguments else "grad"] = torch.zeros(8, 4)
    with pytest.raises(error, match=message):
        call(name, arguments)


# -- what must not end the process ----------------------------------------------------------------

NONE = "torch.zeros(2, 2, 3, 0, requires_grad=True)"
ROWS_OF_NONE = "torch.zeros(6, 0, requires_grad=True)"
FULL = "TokenLayout.full(1, 2, 3)"
# What is called, and whether there is a result. Each in a process of its own, which a kernel that
# runs away would end.
EXTREMES = {
    "T * B overflows": (
        "torch.ops.atsnn.token_layout(torch.zeros(4, 3, dtype=torch.int64), 2**62)", False
    ),
    "T * B overflows in a layout": (
        "TokenLayout.from_active_steps(torch.zeros(4, 3, dtype=torch.int64), 2**62)", False
    ),
    "T is huge": ("TokenLayout.full(2**61, 1, 3)", False),
    "too many rows": (
        "torch.ops.atsnn.take_rows_backward(torch.zeros(1, 0), torch.zeros(1, dtype=torch.int64),"
        " 2**60)", False,
    ),
    "attention without channels": (
        f"F.spiking_attention(*[{NONE}] * 3, num_heads=1).sum().backward()", True
    ),
    "packed attention without channels": (
        f"F.spiking_attention(*[{ROWS_OF_NONE}] * 3, num_heads=2, layout={FULL}).sum().backward()",
        True,
    ),
    "gating without channels": (
        f"F.spike_driven_attention(*[{NONE}] * 3, num_heads=1).sum().backward()", True
    ),
    "readout without channels": (
        f"F.readout({NONE}, torch.zeros(2, 2, 3, requires_grad=True)).sum().backward()", True
    ),
    "neurons without channels": (
        f"F.neuron({ROWS_OF_NONE}, layout={FULL})[0].sum().backward()", True
    ),
    "matching without channels": (
        f"F.merge_tokens({NONE}, F.match_tokens(F.firing_counts({NONE}), r=1)).sum().backward()",
        True,
    ),
    "taking without channels": (
        f"F.take_rows({ROWS_OF_NONE}, {FULL}, {FULL}).sum().backward()", True
    ),
}  # fmt: skip
EXTREME_CODE = """
import os, torch, atsnn.functional as F
from atsnn import TokenLayout
for code, fits in {cases}:
    child = os.fork()
    if not child:
        try:
            exec(code)
            os._exit(0 if fits else 1)
        except (ValueError, RuntimeError, MemoryError):
            os._exit(1 if fits else 0)
    print(os.waitpid(child, 0)[1])
"""


def test_extremes_end_in_a_result_or_an_error():
    """Not in a signal, and not in the other of the two."""
    code = EXTREME_CODE.format(cases=list(EXTREMES.values()))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    status = dict(zip(EXTREMES, map(int, result.stdout.split()), strict=True))
    assert not any(status.values()), {name: code for name, code in status.items() if code}


# -- layouts in Python ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGE)
def test_from_parts_refuses_layouts_that_are_none(damage):
    parts, message = DAMAGE[damage]
    error = InvalidType if "Long" in message else InvalidValue
    with pytest.raises(error, match=r"(token|offsets) must.* got"):
        TokenLayout.from_parts(*map(tensor, parts))


FIELDS = {
    "token of another order": dict(token=tensor([[1, 0, 2], [0, 1, 2]])),
    "token twice": dict(token=tensor([[0, 1, 2], [1, 1, 2]])),
    "token out of range": dict(token=tensor([[0, 1, 3], [0, 1, 2]])),
    "token of another batch": dict(token=tensor(TOKEN)[:1]),
    "offsets decrease": dict(offsets=tensor([0, 2, 1, 6, 8])),
    "offsets overflow": dict(offsets=tensor([0, BIG, -BIG, 6, 8])),
    "offsets are short": dict(offsets=tensor([0, 2, 5, 6])),
    "another T": dict(T=3),
    "a negative T": dict(T=-1),
    "another B": dict(B=1),
    "another N": dict(N=4),
    "another number of rows": dict(num_rows=7),
    "other active steps": dict(active_steps=tensor([[2, 2, 0], [2, 2, 1]])),
    "active steps out of range": dict(active_steps=tensor([[3, 1, 0], [2, 2, 1]])),
    "active steps of one dimension": dict(active_steps=tensor([2, 1, 0])),
}
TYPES = {
    "token is a list": dict(token=TOKEN),
    "offsets are a list": dict(offsets=OFFSETS),
    "token of int32": dict(token=SMALL.token.int()),
    "offsets of float64": dict(offsets=SMALL.offsets.double()),
    "active steps of float32": dict(active_steps=SMALL.active_steps.float()),
    "T is a float": dict(T=2.0),
}


@pytest.mark.parametrize("change", FIELDS)
def test_a_layout_cannot_be_made_of_parts_that_disagree(change):
    with pytest.raises(InvalidValue, match="TokenLayout: .* must .*got"):
        dataclasses.replace(SMALL, **FIELDS[change])


@pytest.mark.parametrize("change", TYPES)
def test_a_layout_cannot_be_made_of_other_types(change):
    with pytest.raises(InvalidType, match="TokenLayout: .* must .*got"):
        dataclasses.replace(SMALL, **TYPES[change])


def test_a_layout_can_be_made_of_its_own_parts():
    """The refusals above are of what was changed."""
    assert dataclasses.replace(SMALL).num_rows == 8
    assert TokenLayout.from_parts(SMALL.token, SMALL.offsets).num_rows == 8


# -- the functions --------------------------------------------------------------------------------

X = torch.zeros(8, 4)
KEPT = MergePlan.of(tensor(TOKEN))
OTHER = TokenLayout.full(2, 2, 3)
QKV = dict(q=X, k=X, v=X, num_heads=2)


def plan(*target):
    return MergePlan.of(tensor(list(target)))


BAD_PLANS = {
    "out of range": ([[0, 1, 2], [0, 3, 2]], "0 .. 2, got 3"),
    "negative": ([[0, -1, 2], [0, 1, 2]], "0 .. 2, got -1"),
    "does not stay": ([[0, 1, 2], [1, 0, 2]], "must stay, got token 1"),
    "chained": ([[1, 2, 2], [0, 1, 2]], "must stay, got token 1"),
    "never active": ([[0, 1, 0], [0, 1, 2]], "must be active for the 2 timesteps"),
}

BAD = [
    (F.neuron, dict(x=X[:7]), InvalidValue, r"x must have shape .* = \(8, \*\), got \(7, 4\)"),
    (F.neuron, dict(x=X, v=X[:3]), InvalidValue, r"\(B, N, C\), \(2, 3, 4\), got \(3, 4\)"),
    (F.spiking_attention, QKV | dict(q=X[:7]), InvalidValue, r"q must have .* got \(7, 4\)"),
    (F.spiking_attention, QKV | dict(k=X[:7]), InvalidValue, r"k must have .* got \(7, 4\)"),
    (F.spiking_attention, QKV | dict(sizes=torch.ones(3, 2)), InvalidValue, r"sizes must .*\(3, 2"),
    (F.spike_driven_attention, QKV | dict(v=X[:7]), InvalidValue, r"v must have .* got \(7, 4\)"),
    (F.spike_driven_attention, QKV | dict(state=X), InvalidValue, r"state must have .* got \(8, 4"),
    (F.firing_counts, dict(keys=X[:7]), InvalidValue, r"keys must have .* got \(7, 4\)"),
    (F.readout, dict(x=X[:7], w=X[:7, 0]), InvalidValue, r"x must have .* got \(7, 4\)"),
    (F.readout, dict(x=X, w=X[:7, 0]), InvalidValue, r"w must have shape .* got \(7\)"),
    (F.readout, dict(x=X, w=X[:, 0].double()), InvalidType, "w must be one of float32, got"),
    (F.readout, dict(x=X, w=X[:, 0], sizes=torch.ones(2, 2)), InvalidValue, "sizes must have"),
    (F.halt, dict(h=X[:7, 0], H=X[:, 0]), InvalidValue, r"h must have shape .* got \(7\)"),
    (F.halt, dict(h=X[:, 0], H=X[:7, 0]), InvalidValue, r"H must have shape .* got \(7\)"),
    (F.halt, dict(h=X[:, 0].double(), H=X[:, 0]), InvalidType, "h must be one of float32, got"),
    (F.halt, dict(h=X[:, 0], H=X[:, 0], accumulator="sequential"), InvalidValue, "accumulator"),
    (F.halt, dict(h=X[:, 0], H=X[:, 0], eps=1.0), InvalidValue, "eps must be .* got 1.0"),
    (F.take_rows, dict(x=X[:7], to=SMALL), InvalidValue, r"must have 8 rows, got shape \(7, 4\)"),
    (F.take_rows, dict(x=X, to=TokenLayout.full(2, 2, 4)), InvalidValue, r"got \(2, 2, 4\)"),
    (F.take_rows, dict(x=X, to=OTHER), InvalidValue, "every cell of the new layout must be active"),
    (F.take_rows, dict(x=X, to=None), InvalidType, "layout must be a TokenLayout, got NoneType"),
    (F.merge_tokens, dict(x=X[:7], plan=KEPT), InvalidValue, r"x must have .* got \(7, 4\)"),
    (F.merge_tokens, dict(x=X, plan=KEPT, sizes=torch.ones(3, 2)), InvalidValue, "sizes must have"),
    (F.merge_tokens, dict(x=X, plan=plan([0, 1, 2])), InvalidValue, r"plan's \(B, N\) = \(1, 3\)"),
    (F.unmerge_tokens, dict(y=X[:7], plan=KEPT), InvalidValue, r"y must have .* got \(7, 4\)"),
    (F.unmerge_tokens, dict(y=X, plan=plan([0, 1, 2])), InvalidValue, r"plan's \(B, N\) = \(1, 3"),
    (F.merge_tokens, dict(x=X, plan=MergePlan(SMALL.token.int(), SMALL.token < 0)), InvalidType,
     "target must be .*int64"),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "arguments", "error", "message"), BAD)
def test_functions_refuse_rows_that_are_not_the_layouts(
    function, arguments, error, message, backend
):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(**arguments, layout=SMALL, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("name", BAD_PLANS)
def test_functions_refuse_plans_that_are_none(name, form, backend):
    target, message = BAD_PLANS[name]
    if name == "never active" and form == "dense":
        pytest.skip("dense tokens are all active")
    bad = plan(*target)
    layout = SMALL if form == "packed" else None
    x = X if layout else torch.zeros(2, 2, 3, 4)
    with pytest.raises(InvalidValue, match=f"merge_tokens: .*{message}"):
        F.merge_tokens(x, bad, layout=layout, backend=backend)
    y = x[: SMALL.without(bad.merged).num_rows] if layout else x
    with pytest.raises(InvalidValue, match=f"unmerge_tokens: .*{message}"):
        F.unmerge_tokens(y, bad, layout=layout, backend=backend)


@pytest.mark.parametrize("layout", [(2, 2, 3), SMALL.token, "packed"])
def test_functions_refuse_what_is_no_layout(layout):
    for function, arguments in (
        (F.neuron, dict(x=X)),
        (F.spiking_attention, QKV),
        (F.firing_counts, dict(keys=X)),
        (F.readout, dict(x=X, w=X[:, 0])),
        (F.halt, dict(h=X[:, 0], H=X[:, 0])),
        (F.merge_tokens, dict(x=X, plan=KEPT)),
        (F.unmerge_tokens, dict(y=X, plan=KEPT)),
        (F.take_rows, dict(x=X, to=SMALL)),
    ):
        with pytest.raises(InvalidType, match="layout must be a TokenLayout, got"):
            function(**arguments, layout=layout)
