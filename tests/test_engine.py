"""The engine gives the model's numbers: on exact models bit for bit, however it is run."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_model import SMALL, VARIANTS, small
from torch import nn

import atsnn
import atsnn.nn as ann
from atsnn.checks import InvalidType, InvalidValue
from atsnn.compare import compare_engine
from atsnn.data import load
from atsnn.engine import KNOWN, levels
from atsnn.firing import set_firing_rates
from atsnn.schedule import scheduled, synthetic_depths, synthetic_scores
from atsnn.testing import exact_images, exact_model

SAME = (
    "logits", "active", "depth", "scores", "weights", "sizes", "block_sizes", "source",
    "ponder_loss",
)  # fmt: skip


def assert_same(ours, theirs, what=""):
    for name in SAME:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype and a.shape == b.shape, (name, a.dtype, b.dtype)
        assert torch.equal(a, b), f"{what} {name}: {int((a != b).sum())} of {a.numel()} differ"


def assert_same_rates(ours, theirs, whole_stem=True, rel=1e-5):
    """Where the stem ran around some tokens alone its rates are of what it ran on."""
    for name, rate in theirs.firing_rates.items():
        if whole_stem or not name.startswith("patch_embed."):
            assert ours.firing_rates[name] == pytest.approx(rate, rel=rel), name


@torch.no_grad()
def traced(model, images):
    return model(images, return_trace=True)


# -- the numbers of the model ---------------------------------------------------------------------


@pytest.mark.parametrize("T", [None, 1, 5], ids=["still", "T1", "T5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_models_bit_for_bit(variant, T):
    """Logits, scores, depths, weights, sizes and firing rates; still images and video."""
    model = exact_model(small(variant), 1)
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 5, 7, T=T)
    want = traced(model, images)
    for execution in ("packed", "masked"):
        got = engine(images, return_trace=True, execution=execution)
        assert_same(got, want, f"{variant} {execution}")
        assert_same_rates(got, want, variant != "sequential" or execution == "masked")
    assert torch.equal(engine(images), want.logits)
    if model.config.adaptive and T != 1:
        assert not want.active.all(), "something must have halted or merged"


@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_levels_and_batches_do_not_change_a_bit(variant):
    """On real weights: every instruction set, thread count, execution and batch."""
    torch.manual_seed(3)
    model = atsnn.ATSpikformer(small(variant)).eval()
    images = exact_images(model.config, 6, 5)
    set_firing_rates(model, images, 0.2, 0.3)
    engine = atsnn.freeze(model)
    want = engine(images, return_trace=True)
    assert len(set(want.logits.flatten().tolist())) > 6, "the images must differ"
    for level in levels():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for execution in ("packed", "masked"):
                got = engine(images, return_trace=True, execution=execution, level=level)
                assert_same(got, want, f"{level} {threads} {execution}")
                whole = variant != "sequential" or execution == "packed"  # as `want` has it
                assert_same_rates(got, want, whole, rel=1e-12)
    alone = torch.cat([engine(image[None]) for image in images])
    assert torch.equal(alone, want.logits)


@st.composite
def configs(draw):
    """Channels that fill no word or vector, one head or many, odd maps, one token."""
    halting = draw(st.sampled_from([None, "rectangle", "depth", "sequential"]))
    heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    stem = draw(st.sampled_from(["cifar", "imagenet"]))
    patch = {"cifar": 4, "imagenet": 16}[stem]
    depth = draw(st.integers(1, 3))
    merges = halting != "sequential" and depth > 1 and draw(st.booleans())
    by_threshold = merges and draw(st.booleans())
    return atsnn.SpikformerConfig(
        image_size=patch * draw(st.integers(1, 4 if stem == "cifar" else 2)),
        in_channels=draw(st.integers(1, 3)), num_classes=draw(st.integers(1, 6)),
        embed_dim=8 * heads * draw(st.integers(1, 3)), num_heads=heads, depth=depth,
        mlp_ratio=draw(st.sampled_from([0.5, 1.0, 2.3, 4.0])), T=draw(st.integers(1, 6)),
        stem=stem, pool=draw(st.sampled_from(["after_lif", "before_lif"])),
        attention=draw(st.sampled_from(["ssa", "sdsa"])), bias=draw(st.booleans()),
        halting=halting, score=draw(st.sampled_from(["first", "mean", "linear", "constant"])),
        readout=draw(st.sampled_from(["mean-field", "last"])),
        merge_r=draw(st.integers(0, 3)) if merges and not by_threshold else 0,
        merge_threshold=0.6 if by_threshold else None, merge_sizes=draw(st.booleans()),
    )  # fmt: skip


@given(configs(), st.integers(0, 1000), st.sampled_from([None, 1, 16]))
@settings(max_examples=12)
def test_any_configuration(config, seed, T):
    model = exact_model(config, seed)
    images = exact_images(config, 3, seed + 1, T=T)
    want = traced(model, images)
    engine = atsnn.freeze(model)
    level = levels()[seed % len(levels())]
    # Quotients of sums over three timesteps are rounded, and only in exact order the same.
    exact = config.halting != "sequential" or config.T == 1
    for execution in ("packed", "masked"):
        got = engine(images, return_trace=True, execution=execution, level=level)
        if not exact:
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=1e-6)
            got.logits = want.logits
        assert_same(got, want, f"{config} {execution} {level}")


@pytest.mark.parametrize("bias", [-60.0, 60.0], ids=["silent", "always"])
def test_rates_zero_and_one(bias):
    """Nothing fires, or everything does: empty lists, and full ones."""
    model = exact_model(small("rectangle"))
    with torch.no_grad():
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
            bn.bias.fill_(bias)
    images = exact_images(model.config, 3)
    got = atsnn.freeze(model)(images, return_trace=True)
    assert_same(got, traced(model, images))
    rates = [rate for name, rate in got.firing_rates.items() if "qkv"[0] + "_lif" in name]
    assert all(rate == (bias > 0) for rate in rates)


def test_empty_batch():
    model = exact_model(small("halting and merging"))
    images = exact_images(model.config, 0)
    got = atsnn.freeze(model)(images, return_trace=True)
    assert got.logits.shape == (0, 5) and got.active.shape == (3, 3, 0, 16)


@pytest.mark.parametrize(
    "neuron",
    [ann.IF(), ann.PLIF(init_tau=4.0), ann.LIF(tau=4.0, decay_input=False, v_reset=None),
     ann.LIF(tau=3.0, v_threshold=0.75, v_reset=-0.25)],
    ids=["if", "plif", "soft reset", "tau 3"],
)  # fmt: skip
def test_other_neurons(neuron):
    model = exact_model(small("rectangle"))
    for block in model.block:
        for part, names in ((block.attn, "q k v proj attn"), (block.mlp, "fc1 fc2")):
            for name in names.split():
                setattr(part, f"{name}_lif", copy.deepcopy(neuron))
    model.patch_embed.proj1_lif = copy.deepcopy(neuron)
    images = exact_images(model.config, 3)
    assert_same(atsnn.freeze(model.eval())(images, return_trace=True), traced(model, images))


def test_many_images_run_in_groups():
    """More images than run together; their results do not move."""
    model = exact_model(small("halting and merging"))
    images = exact_images(model.config, 200)
    want = traced(model, images)
    assert_same(atsnn.freeze(model)(images, return_trace=True), want)
    video = exact_images(model.config, 150, T=2)
    assert_same(atsnn.freeze(model)(video, return_trace=True), traced(model, video))


def test_trained_digits_are_put_in_the_same_class(capsys):
    """All test images; where a spike flips at its threshold it is counted."""
    model = atsnn.from_pretrained("digits")
    images = load("digits", model.config.image_size)["test"].images
    difference = compare_engine(model, images)
    with capsys.disabled():
        print(f"\n{difference}")
    assert difference.images == 360 and difference.classes == 0
    assert difference.flipped < 1e-4 * difference.spikes


def test_compare_sees_a_spike_that_flips():
    """In a model whose weights differ from those that were frozen by one bias."""
    model = exact_model(small("rectangle"))
    images = exact_images(model.config, 3)
    same = compare_engine(model, images)
    assert same.flipped == 0 and same.spikes > 1000 and same.logits == 0
    assert str(same) == "engine = model on 3 images (bit for bit, no flipped spike)"

    for arguments, error, message in (
        ((atsnn.freeze(model), images), InvalidType, "must be an ATSpikformer, got Engine"),
        ((model, images.tolist()), InvalidType, "must be a torch.Tensor, got list"),
        ((model, images[:0]), InvalidValue, "at least one"),
        ((model, images, 0), InvalidValue, "batch must be"),
    ):
        with pytest.raises(error, match=message):
            compare_engine(*arguments)

    class Shifted(ann.LIF):
        """Fires at another threshold than it says."""

        def run(self, x, v=None, layout=None):
            return super().run(x + 0.25, v, layout)

    for layer in ("q_lif", "attn_lif", "proj_lif"):
        other = copy.deepcopy(model)
        neuron = getattr(other.block[1].attn, layer)
        setattr(other.block[1].attn, layer, Shifted(v_threshold=neuron.v_threshold).eval())
        KNOWN.append(Shifted)
        try:
            different = compare_engine(other, images)
        finally:
            KNOWN.remove(Shifted)
        assert different.flipped > 0, layer


# -- streaming ------------------------------------------------------------------------------------

STREAMING = [v for v in VARIANTS if not ({"merge_r", "merge_threshold"} & set(VARIANTS[v]))]


@pytest.mark.parametrize("steps", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("variant", STREAMING)
def test_a_stream_in_parts_is_the_whole(variant, steps):
    """Membranes, scores and the readout are carried; each step's trace is a slice of the whole."""
    model = exact_model(small(variant), 2)
    engine = atsnn.freeze(model)
    video = exact_images(model.config, 4, 3, T=5)
    whole = engine(video, return_trace=True)
    for execution in ("packed", "masked"):
        state, begin = atsnn.EngineState(), 0
        for n in steps:
            part = engine(video[begin : begin + n], True, state=state, execution=execution)
            for name in ("active", "scores", "weights"):
                want = getattr(whole, name)[:, begin : begin + n]
                assert torch.equal(getattr(part, name), want), name
            begin += n
            assert (state.steps, state.batch) == (begin, 4)
        assert torch.equal(part.logits, whole.logits)
    assert torch.equal(whole.logits, engine(video))


