"""LIF, IF and PLIF: the same spikes as SpikingJelly bit for bit, and its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import judge
import numpy as np
import pytest
import torch
from hypothesis import given

import atsnn
import atsnn.functional as F
from atsnn import reference
from atsnn.checks import BackendError, InvalidType, InvalidValue
from atsnn.ops import backends

BACKENDS = ("native", "reference")

SETTINGS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(F.KINDS),
        "tau": st.sampled_from([1.0625, 1.5, 2.0, 3.7, 4.0, 100.0]),
        "v_threshold": st.sampled_from([0.5, 1.0, 1.3, -0.25]),
        "v_reset": st.sampled_from([0.0, None, 0.3, -0.7]),
        "decay_input": st.booleans(),
        "detach_reset": st.booleans(),
    }
)
# Sizes around the widths of vectors (4, 8, 16), blocks (16, 32, 64) and tiles (512, 1024).
SHAPES = st.tuples(
    st.integers(1, 9),
    st.sampled_from([1, 3, 15, 16, 17, 63, 64, 65, 130, 511, 513, 1023, 1025, 2049]),
)


def split_settings(settings):
    """Arguments for ours and for the judge: a PLIF is given by 1/tau here and by w there."""
    settings = dict(settings)
    ours, theirs = dict(settings), dict(settings)
    if settings["kind"] == "plif":
        w = -torch.log(torch.tensor(settings["tau"] - 1.0))
        ours["inv_tau"], theirs["w"] = torch.sigmoid(w), w
    return ours, theirs


def make_input(shape, seed, state):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 1.5 + 0.4
    return x, torch.randn(shape[1:], generator=generator) if state else None


@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=SHAPES, settings=SETTINGS, seed=st.integers(0, 2**16), state=st.booleans())
def test_spikes_and_state_equal_the_judge(backend, shape, settings, seed, state):
    x, v = make_input(shape, seed, state)
    ours, theirs = split_settings(settings)
    s, v_final = F.neuron(x, v, backend=backend, **ours)
    want_s, want_v = judge.neuron(x, v, **theirs)
    assert torch.equal(s, want_s)
    assert torch.equal(v_final, want_v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
@given(shape=SHAPES, settings=SETTINGS, seed=st.integers(0, 2**16), state=st.booleans())
def test_gradients_equal_the_judge(backend, surrogate, shape, settings, seed, state):
    shape = (shape[0], min(shape[1], 130))
    x, v = make_input(shape, seed, state)
    ours, theirs = split_settings(settings)
    generator = torch.Generator().manual_seed(seed + 1)
    grads = torch.randn(shape, generator=generator), torch.randn(shape[1:], generator=generator)

    def gradients(function, arguments, **extra):
        leaves = {"x": x.clone().requires_grad_()}
        if v is not None:
            leaves["v"] = v.clone().requires_grad_()
        arguments = dict(arguments)
        if settings["kind"] == "plif":
            leaves["w"] = theirs["w"].clone().requires_grad_()
            name = "inv_tau" if "inv_tau" in arguments else "w"
            arguments[name] = leaves["w"].sigmoid() if name == "inv_tau" else leaves["w"]
        out = function(leaves["x"], leaves.get("v"), surrogate=surrogate, **arguments, **extra)
        return dict(
            zip(leaves, torch.autograd.grad(out, list(leaves.values()), grads), strict=True)
        )

    got = gradients(F.neuron, ours, backend=backend)
    want = gradients(judge.neuron, theirs)
    # Rounding of each step is carried on by the later ones, by up to |dv/du| a step.
    scale = 1 + max(float(g.abs().max()) for g in want.values())
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-5, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_default_alphas_are_the_judges():
    for name, make in judge.SURROGATES.items():
        assert reference.SURROGATES[name].alpha == make().alpha


def digest(threads: int) -> str:
    """A hash of everything the native kernels give for a fixed set of cases."""
    import hashlib

    torch.set_num_threads(threads)
    h = hashlib.sha256()
    for case, (dtype, kind, v_reset, surrogate) in enumerate(
        (dtype, kind, v_reset, surrogate)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for kind in F.KINDS
        for v_reset in (0.0, None, -0.25)
        for surrogate in reference.SURROGATES
    ):
        # NumPy's numbers: those of torch.randn depend on the instruction set.
        rng = np.random.default_rng(case)
        x = torch.from_numpy(rng.normal(0, 1.5, (5, 3, 701))).to(dtype).requires_grad_()
        grad = torch.from_numpy(rng.normal(size=x.shape)).to(dtype)
        inv_tau = torch.tensor(0.4, requires_grad=True) if kind == "plif" else None
        s, v = F.neuron(
            x, kind=kind, tau=2.5, inv_tau=inv_tau, v_reset=v_reset, surrogate=surrogate,
            decay_input=case % 2 == 0, backend="native",
        )  # fmt: skip
        leaves = [x] if inv_tau is None else [x, inv_tau]
        grads = torch.autograd.grad((s, v), leaves, (grad, torch.ones_like(v)))
        for tensor in (s, v, *grads):
            h.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


# (the level asked of PyTorch, what we then use)
LEVELS = [("avx512", "avx512"), ("avx2", "avx2"), ("default", "portable")]


def run_at_level(level: str, code: str) -> str:
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n{code}"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def usable_levels() -> list[str]:
    """What may be asked of PyTorch, which takes a machine without AVX-512 at its word."""
    order = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower().replace("no avx", "default")
    return order[: order.index(best) + 1] if best in order else ["default"]


def test_levels_and_threads_agree_bit_for_bit():
    usable = usable_levels()
    code = "import test_neuron as t; from atsnn import ops; print(ops.native_level(), {})"
    found = {}
    for asked, used in LEVELS:
        if asked in usable:
            level, *digests = run_at_level(asked, code.format("t.digest(1), t.digest(2)")).split()
            assert level == used
            found[asked] = digests
    assert len({d for pair in found.values() for d in pair}) == 1, found


@pytest.mark.parametrize("level", [asked for asked, _ in LEVELS])
def test_each_level_equals_the_judge(level):
    if level not in usable_levels():
        pytest.skip(f"this machine has no {level}")
    code = (
        "import test_neuron as t\n"
        "import hypothesis; hypothesis.settings.load_profile('default')\n"
        "t.test_spikes_and_state_equal_the_judge.hypothesis.inner_test\n"
        "for seed in range(60):\n"
        "    import random; r = random.Random(seed)\n"
        "    s = dict(kind=r.choice(t.F.KINDS), tau=r.choice([1.5, 2.0, 3.7]),\n"
        "             v_threshold=r.choice([.5, 1.0, 1.3]), v_reset=r.choice([0.0, None, -.3]),\n"
        "             decay_input=r.random() < .5, detach_reset=r.random() < .5)\n"
        "    shape = (r.randint(1, 6), r.choice([1, 15, 17, 65, 1025]))\n"
        "    t.test_spikes_and_state_equal_the_judge.hypothesis.inner_test(\n"
        "        'native', shape, s, seed, seed % 2 == 0)\n"
        "print('same')\n"
    )
    assert run_at_level(level, code) == "same"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", F.KINDS)
def test_low_precision_storage_computes_in_float32(dtype, kind):
    x = (torch.randn(4, 777) * 2).to(dtype)
    inv_tau = torch.tensor(0.5) if kind == "plif" else None
    s, v = F.neuron(x, kind=kind, inv_tau=inv_tau)
    want_s, want_v = F.neuron(x.float(), kind=kind, inv_tau=inv_tau)
    assert s.dtype == dtype and v.dtype == torch.float32
    assert torch.equal(s.float(), want_s) and torch.equal(v, want_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_float32_gradients_rounded_once(dtype):
    x = (torch.randn(4, 777) * 2).to(dtype)
    grad = torch.randn(4, 777).to(dtype)
    a, b = x.clone().requires_grad_(), x.float().requires_grad_()
    (got,) = torch.autograd.grad(F.neuron(a)[0], a, grad)
    (want,) = torch.autograd.grad(F.neuron(b)[0], b, grad.float())
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("value", [0.0, -0.0, float("-inf"), float("nan"), 6e-8, 65504])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_storage_types_are_pytorchs(value, dtype):
    # A membrane that integrates once from rest is the input itself, widened.
    x = torch.tensor([[value, 1.0009765625, -3.0, 5.96e-8, -6.1e-5]]).to(dtype)
    _, v = F.neuron(x, kind="if", v_threshold=1e30)
    assert torch.equal(v.isnan(), x[0].isnan())
    assert torch.equal(v.nan_to_num(7.0, 1e30, -1e30), x[0].float().nan_to_num(7.0, 1e30, -1e30))


def test_narrowing_rounds_to_nearest_even():
    grads = torch.cat([torch.randn(4000) * 10.0**e for e in range(-9, 6)]).view(1, -1)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(grads.shape, dtype=dtype, requires_grad=True)
        v0 = torch.zeros(grads.shape[1:])
        # An IF far below threshold: grad_x is grad_v plus a vanishing surrogate term.
        _, v = F.neuron(x, v0, kind="if", v_threshold=1e30, surrogate="piecewise_quadratic")
        (got,) = torch.autograd.grad(v, x, grads[0])
        assert torch.equal(got, grads.to(dtype))


STRIDED = {
    "transposed": lambda: torch.randn(33, 5).t(),
    "expanded over time": lambda: torch.randn(1, 70).expand(6, 70),
    "expanded over columns": lambda: torch.randn(6, 1).expand(6, 70),
    "every second column": lambda: torch.randn(5, 140)[:, ::2],
    "every second step": lambda: torch.randn(10, 70)[::2],
    "permuted image": lambda: torch.randn(4, 2, 8, 9, 3).permute(0, 1, 4, 2, 3),
    "channels last": lambda: torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name, threads):
    x = STRIDED[name]()
    grad = torch.randn(x.shape[-1:]).expand(x.shape)
    results = []
    for tensor in (x, x.contiguous()):
        leaf = tensor.detach().requires_grad_()
        s, v = F.neuron(leaf, backend="native")
        (g,) = torch.autograd.grad(s, leaf, grad, retain_graph=True)
        (h,) = torch.autograd.grad(s, leaf, grad.contiguous())
        assert torch.equal(g, h)
        results.append((s, v, g))
    for strided, dense in zip(*results, strict=True):
        assert torch.equal(strided, dense)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (4,), (1,)])
def test_empty_and_scalar_neurons(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    s, v = F.neuron(x, v_reset=0.25, backend=backend)
    assert s.shape == x.shape and v.shape == x.shape[1:]
    if shape[0] == 0:
        assert (v == 0.25).all()
        assert not s.requires_grad or torch.autograd.grad(s.sum(), x)[0].shape == x.shape
    else:
        assert torch.autograd.grad(s.sum() + v.sum(), x)[0].shape == x.shape


def test_streaming_in_pieces_is_the_whole(threads):
    x = torch.randn(7, 600)
    whole, v_whole = F.neuron(x, v_reset=None)
    v, pieces = None, []
    for piece in (x[:1], x[1:4], x[4:]):
        s, v = F.neuron(piece, v, v_reset=None)
        pieces.append(s)
    assert torch.equal(torch.cat(pieces), whole) and torch.equal(v, v_whole)


def test_long_runs_need_no_long_tiles():
    x = torch.randn(500, 70, requires_grad=True)
    s, _ = F.neuron(x, backend="native")
    want, _ = F.neuron(x, backend="reference")
    assert torch.equal(s, want)
    g = torch.randn_like(s)
    torch.testing.assert_close(
        torch.autograd.grad(s, x, g)[0], torch.autograd.grad(want, x, g)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 1 << 20)),
        (torch.float32, (3, (1 << 20) + 16)),  # the last tile is short
        (torch.float32, (3, (1 << 20) + 5)),  # rows are not aligned
        (torch.float64, (2, (1 << 19) + 8)),
    ],
)
def test_large_results_pass_the_caches_by_and_are_the_same(threads, dtype, shape):
    x = (torch.randn(shape, dtype=dtype) * 1.5).requires_grad_()
    grad = torch.randn(shape, dtype=dtype)
    results = []
    for backend in BACKENDS:
        s, v = F.neuron(x, backend=backend, surrogate="super_spike")
        results.append((s, v, torch.autograd.grad(s, x, grad)[0]))
    (s, v, g), (want_s, want_v, want_g) = results
    assert torch.equal(s, want_s)
    assert torch.equal(v, want_v)
    torch.testing.assert_close(g, want_g, rtol=1e-5, atol=1e-5)


def test_only_the_input_is_saved_for_the_backward():
    x = torch.randn(4, 2, 16, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr()) or t, lambda t: t
    ):
        F.neuron(x, backend="native")
    assert saved == [x.untyped_storage().data_ptr()]


def op_arguments(grad: bool, kind: str = "lif", dtype=torch.float32):
    x = torch.randn(3, 5, 7, dtype=dtype, requires_grad=grad)
    v = torch.randn(5, 7, dtype=reference.arithmetic_dtype(dtype), requires_grad=grad)
    inv_tau = torch.tensor(0.4, requires_grad=grad) if kind == "plif" else None
    return (x, v, inv_tau, None, None, kind, 2.0, 1.0, 0.0, True, False, "sigmoid", 4.0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", F.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(grad, kind, dtype):
    torch.library.opcheck(torch.ops.atsnn.neuron, op_arguments(grad, kind, dtype))


def test_opcheck_backward():
    x, v, *settings = op_arguments(False)
    torch.library.opcheck(
        torch.ops.atsnn.neuron_backward, (torch.randn_like(x), torch.randn_like(v), x, v, *settings)
    )


def test_second_derivatives_are_refused_by_name():
    x = torch.randn(2, 3, requires_grad=True)
    s, _ = F.neuron(x, backend="native", surrogate="atan")
    (g,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        g.sum().backward()


def test_a_long_run_of_one_neuron_needs_little_memory():
    import resource

    x = torch.randn(300_000, 1, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.neuron(x, backend="native")[0].sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 120_000  # KiB


def test_use_backend_holds_inside_compiled_code(monkeypatch):
    monkeypatch.setattr("atsnn.ops.triton.package_missing", "it is not here")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.neuron(x)[0], fullgraph=True, backend="eager")
    x = torch.randn(2, 3)
    compiled(x)
    with pytest.raises(Exception, match="cannot serve the call"), atsnn.use_backend("triton"):
        compiled(x)


def test_compiles_whole():
    def step(x, v):
        s, v = F.neuron(x * 2, v, detach_reset=True)
        return s + 1, v

    x, v = torch.randn(4, 65), torch.randn(65)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = compiled(leaf, v), step(other, v)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    got[0].sum().backward()
    want[0].sum().backward()
    assert torch.equal(leaf.grad, other.grad)


def test_gradcheck_of_the_reset_path_in_float64():
    # Below threshold and detached from the reset, the neuron is linear in x and v.
    x = torch.rand(4, 3, dtype=torch.float64) * 0.2
    v = torch.rand(3, dtype=torch.float64) * 0.2
    inv_tau = torch.tensor(0.4, dtype=torch.float64)
    for leaf in (x, v, inv_tau):
        leaf.requires_grad_()
    for decay in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, v, i, decay=decay: F.neuron(
                x, v, kind="plif", inv_tau=i, v_threshold=50.0, decay_input=decay,
                detach_reset=True, surrogate="piecewise_quadratic",
            )[1],
            (x, v, inv_tau),
        )  # fmt: skip


BAD = [
    (dict(x=[1.0]), InvalidType, "x must be a torch.Tensor, got list"),
    (dict(x=torch.zeros(2, 3, dtype=torch.int32)), InvalidType, "got torch.int32"),
    (dict(x=torch.tensor(1.0)), InvalidValue, r"shape \(T, ...\), got a 0-d tensor"),
    (dict(kind="lfi"), InvalidValue, "kind must be one of 'lif', 'if', 'plif', got 'lfi'"),
    (dict(surrogate="relu"), InvalidValue, "got 'relu'"),
    (dict(decay_input="no"), InvalidType, "decay_input must be True or False, got 'no'"),
    (dict(detach_reset=3), InvalidType, "detach_reset must be True or False, got 3"),
    (dict(x=torch.zeros(2, 3).to_sparse()), InvalidType, "x must be a dense tensor"),
    (dict(surrogate=["atan"]), InvalidValue, "surrogate must be one of"),
    (dict(tau=1.0), InvalidValue, "tau must be a number > 1, got 1.0"),
    (dict(tau=float("nan")), InvalidValue, "tau must be a number > 1, got nan"),
    (dict(tau="2"), InvalidType, "tau must be a number, got '2'"),
    (dict(v_threshold=float("inf")), InvalidValue, "v_threshold"),
    (dict(v_reset=float("nan")), InvalidValue, "v_reset"),
    (dict(alpha=0.0), InvalidValue, "alpha must be a number > 0, got 0.0"),
    (dict(kind="plif"), InvalidValue, "needs inv_tau"),
    (dict(inv_tau=torch.tensor(0.5)), InvalidValue, "belongs to kind='plif'"),
    (dict(kind="plif", inv_tau=torch.ones(3)), InvalidValue, r"inv_tau must have shape \(\)"),
    (dict(v=torch.zeros(4)), InvalidValue, r"v must have the shape of x\[0\], \(3\), got \(4\)"),
    (dict(v=torch.zeros(3, dtype=torch.float64)), InvalidType, "v must be one of float32, got"),
    (dict(backend="cuda"), InvalidValue, "backend must be one of"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input_is_refused(arguments, error, message):
    arguments = {"x": torch.zeros(2, 3), **arguments}
    with pytest.raises(error, match=message):
        F.neuron(**arguments)


def test_operator_itself_refuses_what_does_not_fit():
    """The wrapper checks first, but the kernels must be safe from any caller."""
    x, _, *settings = op_arguments(False)
    with pytest.raises(ValueError, match="v must have shape"):
        torch.ops.atsnn.neuron(x, torch.zeros(5, 6), *settings)
    with pytest.raises(TypeError, match="v must be"):
        torch.ops.atsnn.neuron(x, torch.zeros(5, 7, dtype=torch.float64), *settings)
    with pytest.raises(ValueError, match="grad_spikes must have"):
        torch.ops.atsnn.neuron_backward(x[:2], None, x, None, *settings)
    with pytest.raises(ValueError, match="grad_v must have"):
        torch.ops.atsnn.neuron_backward(None, torch.zeros(5), x, None, *settings)
    with pytest.raises(ValueError, match="unknown surrogate"):
        torch.ops.atsnn.neuron(x, None, *settings[:-2], "relu", 1.0)


def test_use_backend(monkeypatch):
    called = []
    monkeypatch.setattr(
        reference, "neuron", lambda *a, f=reference.neuron: called.append(1) or f(*a)
    )
    x = torch.randn(2, 3)
    F.neuron(x)
    assert not called
    with atsnn.use_backend("reference"):
        F.neuron(x)
        F.neuron(x, backend="native")
    assert len(called) == 1
    F.neuron(x)
    assert len(called) == 1
    with pytest.raises(InvalidValue, match="backend must be one of"), atsnn.use_backend("cpu"):
        pass


def test_without_the_extension_auto_warns_once_and_native_refuses(monkeypatch):
    monkeypatch.setattr(backends, "native", None)
    monkeypatch.setattr(backends, "native_missing", "not built")
    monkeypatch.setattr(backends, "_warned", set())
    x = torch.randn(2, 3)
    with pytest.warns(UserWarning, match="not built"):
        F.neuron(x)
    F.neuron(x)  # an error if it warned again: warnings are errors in this suite
    with pytest.raises(BackendError, match="not built"):
        F.neuron(x, backend="native")
    assert atsnn.available_backends()["native"] == "not built"
