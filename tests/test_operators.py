"""Every operator: registration, compilation, strides, storage, threads, instruction sets."""

from __future__ import annotations

import pytest
import torch
from cases import LEAVES, OPERATORS, SMALL, WITHOUT_GRADIENT, assert_same, flat, operator_arguments
from test_neuron import LEVELS, run_at_level
from torch import Tensor

import atsnn.functional as F
from atsnn.cases import DIFFERENTIABLE, OPERATIONS, Numbers, gradients, ragged
from atsnn.reference import MergePlan

LOW = [torch.bfloat16, torch.float16]
FORMS = ("packed", "dense")
FORWARD = sorted(name for name in OPERATORS if not name.endswith("_backward"))


def operator(name):
    return getattr(torch.ops.atsnn, name).default


# -- registration ---------------------------------------------------------------------------------

VARIANTS = {
    "dense": dict(layout=None),
    "packed": dict(layout=SMALL),
    "packed, bare": dict(layout=SMALL, bare=True),
}


def with_leaves(arguments):
    """The arguments, those that have gradients as leaves."""
    return {
        key: x.detach().requires_grad_() if key in LEAVES and isinstance(x, Tensor) else x
        for key, x in arguments.items()
    }


def opcheck(name, arguments, utils=None):
    utils = {} if utils is None else dict(test_utils=utils)
    torch.library.opcheck(operator(name), (), arguments, **utils)