def test_a_stream_of_many_images_and_real_weights():
    """State of images in several groups."""
    model = atsnn.from_pretrained("digits").eval()
    engine = atsnn.freeze(model)
    torch.manual_seed(0)
    video = torch.rand(4, 20, 1, 32, 32)
    state = atsnn.EngineState()
    for t in range(4):
        logits = engine(video[t : t + 1], state=state)
    assert torch.equal(logits, engine(video))


def test_still_images_stream_for_T_timesteps():
    model = exact_model(small("rectangle"))
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 2)
    state = atsnn.EngineState()
    assert torch.equal(engine(images, state=state), engine(images))
    assert state.steps == model.config.T
    assert torch.equal(engine(images, state=state), engine(images.expand(6, *images.shape)))


def test_a_state_is_checked_once_it_is_held():
    """Another call may have begun its stream, with other images, just before."""
    model = exact_model(small("rectangle"))
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 3)
    state = atsnn.EngineState()
    lock = state._in_use

    class Late:
        def acquire(self, blocking):
            state._in_use = lock
            engine(images[:1], state=state)
            return lock.acquire(blocking)

    state._in_use = Late()
    with pytest.raises(InvalidValue, match="as many as those of the state, 1, got 3"):
        engine(images, state=state)


def test_streaming_refusals():
    model = exact_model(small("rectangle"))
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 2)
    state = atsnn.EngineState()
    engine(images, state=state)
    with pytest.raises(InvalidValue, match="as many as those of the state, 2, got 1"):
        engine(images[:1], state=state)
    with pytest.raises(InvalidType, match="state must be an EngineState, got dict"):
        engine(images, state={})
    for other in (atsnn.freeze(model), atsnn.freeze(exact_model(small("depth")))):
        with pytest.raises(InvalidValue, match="got one of another engine's"):
            other(images, state=state)
    for thing, message in ((engine, "freeze on it again"), (state, "make a new one")):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(InvalidType, match=message):
                copied(thing)
    state._in_use.acquire()
    with pytest.raises(InvalidValue, match="in use by another call"):
        engine(images, state=state)
    state._in_use.release()
    engine(images, state=state)
    merging = atsnn.freeze(exact_model(small("merging")))
    with pytest.raises(InvalidValue, match="cannot stream"):
        merging(images, state=atsnn.EngineState())


