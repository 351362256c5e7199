"""Triton's operators given what does not fit.

What is wrong in shape or type is refused, as the native kernels refuse it. What is wrong in values
alone cannot be seen without waiting for a device: it gives some result, and nothing outside the
tensors is read or written.
"""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from cases import OPERATORS, SMALL, flat, operator_arguments, signature
from interpreter import RUNS, guard  # noqa: F401
from test_refusals import BIG, CALLS, DAMAGE, LEFT_OUT, PREFIXES, ROWS, tensor

from atsnn.ops.library import WITHOUT_KERNEL

pytestmark = [
    pytest.mark.skipif(not RUNS, reason="Triton cannot run here"),
    pytest.mark.usefixtures("guard"),
]

NAMES = sorted(OPERATORS.difference(WITHOUT_KERNEL))
TYPES = {"int64": "Long", "int32": "Int", "float32": "Float", "float64": "Double", "bool": "Bool"}


def call(name, arguments):
    return getattr(torch.ops.atsnn_triton, name)(**arguments)


def native_words(message):
    """A message of the launchers as the native kernels would say it, with sizes or with names."""
    message = re.sub(r"torch\.(\w+)", lambda m: TYPES.get(m[1], m[1]), message)
    message = re.sub(r"must be one of (\w+), got", lambda m: f"must be {TYPES[m[1]]}, got", message)
    message = re.sub(r"must have the dtype of \w+, ", "must be ", message)
    message = re.sub(r"must have the shape of \w+, ", "must have shape ", message)
    message = re.sub(r"must be a number >= 0 and <= (\d+)", r"must lie in 0 .. \1", message)
    message = re.sub(r"must lie in 0 .. (\d+) for this", r"must be \1 for this", message)
    message = re.sub(r"must have \(T, B, N\) = \((.*)\), got \((.*)\)",
                     r"must have the same T, B, N, got \1 and \2", message)  # fmt: skip
    message = re.sub(r"\(([^()]*)\)", r"[\1]", message)
    return [re.sub(r"(\[[\w, ]*\]) = (\[[\d, ]*\])", part, message) for part in (r"\1", r"\2")]


def result_offsets(name):
    """Which offsets are those of the result's rows."""
    return "to_offsets" if name in ("moved_rows", "merge_tokens", "unmerge_tokens") else "offsets"


def assert_refused(name, arguments, error, message):
    with pytest.raises(error, match="got|unknown|needs|exactly") as refusal:
        call(name, arguments)
    said = str(refusal.value)
    assert said.startswith(f"{name.removesuffix('_backward')}"), said
    assert any(re.search(message, words) for words in native_words(said)), said


def unmerged(arguments):
    """Arguments of layouts in which nothing merged, so that what is changed alone is wrong."""
    if "target" in arguments:
        whole = dict(token=SMALL.token, offsets=SMALL.offsets)
        arguments |= whole | {f"to_{key}": value for key, value in whole.items()}
        for key in ("y", "grad"):
            if key in arguments:
                arguments[key] = torch.zeros(SMALL.num_rows, 4)
    return arguments


# -- layouts --------------------------------------------------------------------------------------

OF_SHAPE = [name for name, (_, message) in DAMAGE.items()
            if re.search("Long|shape|with B = 0", message)]  # fmt: skip
OF_VALUES = [name for name in DAMAGE if name not in OF_SHAPE]


def damaged(name, prefix, damage):
    arguments = operator_arguments(name)
    if "target" in arguments:
        arguments |= dict(target=torch.arange(3).repeat(2, 1))
        arguments = unmerged(arguments)
    parts, message = DAMAGE[damage]
    arguments[f"{prefix}token"], arguments[f"{prefix}offsets"] = map(tensor, parts)
    return arguments, message


@pytest.mark.parametrize(("name", "prefix"), PREFIXES)
@pytest.mark.parametrize("damage", OF_SHAPE)
def test_layouts_of_other_shapes_or_types_are_refused(name, prefix, damage):
    arguments, message = damaged(name, prefix, damage)
    assert_refused(name, arguments, TypeError if "Long" in message else ValueError, message)