def test_every_operator_is_in_the_tables():
    assert len(OPERATORS) == 27
    for name in FORWARD:
        backward = f"{name}_backward" in OPERATORS
        assert backward == (name not in WITHOUT_GRADIENT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_opcheck(name, variant):
    """Schema, fake results, registration, and tracing; where nothing needs a gradient."""
    opcheck(name, operator_arguments(name, **VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["dense", "packed"])
@pytest.mark.parametrize("name", [n for n in FORWARD if n not in WITHOUT_GRADIENT])
def test_opcheck_with_gradients(name, variant):
    opcheck(name, with_leaves(operator_arguments(name, **VARIANTS[variant])))


TYPED = sorted(
    OPERATORS - {"token_layout", "layout_cells", "moved_rows", "halt", "halt_backward",
                 "pack_spikes", "unpack_spikes", "pack_linear", "spike_linear_lif"}
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
@pytest.mark.parametrize("name", TYPED)
def test_opcheck_of_storage_types(name, dtype):
    """Fake results have the dtypes of real ones."""
    for variant in VARIANTS.values():
        arguments = operator_arguments(name, dtype=dtype, **variant)
        opcheck(name, arguments, utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_what_computes_without_kernels_is_the_same(name, variant):
    """The composite of each operator, which serves where the extension is not built."""
    arguments = operator_arguments(name, **VARIANTS[variant])
    composite = torch._C.DispatchKey.CompositeExplicitAutograd
    got = flat(operator(name)._op_dk(composite, *arguments.values()))
    want = flat(operator(name)(**arguments))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if name.endswith("_backward"):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)


# -- compilation ----------------------------------------------------------------------------------

# On the arguments of an operator, and a layout made outside (None: dense).
COMPILED = {
    "neuron": lambda a, L: F.neuron(a["x"], a["v"], kind="plif", inv_tau=a["inv_tau"], layout=L),
    "spiking_attention": lambda a, L: F.spiking_attention(
        a["q"], a["k"], a["v"], num_heads=2, sizes=a["sizes"], layout=L
    ),
    "spike_driven_attention": lambda a, L: F.spike_driven_attention(
        a["q"], a["k"], a["v"], num_heads=2, state=a["state"], return_state=True, layout=L
    ),
    "halting_scores": lambda a, L: F.halting_scores(a["x"], a["weight"], a["bias"]),
    "halt": lambda a, L: F.halt(a["h"], a["H"], L),
    "readout": lambda a, L: F.readout(a["x"], a["w"], sizes=a["sizes"], layout=L),
    "firing_counts": lambda a, L: F.firing_counts(a["keys"], layout=L),
    "match_tokens": lambda a, L: (
        F.match_tokens(a["counts"], r=2, active_steps=a["active_steps"]).target
    ),
    "take_rows": lambda a, L: F.take_rows(a["x"], L, LESS),
    "merge_tokens": lambda a, L: F.merge_tokens(
        a["x"], MergePlan.of(a["target"]), sizes=a["sizes"], layout=L, after=L and MERGED
    ),
    "unmerge_tokens": lambda a, L: F.unmerge_tokens(
        a["y"], MergePlan.of(a["target"]), layout=L, after=L and MERGED
    ),
}
LESS = SMALL.without(torch.tensor([[True, False, False], [False, False, True]]))
MERGED = SMALL.without(MergePlan.of(operator_arguments("merge_tokens", SMALL)["target"]).merged)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(name, form):
    """One graph, given a layout made outside, with the numbers of eager mode; gradients too."""
    if form == "dense" and name in ("halt", "take_rows"):
        pytest.skip("of rows only")
    layout = SMALL if form == "packed" else None
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, COMPILED[name]):
        arguments = with_leaves(operator_arguments(name, layout))
        if name not in WITHOUT_GRADIENT:
            leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        out = flat(function(arguments, layout))
        reached = [o for o in out if o.requires_grad]
        assert bool(reached) == (name not in WITHOUT_GRADIENT)
        sent = [Numbers(9).integers(-8, 8, o.shape, bits=2).to(o.dtype) for o in reached]
        grads = torch.autograd.grad(reached, leaves, sent, allow_unused=True) if reached else ()
        found.append((*out, *(g for g in grads if g is not None)))
    assert_same(*found)


def test_compiles_with_inductor():
    """Operators on rows, between code that the compiler generates."""

    def block(x, layout):
        s, _ = F.neuron(x * 2 - 0.5, layout=layout, detach_reset=True)
        out = F.spiking_attention(s, s, s, num_heads=2, layout=layout) + x
        return F.readout(out, out.mean(-1), layout=layout).float() * 0.5

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    x = SMALL.pack(Numbers(1).integers(-8, 8, (2, 2, 3, 8), bits=2).float())
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = compiled(ours, SMALL), block(theirs, SMALL)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


# -- strides --------------------------------------------------------------------------------------


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def spaced(x):
    return torch.stack([x, x.bitwise_not() if x.dtype == torch.bool else -x], -1)[..., 0]


def shifted(x):
    """Contiguous, one element after an aligned address."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def expanded(x):
    """One value or row over all; of tensors that need not be distinct."""
    return x[:1].expand(x.shape) if x.is_floating_point() and x.dim() and len(x) else x


def expanded_channels(x):
    return x[..., :1].expand(x.shape) if x.is_floating_point() and x.dim() and len(x) else x


STRIDED = [transposed, spaced, shifted, expanded, expanded_channels]


@pytest.mark.parametrize("arrange", STRIDED)
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_any_strides(name, arrange):
    """Of all tensors: rows, gradients sent, indices, targets and the layout itself."""
    for layout in (ragged(4, 3, 2, 7), None):
        arguments = operator_arguments(name, layout, C=6, shape=(3, 2, 7))
        strided = {
            key: arrange(x.detach()) if isinstance(x, Tensor) else x for key, x in arguments.items()
        }
        plain = {
            key: x.clone(memory_format=torch.contiguous_format)
            if isinstance(x, Tensor) else x
            for key, x in strided.items()
        }  # fmt: skip
        assert_same(flat(operator(name)(**strided)), flat(operator(name)(**plain)), name)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_expanded_gradients(name):
    """What ``sum`` sends back is one element over all."""
    operation, layout = OPERATIONS[name], ragged(4, 3, 2, 7)
    inputs = operation.make(Numbers(2), layout, operation.channels(5), torch.float32)
    for form in FORMS:
        leaves = {
            key: x.clone().requires_grad_() if key in operation.leaves else x
            for key, x in inputs.items()
        }
        out = [o for o in getattr(operation, form)("native", layout, **leaves) if o.requires_grad]
        wanted = [leaves[key] for key in operation.leaves]
        sums = torch.autograd.grad(
            [o.sum() for o in out], wanted, retain_graph=True, allow_unused=True
        )
        ones = torch.autograd.grad(out, wanted, [torch.ones_like(o) for o in out],
                                   allow_unused=True)  # fmt: skip
        assert_same(sums, ones)


# -- storage types --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_low_precision_is_float32_rounded_once(name, form, dtype):
    if name.startswith("neuron") and form == "dense":
        pytest.skip("its dense form is many calls, whose gradients add up; see test_neuron.py")
    operation, layout = OPERATIONS[name], ragged(6, 4, 2, 19)
    inputs = operation.make(Numbers(3), layout, operation.channels(17), dtype)
    wide = {key: x.float() if x.dtype == dtype else x for key, x in inputs.items()}
    out, grads = gradients(operation, form, "native", layout, inputs, Numbers(4))
    want_out, want_grads = gradients(operation, form, "native", layout, wide, Numbers(4))
    assert any(x.dtype == dtype for x in inputs.values()) or name.startswith(("halt", "linear"))
    ours = (*out, *grads.values())
    theirs = (*want_out, *want_grads.values())
    types = [x.dtype for x in out] + [inputs[key].dtype for key in grads]
    assert [x.dtype for x in ours] == types
    assert_same(ours, tuple(b.to(a.dtype) for a, b in zip(ours, theirs, strict=True)))


# -- threads and instruction sets -----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_threads_do_not_change_a_bit(name, form):
    """At sizes of several of the chunks that threads take: rows, tiles, runs, heads, images."""
    operation, layout = OPERATIONS[name], ragged(7, 3, 6, 64)
    inputs = operation.make(Numbers(5), layout, operation.channels(96), torch.float32)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out, grads = gradients(operation, form, "native", layout, inputs, Numbers(6))
        found.append((*out, *grads.values()))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_levels_agree_bit_for_bit():
    order = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower().replace("no avx", "default")
    usable = order[: order.index(best) + 1] if best in order else ["default"]
    code = (
        "import cases, torch; from atsnn import ops; torch.set_num_threads(1); "
        "print(ops.native_level(), cases.digest())"
    )
    found = {}
    for asked, used in LEVELS:
        if asked in usable:
            level, found[asked] = run_at_level(asked, code).split()
            assert level == used
    assert len(set(found.values())) == 1, found


def test_what_a_plan_merges_is_several_into_one():
    """The tables' plans hold what a merge must get right: more than a pair, and tokens alone."""
    target = operator_arguments("merge_tokens", ragged(5, 4, 3, 21))["target"]
    members = torch.zeros_like(target).scatter_add(1, target, torch.ones_like(target))
    assert int(members.max()) > 2 and int((members == 1).sum()) > 0
    assert MergePlan.of(target).merged.any(1).all()