# -- what it says of itself -----------------------------------------------------------------------


def test_trace_holds_cost_seconds_and_rows():
    model = exact_model(small("halting and merging"))
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 4)
    trace = engine(images, return_trace=True)
    want = atsnn.cost(model, images)
    for name in ("flops", "sops", "bytes", "energy_pj"):
        assert dict(getattr(trace.cost, name)) == pytest.approx(dict(getattr(want, name)))
    assert trace.rows == trace.active.sum((1, 2, 3)).tolist()
    seconds = dict(trace.seconds)
    assert set(seconds) == set(dict(trace.cost.flops)) and all(v >= 0 for v in seconds.values())
    assert all(seconds[part] > 0 for part in ("stem", "attention", "mlp", "halting", "merging"))
    start = time.perf_counter()
    trace = engine(images, return_trace=True)
    assert trace.seconds.total <= time.perf_counter() - start


def test_repr_names_what_it_is():
    text = repr(atsnn.freeze(exact_model(small("rectangle"))))
    assert "Spikformer-3-32" in text and "rectangle" in text and levels()[-1] in text


@pytest.mark.parametrize("accumulator", ["rectangle", "depth"])
def test_given_scores_are_gone_by(accumulator):
    """As `scheduled` does it to the model."""
    config = atsnn.SpikformerConfig(**SMALL, halting=accumulator)
    model = exact_model(config)
    images = exact_images(config, 3)
    depths = synthetic_depths(config.depth, config.T, 3, config.grid**2, 0.6)
    scores = synthetic_scores(depths, config.depth)
    engine = atsnn.freeze(model)
    for execution in ("packed", "masked"):
        got = engine(images, return_trace=True, scores=scores, execution=execution)
        assert_same(got, traced(scheduled(model, scores), images))
        assert torch.equal(got.depth, depths)
    with pytest.raises(InvalidValue, match="scores must have shape"):
        engine(images, scores=scores[1:])
    plain = atsnn.freeze(model.without_halting())
    with pytest.raises(InvalidValue, match="halts by 'rectangle' or 'depth', got halting=None"):
        plain(images, scores=scores)


