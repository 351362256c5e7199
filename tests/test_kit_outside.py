"""The kit from outside: the pytest plugin, the command, other libraries' neurons."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from interpreter import RUNS

import atsnn.functional as F
from atsnn import adapters, checks, cli
from atsnn.testing import cases, check

pytest_plugins = ["pytester"]

# -- our Triton kernels ---------------------------------------------------------------------------


@pytest.mark.skipif(not RUNS, reason="Triton cannot run here")
def test_our_triton_neuron_passes_the_named_cases():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = check(partial(F.neuron, backend="triton"), device=device, only="neuron")
    assert {f.result for f in report.findings} == {"pass"}


# -- the plugin -----------------------------------------------------------------------------------

installed = pytest.mark.skipif(
    not any(e.value == "atsnn_pytest" for e in entry_points(group="pytest11")),
    reason="the plugin's entry point is not installed: pip install -e .",
)

TESTS = """
    import pytest
    import atsnn.functional as F

    def wrong(x, v=None, **settings):
        s, v = F.neuron(x, v, **settings)
        return 1 - s, v

    def part(x, v=None, *, tau=2.0):
        return F.neuron(x, v, tau=tau)

    @pytest.mark.atsnn_kernel(op="neuron", only="neuron: starts*")
    def test_right(atsnn_case):
        atsnn_case.check(F.neuron)

    @pytest.mark.atsnn_kernel(only="neuron: fires at*")
    def test_wrong(atsnn_case):
        atsnn_case.check(wrong)

    @pytest.mark.atsnn_kernel(op="neuron", only=["kind if does not leak", "40 timesteps"])
    def test_part(atsnn_case):
        atsnn_case.check(part)
"""


@installed
def test_the_plugin_runs_a_test_a_case(pytester):
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-v", "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=2, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "*test_right[[]neuron: starts from the membrane given] PASSED*",
            "*test_wrong[[]neuron: fires at the threshold exactly] FAILED*",
            "*wrong as neuron on cpu, against the reference*",
            "*spikes at [[]0, 0, 0, 0] (timestep 0): expected 1, got 0 (288 of 288 differ)*",
            "SKIPPED*not supported: no parameter 'kind'*",
        ]
    )


@installed
@pytest.mark.parametrize(
    "mark, message",
    [
        ("", "expected @pytest.mark.atsnn_kernel(op=...) on a test that takes atsnn_case, got"),
        ("@pytest.mark.atsnn_kernel(op='no')\n", "@pytest.mark.atsnn_kernel: check: op must be"),
    ],
)
def test_the_plugin_says_what_it_expects(pytester, mark, message):
    pytester.makepyfile(f"import pytest\n{mark}def test(atsnn_case): pass\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{message.replace('[', '[[]')}*"])


@installed
def test_the_plugin_weighs_nothing_on_others(pytester):
    pytester.makepyfile(
        "import sys\n"
        "def test():\n"
        "    assert 'atsnn_pytest' in sys.modules\n"
        "    assert not {'torch', 'atsnn', 'numpy'} & set(sys.modules)\n"
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)


# -- the command ----------------------------------------------------------------------------------


def command(*arguments):
    return cli.main(["check", "--kernel", *arguments])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module beside the person who calls the command."""
    (tmp_path / "mine_for_the_kit.py").write_text(
        "import atsnn.functional as F\n"
        "def good(x, v=None, **settings): return F.neuron(x, v, **settings)\n"
        "def bad(x, v=None, *, tau=2.0):\n"
        "    s, v = F.neuron(x, v, tau=tau)\n"
        "    return s, v * 1.001\n"
        "def read(x, w, **settings): return F.readout(x, w, **settings)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "mine_for_the_kit"
    sys.modules.pop("mine_for_the_kit", None)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_command_judges_a_function(mine, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert command(f"{mine}:bad") == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    text = " ".join(out.split())
    assert f"{mine}:bad as neuron on cpu, against the reference" in text
    assert "FAIL neuron: returns the membrane after the last timestep membrane at [" in text
    assert "pass neuron: no element" in text
    assert "not supported: no parameter 'layout' neuron: ragged: no read past" in text
    assert "failed, " in text.split("storage")[-1]


def test_the_command_writes_what_it_found(mine, capsys, tmp_path):
    path = tmp_path / "found.json"
    assert command(f"{mine}:good", "--only", "neuron: fires*", "--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert found["kernel"] == f"{mine}:good" and found["op"] == "neuron"
    assert {f["result"] for f in found["findings"]} == {"pass"} and len(found["findings"]) == 3
    assert command(f"{mine}:read", "--op", "readout", "--only", "readout") == 0
    assert "pass  readout: summed in float64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mine"], "--kernel must be package.module:function, got 'mine'"),
        (["no_such_module:f"], "a module that can be imported, got 'no_such_module'"),
        (["atsnn.adapters:no"], "module 'atsnn.adapters' has no attribute 'no'"),
        (["atsnn.adapters:norse_lif", "--op", "no"], "op must be one of 'neuron', "),
        (["atsnn.adapters:norse_lif", "--only", "no"], "only must name cases of neuron"),
        (["atsnn.adapters:norse_lif", "--backend", "native"], "expected --kernel or --backend"),
        (["atsnn.adapters:norse_lif", "--op", "readout"], "got a function without w"),
        (["atsnn.adapters:__name__"], "fn must be a function, got str"),
    ],
)
def test_wrong_use_of_the_command(capsys, arguments, message):
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("atsnn: check: ") and message in line


