"""Triton's operators: registration, strides, compilation, the forms of spikes, what is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import OPERATORS, SMALL, WITHOUT_GRADIENT, assert_same, flat, operator_arguments
from interpreter import RUNS, guard  # noqa: F401
from test_operators import COMPILED, FORWARD, LEAVES, STRIDED, with_leaves
from torch import Tensor

import atsnn
import atsnn.functional as F
from atsnn.cases import DIFFERENTIABLE, OPERATIONS, Numbers, ragged
from atsnn.checks import BackendError

needs_triton = pytest.mark.skipif(not RUNS, reason="Triton cannot run here")
guarded = pytest.mark.usefixtures("guard")


def operator(name):
    return getattr(torch.ops.atsnn_triton, name).default


# -- registration ---------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_operator_has_a_kernel_for_cuda(name):
    """Under the first name for CUDA tensors, under the second for tensors of any device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"atsnn::{name}", "CPU")
    if name != "pack_linear":  # which moves weights once, by PyTorch
        assert has(f"atsnn::{name}", "CUDA")
        from atsnn import kernels

        assert callable(getattr(kernels, name))
    assert has(f"atsnn_triton::{name}", "CompositeExplicitAutograd")


@needs_triton
@guarded
@pytest.mark.parametrize("layout", [None, SMALL], ids=["dense", "packed"])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_opcheck(name, layout):
    """Schema (no input is written to, none returned) and the shapes of fake results."""
    arguments = operator_arguments(name, layout, bare=layout is None)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(name), (), arguments, test_utils=utils)


@needs_triton
@guarded
@pytest.mark.parametrize("name", [n for n in FORWARD if n not in WITHOUT_GRADIENT])
def test_opcheck_with_gradients(name):
    arguments = with_leaves(operator_arguments(name))
    utils = ("test_autograd_registration",)
    torch.library.opcheck(operator(name), (), arguments, test_utils=utils)


@needs_triton
@guarded
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    """One graph with the operators in it, by the backend that was named around the call."""
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    found = []
    with atsnn.use_backend("triton"):
        for function in (compiled, COMPILED[name]):
            arguments = with_leaves(operator_arguments(name, SMALL))
            out = flat(function(arguments, SMALL))
            reached = [o for o in out if o.requires_grad]
            leaves = [x for key, x in arguments.items() if key in LEAVES and x is not None]
            sent = [Numbers(9).integers(-8, 8, o.shape, bits=2).to(o.dtype) for o in reached]
            grads = torch.autograd.grad(reached, leaves, sent, allow_unused=True) if reached else ()
            found.append((*out, *(g for g in grads if g is not None)))
    assert_same(*found)


# -- strides --------------------------------------------------------------------------------------


@needs_triton
@guarded
@pytest.mark.parametrize("arrange", STRIDED)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_any_strides(name, arrange):
    for layout in (ragged(4, 2, 2, 5), None):
        arguments = operator_arguments(name, layout, C=6, shape=(2, 2, 5))
        strided = {
            key: arrange(x.detach()) if isinstance(x, Tensor) else x for key, x in arguments.items()
        }
        plain = {
            key: x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
            for key, x in strided.items()
        }
        assert_same(flat(operator(name)(**strided)), flat(operator(name)(**plain)), name)


@needs_triton
@guarded
def test_rows_with_strides_are_not_copied(monkeypatch):
    """Slices of one projection to q, k and v, as SpikingJelly's fused one makes them."""
    copied = []
    contiguous = Tensor.contiguous

    def counted(self, *arguments, **settings):
        copied.append(self.shape)
        return contiguous(self, *arguments, **settings)

    qkv = Numbers(1).spikes((SMALL.num_rows, 3 * 16)).float()
    q, k, v = qkv.chunk(3, -1)
    monkeypatch.setattr(Tensor, "contiguous", counted)
    with torch.no_grad(), atsnn.use_backend("triton"):
        F.spiking_attention(q, k, v, num_heads=2, layout=SMALL)
        F.spike_driven_attention(q, k, v, num_heads=2, layout=SMALL)
        F.neuron(q, layout=SMALL)
        F.neuron(torch.zeros(2, 3, 16)[..., :8])
        F.spike_linear_lif(q, torch.ones(4, 16), layout=SMALL)
        F.readout(q, torch.zeros(SMALL.num_rows), layout=SMALL)
    rows = [shape for shape in copied if len(shape) > 1 and shape[-1] in (16, 8)
            and shape[0] != 4]  # fmt: skip
    assert not rows