@pytest.mark.parametrize(("name", "prefix"), PREFIXES)
@pytest.mark.parametrize("damage", OF_VALUES)
def test_whatever_a_layout_says_nothing_outside_is_touched(guard, name, prefix, damage):  # noqa: F811
    arguments, _ = damaged(name, prefix, damage)
    call(name, arguments)
    assert guard.launches


@pytest.mark.parametrize("name", [n for n in NAMES if "rows" in signature(n) and "token" in
                                  signature(n)])  # fmt: skip
@pytest.mark.parametrize("end", [-1, 13, BIG])
def test_rows_that_are_asked_for_must_fit(name, end):
    """Of all values, only the number of rows of a result is ever looked at."""
    arguments = operator_arguments(name) | {"rows": None}
    key = result_offsets(name)
    arguments[key] = torch.cat([arguments[key][:-1], tensor([end])])
    assert_refused(name, arguments, ValueError, rf"rows must be 12 for this layout, got {end}")


@pytest.mark.parametrize(("name", "prefix"), LEFT_OUT)
@pytest.mark.parametrize("part", ["token", "offsets"])
def test_half_a_layout_is_refused(name, prefix, part):
    arguments = operator_arguments(name) | {prefix + part: None}
    assert_refused(name, arguments, ValueError, "layout.*(both|neither)|(both|neither).*layout")


@pytest.mark.parametrize("name", [n for n in NAMES if "to_token" in signature(n)])
@pytest.mark.parametrize("prefix", ["", "to_"])
def test_one_layout_of_two_is_refused(name, prefix):
    if name == "moved_rows":
        pytest.skip("its layouts cannot be left out")
    arguments = operator_arguments(name)
    arguments |= dict.fromkeys((f"{prefix}token", f"{prefix}offsets"))
    assert_refused(name, arguments, ValueError, "layouts must|must have")


# -- rows -----------------------------------------------------------------------------------------

# No other tensor has as many rows: they may be a buffer's.
ALONE = {
    ("neuron", "x"), ("firing_counts", "keys"), ("merge_tokens", "x"),
    ("merge_tokens_backward", "grad"), ("unmerge_tokens", "y"), ("unmerge_tokens_backward", "grad"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), ROWS)
@pytest.mark.parametrize("change", [-1, 1])
def test_rows_that_are_missing_or_too_many(name, key, change):
    arguments = operator_arguments(name)
    x = arguments[key]
    arguments[key] = x[:change] if change < 0 else torch.cat([x, x[:1]])
    if (name, key) in ALONE:
        call(name, arguments)
    else:
        assert_refused(name, arguments, ValueError, r"must (have|end|lie).*got")


# -- everything else that an operator is given ----------------------------------------------------

VALUES = "must lie in 0|got 9223|got -1 for token|must stay|must be active"


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), CALLS, ids=[f"{c[0]}: {c[3][:40]}" for c in CALLS]
)
def test_what_does_not_fit(name, change, error, message):
    arguments = change(operator_arguments(name))
    if name.startswith("unmerge"):
        arguments = unmerged(arguments)
    if "both layouts" in message:
        arguments["rows"] = None  # which would be too many for the layout it is given, too
    if re.search(VALUES, message) and not re.search("^(bits|T) must", message):
        call(name, arguments)
    else:
        assert_refused(name, arguments, error, message)


# -- values are not looked at ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("layout", [SMALL, None], ids=["packed", "dense"])
def test_launchers_do_not_look_at_values(monkeypatch, name, bare, layout):
    """They run on tensors that have none."""
    arguments = operator_arguments(name, layout, bare=bare)
    key = result_offsets(name)
    if arguments.get("rows", 0) is None and arguments[key] is not None:
        arguments["rows"] = int(arguments[key][-1])  # what is not given has to be asked for
    arguments = {
        key: x.to("meta") if isinstance(x, torch.Tensor) else x for key, x in arguments.items()
    }
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    results = flat(getattr(importlib.import_module("atsnn.kernels"), name)(**arguments))
    assert all(x.device.type == "meta" for x in results)
