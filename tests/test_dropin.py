"""Accelerated models against the same models before: SpikingJelly's, and plain ones."""

import copy
import io

import lively
import pytest
import torch
from lively import LIF, functional, layer, liven, neuron, surrogate
from spikingjelly.activation_based import base
from torch import nn

import atsnn
from atsnn import accelerate
from atsnn.checks import InvalidType, InvalidValue
from atsnn.dropin import restore

T, B = 4, 3


def still(*shape):
    """An image shown T times, on a grid."""
    torch.manual_seed(1)
    return (torch.rand(1, B, *shape) * 16).round().div(16).repeat(T, 1, 1, 1, 1)


def moving(*shape):
    torch.manual_seed(2)
    return (torch.rand(T, B, *shape) * 16).round().div(16)


MODELS = {
    "csnn": (lively.csnn, still(1, 28, 28), (0, 6)),
    "csnn, moving": (lively.csnn, moving(1, 28, 28), (0, 6)),
    "attributes": (lively.Attributes, moving(2, 8, 8), (0, 6)),
    "vgg": (lively.small_vgg, still(3, 16, 16), (0, 6)),
    "plif net": (lively.plif_net, still(1, 28, 28), (0, 6)),
    "spikformer": (lively.small_spikformer, moving(3, 16, 16), (-2, 4)),
    "spikformer, 48 channels": (lambda: lively.small_spikformer(48), still(3, 16, 16), (-2, 4)),
    "sdt": (lively.small_sdt, still(3, 16, 16), (-2, 4)),
}


def lively_pair(name, exact=True):
    """A model that fires, its twin, and the input."""
    make, x, bias = MODELS[name]
    torch.manual_seed(0)
    model = make()
    functional.set_step_mode(model, "m")
    rates = liven(model, x, exact, bias=bias)
    assert rates and all(0.01 <= r <= 0.6 for r in rates.values()), rates
    return model, copy.deepcopy(model), x


def membranes(model):
    return {n: m.v for n, m in model.named_modules() if isinstance(m, neuron.BaseNode)}


def assert_same_state(one, other):
    a, b = membranes(one), membranes(other)
    assert a.keys() == b.keys() and a
    for name in a:
        if isinstance(a[name], float):
            assert a[name] == b[name], name
        else:
            assert a[name].shape == b[name].shape and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_inference_is_the_same_bit_for_bit(name):
    model, fast, x = lively_pair(name)
    keys = list(model.state_dict())
    report = accelerate(fast)
    assert report.model is fast and report.replaced and not report.left, report
    assert list(fast.state_dict()) == keys
    model.eval(), fast.eval()
    with torch.no_grad():
        for i in range(3):  # goes on from the membranes of the call before
            want, got = model(x), fast(x)
            assert got.shape == want.shape and got.is_contiguous() == want.is_contiguous()
            assert torch.equal(got, want), i
            assert_same_state(model, fast)
            x = x.flip(0)
    functional.reset_net(model), functional.reset_net(fast)
    assert_same_state(model, fast)


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(name):
    model, fast, x = lively_pair(name)
    accelerate(fast)
    model.train(), fast.train()
    results = []
    for net in (model, fast):
        torch.manual_seed(3)  # dropout
        inputs = x.clone().requires_grad_()
        y = net(inputs)
        y.square().sum().backward()
        results.append((y, inputs.grad, [p.grad for p in net.parameters()]))
    assert_same_state(model, fast)
    (y, gx, gp), (y2, gx2, gp2) = results
    assert torch.equal(y, y2)
    assert any(g is not None and g.abs().max() > 0 for g in gp)
    torch.testing.assert_close(gx2, gx, rtol=1e-5, atol=1e-6 * float(gx.abs().max()))
    # A bias before a BatchNorm has a gradient of nothing but rounding.
    largest = max(float(g.abs().max()) for g in gp if g is not None)
    for g, g2 in zip(gp, gp2, strict=True):
        assert (g is None) == (g2 is None)
        if g is not None:
            torch.testing.assert_close(g2, g, rtol=1e-4, atol=1e-6 * largest)
    for a, b in zip(model.buffers(), fast.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["csnn", "vgg", "sdt"])
