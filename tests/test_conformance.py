"""``atsnn check``: it passes what is right and names what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from interpreter import RUNS

import atsnn.functional as F
from atsnn import cli
from atsnn.cases import OPERATIONS
from atsnn.checks import InvalidValue
from atsnn.conformance import CASES, check_backend


def check(*arguments):
    return cli.main(["check", *arguments])


def test_native_passes(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "check.json"
    assert check("--only", "neuron plif", "merge", "linear bits", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and f"pass {3 * len(CASES)}" in out
    found = json.loads(path.read_text())["findings"]
    assert {f["operation"] for f in found} == {"neuron plif", "merge", "linear bits"}
    assert {f["result"] for f in found} == {"pass"}


@pytest.mark.skipif(not RUNS, reason="Triton cannot run here")
def test_triton_passes(capsys):
    assert check("--backend", "triton", "--only", "attention", "spike-driven") == 0
    assert f"pass {2 * len(CASES)}" in capsys.readouterr().out


def test_wrong_results_gradients_and_errors_are_named(capsys, monkeypatch):
    attend = F.spiking_attention

    def wrong(q, k, v, *, backend, **settings):
        out = attend(q, k, v, backend=backend, **settings)
        if backend == "reference":
            return out
        if settings["num_heads"] == 1:
            return out * 1.0000001
        return out + (q - q.detach()) * 1e-3

    operation = OPERATIONS["attention"]
    monkeypatch.setitem(
        OPERATIONS, "attention", type(operation)(
            operation.make,
            lambda backend, layout, **x: (
                wrong(*map(layout.pack, x.values()), num_heads=1, layout=layout, backend=backend),
            ),
            operation.dense, operation.leaves,
        ),
    )  # fmt: skip
    assert check("--only", "attention") == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "attention, ragged: packed, result 0 at [" in out
    assert "expected" in out and "got" in out and "differ)" in out
    # Where there are no rows, or only rounding to fewer bits, the mistake does not show.
    assert " ok " in out

    def broken(backend, layout, **x):
        raise ValueError("[no] such thing")

    monkeypatch.setitem(
        OPERATIONS, "attention",
        type(operation)(operation.make, broken, operation.dense, operation.leaves),
    )  # fmt: skip
    assert check("--only", "attention") == 1
    assert "packed: raised ValueError: [no] such thing" in capsys.readouterr().out


def test_a_wrong_gradient_is_named():
    operation = OPERATIONS["readout"]

    def packed(backend, layout, x, w):
        return operation.packed(backend, layout, x=x, w=w.detach() + (w - w.detach()) * 1.001)

    original = OPERATIONS["readout"]
    OPERATIONS["readout"] = type(operation)(
        operation.make, packed, operation.dense, operation.leaves
    )
    try:
        found = {f.case: f for f in check_backend("native", operations=["readout"])}
    finally:
        OPERATIONS["readout"] = original
    assert found["ragged"].result == "fail"
    assert found["ragged"].detail.startswith("packed, gradient of w at [")
    assert found["none"].result == "pass"


def test_what_cannot_run_is_refused(capsys):
    with pytest.raises(InvalidValue, match="operation must be one of"):
        list(check_backend(operations=["neurons"]))
    with pytest.raises(InvalidValue, match="device must be one that is here, got 'nowhere'"):
        list(check_backend(device="nowhere"))
    if not torch.cuda.is_available():
        assert check("--device", "cuda") == 2
        assert "device must be one that is here, got 'cuda'" in capsys.readouterr().err