def test_an_operation_needs_a_kernel(capsys):
    assert cli.main(["check", "--op", "neuron"]) == 2
    assert "--op belongs to --kernel" in capsys.readouterr().err


# -- other libraries ------------------------------------------------------------------------------


def found(fn, **settings):
    report = check(fn, raises=False, **settings)
    return {f.case: f for f in report.findings if f.operation == "neuron"}, report


def peer(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


@peer("spikingjelly")
def test_spikingjelly_passes():
    report = check(adapters.spikingjelly_neuron)
    assert sum(f.result == "pass" for f in report.findings) > 100
    assert "SpikingJelly's PLIF" not in str(report) and "no parameter 'inv_tau'" in str(report)


@peer("snntorch")
def test_where_snntorch_differs():
    named, report = found(adapters.snntorch_leaky)
    assert not report.ok
    assert named["fires at the threshold exactly"].result == "fail"
    assert named["returns the membrane after the last timestep"].result == "fail"
    assert named["a soft reset, by v_threshold"].result == "fail"
    assert named["gradient through a hard reset"].detail == "Leaky always detaches its reset"
    # Away from the threshold, for one timestep, it is the same neuron.
    x = torch.tensor([[0.5, 1.5, 3.0]])
    assert torch.equal(adapters.snntorch_leaky(x)[0], F.neuron(x)[0])
    # With the reset in the timestep of the spike the membrane is ours too.
    assert torch.equal(adapters.snntorch_leaky(x, reset_delay=False)[1], F.neuron(x)[1])


@peer("norse")
def test_where_norse_differs():
    named, report = found(adapters.norse_lif)
    assert not report.ok
    assert named["fires at the threshold exactly"].result == "fail"
    assert named["a division by tau, no product with 1/tau"].result == "fail"
    assert named["starts from the membrane given"].result == "pass"
    assert named["gradient of the surrogate sigmoid"].result == "pass"
    assert named["gradient of the surrogate erf"].result == "pass"
    assert named["a soft reset, by v_threshold"].detail == "Norse's LIF has no soft reset"
    # The synaptic current of an impulse goes on where it has a time constant.
    x = torch.tensor([[1.0], [0.0]])
    assert float(adapters.norse_lif(x, tau_syn=4.0)[1]) > float(F.neuron(x)[1])


@pytest.mark.parametrize("name", adapters.__all__)
def test_a_missing_library_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(checks.MissingDependency, match="which is not installed: pip install"):
        check(getattr(adapters, name), only="neuron: no element")


# -- the page -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "checking_a_kernel.md"


def blocks(language: str) -> list[str]:
    return [part.split("```")[0] for part in PAGE.read_text().split(f"```{language}\n")[1:]]


def test_the_example_of_the_page_runs(tmp_path):
    """As it stands there, in a process of its own; without a GPU Triton is interpreted."""
    pytest.importorskip("triton")
    kernel, use, test = blocks("python")
    (tmp_path / "my_neuron.py").write_text(kernel)
    (tmp_path / "use.py").write_text(use)
    (tmp_path / "test_my_neuron.py").write_text(test)
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"

    def run(*command):
        result = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    out = run("use.py")
    assert "no parameter 'layout'" in out and "failed" not in out and "passed" in out
    assert out.splitlines()[-1] in PAGE.read_text()
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "threshold or gradient")
    assert "passed" in out and "skipped" in out


def test_the_page_names_cases_that_there_are():
    lines = [line for block in blocks("text") for line in block.splitlines()]
    named = {line.split("  ", 1)[1] for line in lines if line.startswith(("pass  ", "FAIL  "))}
    assert named and named <= {case.name for case in cases("neuron")}, named