def test_weights_off_the_grid_flip_few_spikes(name):
    """Sums are rounded in another order; spikes that this flips are counted."""
    model, fast, x = lively_pair(name, exact=False)
    accelerate(fast)
    model.eval(), fast.eval()
    with torch.no_grad():
        want, got = model(x), fast(x)
    states, states2 = membranes(model), membranes(fast)
    differ = sum(int(((states[n] - states2[n]).abs() > 1e-4).sum()) for n in states)
    neurons = sum(v.numel() for v in states.values())
    assert differ <= 1e-4 * neurons
    assert float((want - got).abs().mean()) <= 0.02 * float(want.abs().mean())


@pytest.mark.parametrize("name", ["csnn", "attributes", "vgg"])
def test_step_by_step(name):
    model, fast, x = lively_pair(name)
    accelerate(fast)
    model.eval(), fast.eval()
    functional.set_step_mode(model, "s"), functional.set_step_mode(fast, "s")
    with torch.no_grad():
        for step in x:
            assert torch.equal(fast(step), model(step))
            assert_same_state(model, fast)


NODES = {
    "lif": lambda **k: neuron.LIFNode(tau=1.5, **k),
    "lif, no decay": lambda **k: neuron.LIFNode(tau=3.0, decay_input=False, **k),
    "if": neuron.IFNode,
    "plif": lambda **k: neuron.ParametricLIFNode(init_tau=1.7, **k),
}