# -- life -----------------------------------------------------------------------------------------


def test_holds_no_reference_and_copies_what_it_needs():
    model = exact_model(small("rectangle"))
    images = exact_images(model.config, 2)
    engine = atsnn.freeze(model)
    want = engine(images)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    alive = weakref.ref(model)
    del model, p
    gc.collect()
    assert alive() is None
    assert torch.equal(engine(images), want)


def test_two_threads_use_one_engine():
    model = exact_model(small("halting and merging"))
    engine = atsnn.freeze(model)
    batches = [exact_images(model.config, 3 + i, i) for i in range(6)]
    want = [engine(b) for b in batches]
    wrong: list[int] = []

    def work(first):
        for round_ in range(20):
            i = (first + round_) % len(batches)
            if not torch.equal(engine(batches[i]), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_other_threads_run_meanwhile():
    """The interpreter is not held during a call."""
    model = atsnn.from_pretrained("digits").eval()
    engine = atsnn.freeze(model)
    images = torch.rand(400, 1, 32, 32)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    engine(images)
    end = time.perf_counter()
    done.set()
    ticker.join()
    assert sum(start < t < end for t in ticks) > 0.1 * (end - start) / 0.002


INTERRUPTED = """
import signal, sys, time, torch, atsnn
# A process started in the background by a shell would ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
engine = atsnn.freeze(atsnn.from_pretrained("digits").eval())
images = torch.rand(400, 100, 1, 32, 32)
state = atsnn.EngineState()
print("ready", flush=True)
start = time.perf_counter()
try:
    engine(images, state=state)
except KeyboardInterrupt:
    print("stopped after", time.perf_counter() - start, flush=True)
try:
    engine(images, state=state)
except atsnn.AtsnnError as error:
    print(error)
print(engine(images[0, :2]).shape)
"""


def test_ctrl_c_stops_a_long_batch():
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(2)  # of some 20 s; the images are checked first, which is not the engine's call
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=120)
    first, second, third = out.splitlines()
    assert first.startswith("stopped after") and float(first.split()[-1]) < 5
    assert "got one of a call that was stopped half-way" in second
    assert third == "torch.Size([2, 10])"


# -- refusals -------------------------------------------------------------------------------------


def refused(change, error, message):
    model = exact_model(small("rectangle"))
    model = change(model) or model
    with pytest.raises(error, match=message):
        atsnn.freeze(model)


