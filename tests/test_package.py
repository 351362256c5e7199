"""The package: what it imports, what it builds, and which runtimes it brings."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import atsnn

ROOT = Path(__file__).parent.parent

# Building writes into the tree: one process does it, where tests run in several.
one_process = pytest.mark.xdist_group("package")


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def test_import_brings_no_optional_package_and_is_silent():
    optional = ["triton", "sklearn", "matplotlib", "rich", "accelerate", "spikingjelly"]
    result = python(
        f"import sys, atsnn, atsnn.cli; print([m for m in {optional} if m in sys.modules])"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


def test_public_names_are_there():
    for name in atsnn.__all__:
        assert getattr(atsnn, name) is not None
    for module in (atsnn.functional, atsnn.nn):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_kernels_refuse_the_bare_name(tmp_path):
    result = python("import kernels", cwd=ROOT)
    assert result.returncode == 1 and "must be imported as 'atsnn.kernels'" in result.stderr
    assert python("import atsnn.kernels", cwd=tmp_path).returncode == 0


def test_one_openmp_runtime_in_the_process():
    code = (
        "import torch, atsnn.functional as F, re\n"
        "torch.set_num_threads(2)\n"
        "F.neuron(torch.randn(4, 100000), backend='native')\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len(set(re.findall(r'\\S*/lib(?:g|i)?omp[^/ ]*\\.so\\S*', maps))))\n"
    )
    result = python(code)
    assert result.stdout == "1\n", result.stderr


def test_works_without_the_extension(tmp_path):
    """As installed with ATSNN_NO_EXTENSION=1: it computes, and says once that it is slow."""
    code = (
        "import sys; sys.modules['atsnn._C'] = None\n"
        "import warnings, torch, atsnn, atsnn.functional as F\n"
        "print(atsnn.available_backends()['native'])\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    s, _ = F.neuron(torch.ones(3, 2) * 4); F.neuron(torch.ones(3, 2))\n"
        "    x = torch.ones(3, 2, requires_grad=True)\n"
        "    settings = ('lif', 2., 1., 0., True, True, 'atan', 2.)\n"
        "    torch.ops.atsnn.neuron(x, None, None, None, None, *settings)[0].sum().backward()\n"
        "print(len(seen), s.sum().item(), x.grad.abs().sum().item() > 0)\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert "not built" in first and second == "1 6.0 True"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@one_process
def test_the_source_distribution_holds_what_the_build_needs(sdist):
    patterns = ("csrc/**/*.h", "csrc/**/*.cpp", "kernels/*.py", "src/atsnn/**/*.py")
    want = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(want) > 20
    for path in want:
        assert (sdist / path.relative_to(ROOT)).is_file(), path


@one_process
def test_the_wheel_holds_kernels_and_checkpoints(sdist, tmp_path):
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=sdist, capture_output=True, text=True, check=False,
        env={"ATSNN_NO_EXTENSION": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = [str(path.relative_to(ROOT / "src")) for path in ROOT.glob("src/atsnn/**/*.py")]
    assert len(modules) > 50
    for name in (*modules, "atsnn/kernels/__init__.py", "atsnn/py.typed",
                 "atsnn/checkpoints/digits/model.safetensors"):  # fmt: skip
        assert name in names, name
    assert not any(name.startswith(("kernels/", "tests/", "csrc/")) for name in names)