@pytest.mark.parametrize("surrogate_function", [
    surrogate.Sigmoid(), surrogate.ATan(3.0), surrogate.PiecewiseQuadratic(),
    surrogate.PiecewiseExp(), surrogate.SoftSign(), surrogate.SuperSpike(), surrogate.Erf(),
], ids=lambda s: type(s).__name__)  # fmt: skip
@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("kind", NODES)
def test_neurons_are_the_same(kind, mode, surrogate_function):
    for settings in ({}, {"v_reset": None}, {"detach_reset": True, "v_reset": -0.5},
                     {"v_threshold": 0.4}):  # fmt: skip
        node = NODES[kind](surrogate_function=surrogate_function, step_mode=mode, **settings)
        twin = copy.deepcopy(node)
        assert accelerate(twin).replaced[0].kind == type(node).__name__
        assert isinstance(twin, type(node))
        results = []
        for n in (node, twin):
            torch.manual_seed(4)
            x = torch.randn(*([T] if mode == "m" else []), 5, 7, requires_grad=True)
            steps = [n(x) for _ in range(2)]
            (sum((s * torch.randn_like(s)).sum() for s in steps) + n.v.sum()).backward()
            results.append((*steps, n.v, x.grad, *(p.grad for p in n.parameters())))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6)
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(node.v, twin.v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_same(dtype):
    node = neuron.LIFNode(step_mode="m")
    twin = accelerate(copy.deepcopy(node)).model
    x = torch.randn(T, 50).to(dtype)
    assert torch.equal(node(x), twin(x)) and node.v.dtype == twin.v.dtype
    assert torch.equal(node.v, twin.v)


def test_settings_may_change_afterwards():
    node = neuron.LIFNode(step_mode="m")
    twin = accelerate(copy.deepcopy(node)).model
    x = torch.randn(T, 50)
    for name, value in (("v_threshold", 0.3), ("tau", 4.0), ("v_reset", None),
                        ("surrogate_function", surrogate.LeakyKReLU()), ("store_v_seq", True),
                        ("v", 0.5)):  # fmt: skip
        for n in (node, twin):
            n.reset()
            setattr(n, name, value)
        assert torch.equal(node(x), twin(x)), name
        assert torch.equal(node.v, twin.v), name
    assert torch.equal(node.v_seq, twin.v_seq)


def test_what_is_not_known_is_left_alone_and_said():
    class Mine(neuron.LIFNode):
        pass

    model = nn.Sequential(
        neuron.LIFNode(surrogate_function=surrogate.LeakyKReLU()), Mine(), neuron.QIFNode(),
        layer.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular"),
        nn.Conv1d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.GELU(),
    )  # fmt: skip
    kinds = [type(m) for m in model]
    report = accelerate(model)
    assert [type(m) for m in model] == kinds
    said = {c.name: c.reason for c in report.left}
    assert said.keys() == {"0", "1", "2", "3", "4", "5"}
    assert "no kernel" in said["2"]
    assert "LeakyKReLU" in said["0"] and "subclass of LIFNode" in said["1"]
    assert "2 groups" in said["3"] and "circular" in said["4"] and "3 taps" in said["5"]
    assert "left alone" in str(report) and "LeakyKReLU" in str(report)
    with pytest.raises(InvalidType, match=r"model must be a torch\.nn\.Module, got int"):
        accelerate(3)


def test_another_spikingjelly_is_said(monkeypatch):
    import sys

    import atsnn.dropin

    monkeypatch.setitem(sys.modules, "atsnn.dropin.jelly", None)
    monkeypatch.delattr(atsnn.dropin, "jelly")
    report = accelerate(lively.csnn())
    assert "as of version 2.0.0" in report.left[0].reason
    assert {c.kind for c in report.replaced} == {"Sequential"}


def test_again_and_back():
    model, fast, x = lively_pair("spikformer")
    report = accelerate(model, inplace=False)
    assert report.model is not model
    assert {type(m) for m in model.modules()} == {type(m) for m in fast.modules()}
    assert accelerate(fast).replaced and not accelerate(fast).changes
    fast.eval(), model.eval()
    with torch.no_grad():
        fast(x)
        for again in (copy.deepcopy(fast), reloaded(fast)):
            functional.reset_net(again)
            assert torch.equal(again(x), model(x))
            functional.reset_net(model)
    assert restore(fast) is fast
    assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
    assert not any(k.startswith("_atsnn") for m in fast.modules() for k in m.__dict__)


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_hooks_see_what_they_saw():
    model, fast, x = lively_pair("spikformer")
    accelerate(fast)
    model.eval(), fast.eval()
    for where in ("patch_embed.stages.1.conv_bn.block.0", "blocks.1.attn.qkv_conv_bn",
                  "blocks.0.mlp.fc1", "blocks.0.attn.attn_lif", "patch_embed.stages"):  # fmt: skip
        seen = []
        for net in (model, fast):
            handle = net.get_submodule(where).register_forward_hook(
                lambda m, i, y, seen=seen: seen.append((i[0], y))
            )
            with torch.no_grad():
                net(x)
            handle.remove()
            functional.reset_net(net)
        (before, after), (before2, after2) = seen
        assert torch.equal(before, before2) and torch.equal(after, after2), where


def test_counters_count_what_they_counted():
    from torch.utils.flop_counter import FlopCounterMode

    model, fast, x = lively_pair("vgg")
    accelerate(fast)
    model.eval(), fast.eval()
    totals = []
    for net in (model, fast):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            net(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_autocast_is_the_same():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), model(x))