def test_freeze_refuses_what_it_cannot_compute():
    def nan(model):
        model.block[1].mlp.fc1_linear.weight.data[0, 0] = float("nan")

    def statistics(model):
        model.patch_embed.proj_bn.running_var.fill_(float("inf"))

    def replaced(model):
        model.block[0].attn.q_bn = nn.LayerNorm(32)
        model.eval()

    def negative(model):
        model.block[0].attn.q_bn.running_var.fill_(-1.0)

    def hook(model):
        model.block[0].register_forward_hook(lambda *_: None)

    def unlike(model):
        model.block[1].attn.k_lif = ann.LIF(tau=4.0).eval()

    def partly(model):
        model.block[0].mlp.train()

    for change, error, message in (
        (lambda m: m.train(), InvalidValue, "evaluation mode .*the model in training mode"),
        (partly, InvalidValue, "evaluation mode .*got block.0.mlp in training mode"),
        (nan, InvalidValue, "block.1.mlp.fc1_linear.weight must be finite, got 1 NaN"),
        (statistics, InvalidValue, "proj_bn.running_var must be finite"),
        (negative, InvalidValue, "after folding its BatchNorm must be finite"),
        (replaced, InvalidType, "got LayerNorm at block.0.attn.q_bn"),
        (hook, InvalidValue, "no forward hooks.*got one at block.0"),
        (unlike, InvalidValue, "same settings, got others in block 1"),
        (lambda m: m.double(), InvalidType, "must be float32 on the CPU, got torch.float64"),
        (lambda m: nn.Sequential(m), InvalidType, "must be an ATSpikformer, .*got Sequential"),
    ):
        refused(change, error, message)
    random = atsnn.SpikformerConfig(**SMALL, merge_r=1, merge_match="random")
    with pytest.raises(InvalidValue, match="merge_match must be 'similar', got 'random'"):
        atsnn.freeze(atsnn.ATSpikformer(random).eval())
    deep = atsnn.SpikformerConfig(**{**SMALL, "depth": 127, "embed_dim": 8, "num_heads": 1})
    with pytest.raises(InvalidValue, match="depth must be at most 126, got 127"):
        atsnn.freeze(atsnn.ATSpikformer(deep).eval())


def test_the_deepest_residual_stream_fits():
    """126 blocks in which everything fires: 254 spikes in a byte."""
    config = atsnn.SpikformerConfig(
        **{**SMALL, "depth": 126, "embed_dim": 8, "num_heads": 1, "T": 2, "image_size": 4}
    )
    model = atsnn.ATSpikformer(config.replace(bn_eps=2.0**-10)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.fill_(0.0)
                if module.bias is not None:
                    module.bias.fill_(0.0)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_var.fill_(1.0 - 2.0**-10)
                module.bias.fill_(4.0)
        model.head.weight.fill_(1.0)
        for block in model.block:
            block.attn.attn_lif.v_threshold = -1.0
    images = exact_images(config, 2)
    got = atsnn.freeze(model)(images)
    assert torch.equal(got, traced(model, images).logits)
    assert got[0, 0] == 8 * 254


def test_engine_refuses_wrong_images():
    model = exact_model(small("rectangle"))
    engine = atsnn.freeze(model)
    good = exact_images(model.config, 2)
    for images, error, message in (
        ([1.0], InvalidType, "images must be a torch.Tensor, got list"),
        (good[0], InvalidValue, r"\[B, C, H, W\] or \[T, B, C, H, W\]"),
        (good[:, :1], InvalidValue, r"\(C, H, W\) = \(2, 16, 16\), got \(2, 1, 16, 16\)"),
        (good.double(), InvalidType, "float32 on the CPU, got torch.float64"),
        (good.to_sparse(), InvalidType, "images must be a dense tensor, got layout torch.sparse"),
        (good.to("meta"), InvalidType, "float32 on the CPU, got torch.float32 on meta"),
        (good.new_zeros(0, *good.shape), InvalidValue, "T >= 1 timesteps, got T = 0"),
        (good.masked_fill(good > 0.5, float("inf")), InvalidValue, "images must be finite"),
    ):
        with pytest.raises(error, match=message):
            engine(images)
    with pytest.raises(InvalidValue, match="execution must be one of"):
        engine(good, execution="dense")
    with pytest.raises(InvalidValue, match="level must be one of"):
        engine(good, level="avx1024")


def test_images_of_any_strides():
    model = exact_model(small("rectangle"))
    engine = atsnn.freeze(model)
    images = exact_images(model.config, 4)
    want = engine(images)
    for arranged in (
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([images, -images], -1)[..., 0],
        images.clone().requires_grad_(),
    ):
        assert torch.equal(engine(arranged), want)