@needs_triton
@guarded
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_expanded_gradients(name):
    """What ``sum`` sends back is one element over all."""
    operation, layout = OPERATIONS[name], ragged(4, 2, 1, 5)
    inputs = operation.make(Numbers(2), layout, operation.channels(3), torch.float32)
    leaves = {
        key: x.clone().requires_grad_() if key in operation.leaves else x
        for key, x in inputs.items()
    }
    out = [o for o in operation.packed("triton", layout, **leaves) if o.requires_grad]
    wanted = [leaves[key] for key in operation.leaves]
    sums = torch.autograd.grad([o.sum() for o in out], wanted, retain_graph=True, allow_unused=True)
    ones = torch.autograd.grad(out, wanted, [torch.ones_like(o) for o in out], allow_unused=True)
    assert_same(sums, ones)


# -- the forms of spikes --------------------------------------------------------------------------


@needs_triton
@guarded
@pytest.mark.parametrize("T", [3, 11])
@pytest.mark.parametrize("channels", [5, 64, 130])
def test_spikes_as_floats_bytes_and_bits(T, channels):
    from atsnn.kernels import neuron_spikes

    layout = ragged(3, T, 2, 5)
    dense = Numbers(4).normal((T, 2, 5, channels)).float()
    for x, parts, over in (
        (layout.pack(dense), (layout.token, layout.offsets), layout),
        (dense, (None, None), None),
        (dense.transpose(1, 2), (None, None), None),
    ):
        want, want_v = F.neuron(x, layout=over)
        for form, made in (
            ("float", want),
            ("uint8", want.to(torch.uint8)),
            ("bits", F.pack_spikes(want)),
        ):
            s, v = neuron_spikes(x, None, None, *parts, form, "lif", 2.0, 1.0, 0.0, True)
            assert s.dtype == made.dtype and torch.equal(s, made) and torch.equal(v, want_v)
    with pytest.raises(ValueError, match="form must be one of 'float', 'uint8', 'bits', got 'int'"):
        neuron_spikes(x, None, None, None, None, "int", "lif", 2.0, 1.0, 0.0, True)


# -- what is missing ------------------------------------------------------------------------------


def python(code, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, check=False, env={**kept, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


REPORT = """
import torch, atsnn, atsnn.functional as F
print(atsnn.available_backends()["triton"])
x = torch.zeros(2, 3)
for call in (lambda: F.neuron(x, backend="triton"), lambda: torch.ops.atsnn_triton.{direct}):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
s, v = F.neuron(x)
assert not s.any()
"""
DIRECT = "neuron(x, None, None, None, None, 'lif', 2.0, 1.0, 0.0, True, True, 'atan', 2.0)"


def test_without_triton():
    code = "import sys; sys.modules['triton'] = None\n" + REPORT.format(direct=DIRECT)
    reason, refused, direct = python(code, TRITON_INTERPRET="1").splitlines()
    assert reason == "triton is not installed: pip install 'atsnn[triton]'"
    assert refused == f"BackendError neuron: backend 'triton' cannot serve the call: {reason}"
    assert direct.startswith("BackendError neuron: Triton's kernels do not load:")


def test_a_triton_that_is_too_old():
    code = (
        "import importlib.metadata as m\n"
        "of = m.version\n"
        "m.version = lambda name: '2.3.1' if name == 'triton' else of(name)\n"
    )
    reason, refused, *_ = python(
        code + REPORT.format(direct=DIRECT), TRITON_INTERPRET="1"
    ).splitlines()
    assert "or newer is needed, got 2.3.1" in reason and reason in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@needs_triton
def test_without_a_device():
    reason, refused, *_ = python(REPORT.format(direct="numel")).splitlines()
    assert reason.startswith("no CUDA device (TRITON_INTERPRET=1, set before Python starts, runs")
    assert refused == f"BackendError neuron: backend 'triton' cannot serve the call: {reason}"


@needs_triton
def test_random_partners_and_backends_by_name():
    """What no kernel does is the reference's; a backend that was named is not replaced."""
    counts = torch.ones(1, 4, 2)
    generator = torch.Generator().manual_seed(0)
    plan = F.match_tokens(counts, r=1, match="random", generator=generator, backend="triton")
    assert int(plan.merged.sum()) == 1
    with atsnn.use_backend("triton"), pytest.raises(BackendError, match="run on CPU tensors"):
        F.neuron(torch.zeros(2, 3, device="cuda"), backend="native") if (
            torch.cuda.is_available()
        ) else _refuse()


def _refuse():
    from atsnn.ops import resolve_backend

    resolve_backend("neuron", "native", torch.device("cuda"))