def test_changed_weights_are_seen():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    with torch.no_grad():
        fast(x)
        functional.reset_net(fast)
        for net in (model, fast):
            net[4].weight.mul_(2), net[5].running_mean.add_(0.25), net[9].weight.neg_()
        want = model(x)
        assert torch.equal(fast(x), want)
        functional.reset_net(model), functional.reset_net(fast)
        for net in (model, fast):  # other modules in their places
            net[6] = neuron.LIFNode(step_mode="m", tau=4.0)
        assert torch.equal(fast(x), model(x))
        functional.reset_net(model), functional.reset_net(fast)
        for net in (model, fast):
            net[4].weight[0, 0, 0, 0] = float("nan")
        assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("name, where", [
    ("csnn", "6"), ("spikformer", "blocks.1.attn.proj_lif"),
    ("spikformer", "blocks.0.attn.attn_lif"),
    ("spikformer", "blocks.0.mlp.neuron1"), ("sdt", "blocks.1.attn.k_lif"),
    ("sdt", "blocks.0.mlp.lif2"), ("sdt", "patch_embed.final_lif"),
])  # fmt: skip
def test_what_is_recorded_or_replaced_is_as_before(name, where):
    model, fast, x = lively_pair(name)
    accelerate(fast)
    model.eval(), fast.eval()
    with torch.no_grad():
        fast(x)
        functional.reset_net(fast)
        for net in (model, fast):
            net.get_submodule(where).store_v_seq = True
        assert torch.equal(fast(x), model(x))
        a, b = (net.get_submodule(where).v_seq for net in (model, fast))
        assert torch.equal(a, b)
        functional.reset_net(model), functional.reset_net(fast)
        for net in (model, fast):  # by one that no kernel knows
            parent, _, child = where.rpartition(".")
            other = neuron.LIFNode(surrogate_function=surrogate.LeakyKReLU(), step_mode="m",
                                   v_threshold=0.5).eval()  # fmt: skip
            setattr(net.get_submodule(parent), child, other)
        assert torch.equal(fast(x), model(x))
        assert_same_state(model, fast)
        if name == "spikformer":  # other weights in the place of a layer
            functional.reset_net(model), functional.reset_net(fast)
            for net in (model, fast):
                torch.manual_seed(8)
                net.blocks[0].attn.qkv_conv_bn[0] = nn.Conv1d(64, 192, 1, bias=False)
                net.blocks[0].attn.qkv_conv_bn[0].weight.mul_(64).round_().div_(64)
            torch.testing.assert_close(fast(x), model(x))


def test_modules_that_come_again_are_called_again():
    shared = neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan())
    pool = layer.MaxPool2d(2, 2, step_mode="m")
    cases = [
        (nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared), torch.rand(T, 2, 8) * 6),
        (nn.Sequential(layer.Conv2d(1, 4, 3, step_mode="m"), shared, pool, pool),
         torch.rand(T, 2, 1, 12, 12) * 6),
        (nn.Sequential(layer.SeqToANNContainer(*[nn.Conv2d(2, 2, 3, padding=1)] * 2), shared),
         torch.rand(T, 2, 2, 6, 6) * 6),
    ]  # fmt: skip
    for model, x in cases:
        fast = accelerate(model, inplace=False).model
        for mode in (True, False):
            model.train(mode), fast.train(mode)
            with torch.no_grad():
                want, got = model(x), fast(x)
            assert want.shape == got.shape
            torch.testing.assert_close(got, want)
            functional.reset_net(model), functional.reset_net(fast)


def test_a_parametrization_outlives_restore():
    from torch.nn.utils.parametrizations import weight_norm

    net = weight_norm(accelerate(nn.Linear(8, 8)).model)
    x = torch.rand(3, 8)
    want = net(x)
    assert torch.equal(restore(net)(x), want)


def test_wrong_input_is_the_models_own_error():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    for wrong in (x[:, :, :, :5, :5], x.repeat(1, 1, 2, 1, 1), x.double(), x[0, 0]):
        errors = []
        for net in (model, fast):
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as info:
                net(wrong)
            errors.append(str(info.value))
            functional.reset_net(net)
        assert errors[0] == errors[1]
    empty = x[:, :0]
    with torch.no_grad():
        assert torch.equal(fast(empty), model(empty))


def test_gradients_can_be_had_in_evaluation():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    grads = []
    for net in (model, fast):
        inputs = x.clone().requires_grad_()
        net(inputs).sum().backward()
        grads.append(inputs.grad)
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6 * float(grads[0].max()))


def test_compiled():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    explained = torch._dynamo.explain(fast)(x)
    assert explained.graph_break_count == 0, explained.break_reasons
    functional.reset_net(fast)
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert_same_state(model, fast)


def test_functional_forward():
    model, fast, x = lively_pair("csnn")
    accelerate(fast)
    model.eval(), fast.eval()
    outputs = []
    for net in (model, fast):
        states = tuple(base.extract_memories(net))
        with torch.no_grad():
            outputs.append(base.to_functional_forward(net)((x,), states))
    (y, states), (y2, states2) = outputs
    assert torch.equal(y[0], y2[0])
    assert all(torch.equal(a, b) for a, b in zip(states, states2, strict=True))
    node, twin = neuron.LIFNode(**LIF), accelerate(neuron.LIFNode(**LIF)).model
    a, b = (n.functional_forward((x[0],), (0.0,)) for n in (node, twin))
    assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[1][0], b[1][0])


@pytest.mark.parametrize("mode", ["m", "s"])
def test_our_neurons_in_spikingjellys_company(mode):
    """Under reset_net and in the form of functional_forward."""
    ours, theirs = atsnn.nn.LIF(step_mode=mode), neuron.LIFNode(step_mode=mode)
    x = torch.randn(*([T] if mode == "m" else []), 20)
    for state in (0.0, 0.5, torch.randn(20)):
        a, b = (n.functional_forward((x,), (state,)) for n in (ours, theirs))
        assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[1][0], b[1][0])
    assert ours.v is None  # nothing was kept
    net = nn.Sequential(ours, nn.Identity())
    net(x)
    assert ours.v is not None
    functional.reset_net(net)
    assert ours.v is None
    with pytest.raises(InvalidValue, match="states must be a tuple of one"):
        ours.functional_forward((x,), ())


def test_plain_layers_look_for_spikes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 130), atsnn.nn.LIF(),
        nn.Linear(130, 5),
    ).eval()  # fmt: skip
    fast = accelerate(model, inplace=False).model
    spikes = (torch.rand(64, 512) < 0.2).float()
    with torch.no_grad():
        assert not torch.equal(fast[0](spikes), model[0](spikes))  # added in another order
        torch.testing.assert_close(fast[0](spikes), model[0](spikes))
        torch.testing.assert_close(fast(spikes), model(spikes))
        assert torch.equal(fast[0](input=spikes), model[0](spikes))
        assert torch.equal(fast[0](spikes + 0.5), model[0](spikes + 0.5))  # dense: its own
        for conv, maps in (
            (nn.Conv2d(32, 64, 3, stride=2, padding=1), (torch.rand(4, 32, 33, 33) < 0.2).float()),
            (nn.Conv1d(128, 96, 1), (torch.rand(9, 128, 70) < 0.2).float()),
        ):
            quick = accelerate(conv.eval(), inplace=False).model
            for x in (maps, maps * 2):
                torch.testing.assert_close(quick(x), conv(x))
            if conv.weight.dim() == 4:
                assert not torch.equal(quick(maps), conv(maps))
            torch.testing.assert_close(quick(maps[0]), conv(maps[0]))


def test_what_is_too_small_or_too_dense_is_not_looked_at():
    small = accelerate(nn.Linear(128, 128).eval()).model
    with torch.no_grad():
        small((torch.rand(16, 128) < 0.1).float())
        assert "_atsnn_look" not in small.__dict__
        large = accelerate(nn.Linear(600, 512).eval()).model
        twin = copy.deepcopy(large)
        dense, spikes = torch.rand(64, 600), (torch.rand(64, 600) < 0.1).float()
        large(dense)
        looks = [torch.equal(large(spikes), restore(copy.deepcopy(twin))(spikes))
                 for _ in range(40)]  # fmt: skip
        # The modules' own result for a while, then the event-driven one.
        assert looks[0] and not looks[-1] and looks == sorted(looks, reverse=True)
