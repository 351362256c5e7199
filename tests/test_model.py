"""The model: Spikformer exactly with halting off; the rules of halting and merging with it on."""

from __future__ import annotations

import pytest
import torch
from judge import carry_over
from spikingjelly.activation_based.model.spikformer import Spikformer, spikformer_cifar10
from torch import nn

import atsnn
from atsnn import reference
from atsnn.checks import InvalidType, InvalidValue
from atsnn.nn.config import MODELS
from atsnn.testing import exact_images, exact_model

SMALL = dict(image_size=16, in_channels=2, num_classes=5, embed_dim=32, depth=3, num_heads=4, T=3)

VARIANTS = {
    "plain": {},
    "rectangle": dict(halting="rectangle"),
    "depth": dict(halting="depth", score="mean"),
    "sequential": dict(halting="sequential"),
    "linear score": dict(halting="rectangle", score="linear"),
    "last readout": dict(halting="rectangle", readout="last"),
    "merging": dict(merge_r=2),
    "halting and merging": dict(halting="rectangle", merge_r=(3, 1)),
    "merging by threshold": dict(halting="depth", merge_threshold=0.75, merge_sizes=False),
    "spike-driven": dict(attention="sdsa", halting="rectangle", merge_r=1),
    "pool before lif": dict(pool="before_lif", halting="rectangle"),
}


def small(variant: str) -> atsnn.SpikformerConfig:
    return atsnn.SpikformerConfig(**SMALL, **VARIANTS[variant])


def test_halting_off_is_spikingjellys_spikformer_bit_for_bit():
    """On exact weights, whose layers fire: untouched, that model is silent."""
    config = atsnn.SpikformerConfig(pool="before_lif", bias=False)
    ours, theirs = exact_model(config, seed=3), spikformer_cifar10().eval()
    carry_over(ours, theirs)
    images = exact_images(config, 2, seed=4)
    with torch.no_grad():
        trace = ours(images, return_trace=True)
        want = theirs(images)  # a row of logits a timestep
    lifs = {name: rate for name, rate in trace.firing_rates.items() if name.endswith("lif")}
    assert len(lifs) == 5 + 4 * 7 and min(lifs.values()) > 0.03 and max(lifs.values()) < 0.6
    # Each timestep of theirs is exact; ours sums them in float64 and rounds once.
    head = nn.functional.linear(torch.zeros(1, 384), ours.head.weight, ours.head.bias)
    assert torch.equal(trace.logits, ((want - head).double().mean(0) + head.double()).float())
    assert trace.logits.abs().max() > 0.5


@pytest.mark.parametrize("training", [False, True])
def test_halting_off_is_spikingjellys_spikformer_on_real_weights(training):
    """Sums are ordered otherwise, so a potential at the threshold may fall on its other side.

    That changes all that follows it; of eight draws half at most may have such a spike (two had).
    """
    apart = 0
    for seed in range(8):
        ours, theirs = _real_weights(seed)
        ours.train(training), theirs.train(training)
        images = torch.rand(4, 3, 32, 32)
        got, want = ours(images), theirs(images).mean(0)
        if (got - want).abs().max() > 1e-5:
            apart += 1
        elif training:
            got.sum().backward()
            want.sum().backward()
            a, b = ours.patch_embed.proj_conv3, theirs.patch_embed.stages[3].conv_bn.block[0]
            torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-3, atol=1e-4)
            a, b = ours.patch_embed.proj_bn, theirs.patch_embed.stages[0].conv_bn.block[1]
            torch.testing.assert_close(a.running_var, b.running_var)
    assert apart <= 4


def _real_weights(seed: int) -> tuple[atsnn.ATSpikformer, Spikformer]:
    torch.manual_seed(seed)
    config = atsnn.SpikformerConfig(
        pool="before_lif", bias=False, embed_dim=64, num_heads=4, depth=2, image_size=32
    )
    ours = exact_model(config, seed=1)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.02 * p.abs().mean())
    theirs = Spikformer(
        img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=64, num_heads=4,
        depths=2,
    )  # fmt: skip
    carry_over(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("pool", ["after_lif", "before_lif"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_stem_is_its_definition(stem, pool):
    """Spikformer's stem layer by layer, with nothing of ours but the reference neuron."""
    config = atsnn.SpikformerConfig(**SMALL | dict(image_size=32), stem=stem, pool=pool)
    model = exact_model(config)
    s = model.patch_embed
    images = exact_images(config, 2, T=config.T)

    def lif(x):
        return reference.neuron(x, None, None, "lif", 2.0, 1.0, 0.0, True, True, "sigmoid", 4.0)[0]

    def stage(x, conv, bn, pooled):
        x = torch.stack([bn(conv(frame)) for frame in x])
        halve = nn.MaxPool2d(3, 2, 1)
        if pooled and pool == "before_lif":
            x = torch.stack([halve(frame) for frame in x])
        x = lif(x)
        return torch.stack([halve(frame) for frame in x]) if pooled and pool == "after_lif" else x

    with torch.no_grad():
        x = stage(images, s.proj_conv, s.proj_bn, stem == "imagenet")
        x = stage(x, s.proj_conv1, s.proj_bn1, stem == "imagenet")
        x = stage(x, s.proj_conv2, s.proj_bn2, True)
        x = stage(x, s.proj_conv3, s.proj_bn3, True)
        x = x + stage(x, s.rpe_conv, s.rpe_bn, False)
        got = model.embed(images)
    assert torch.equal(got, x.flatten(3).transpose(2, 3))
    assert got.shape[2] == config.grid**2 and got.max() > 0


def test_a_still_image_is_the_image_repeated():
    model = exact_model(small("rectangle"))
    images = exact_images(model.config, 3)
    with torch.no_grad():
        assert torch.equal(model(images), model(images.expand(3, *images.shape)))
    model.train()
    other = exact_model(small("rectangle")).train()
    torch.testing.assert_close(model(images), other(images.repeat(3, 1, 1, 1, 1)))
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


def test_merged_tokens_weigh_by_their_size_in_attention_and_ponder():
    model = exact_model(small("merging"))
    sizes = []
    for block in model.block:
        block.forward_with_keys = lambda x, c, f=block.forward_with_keys: (
            sizes.append(c.sizes) or f(x, c)
        )
    with torch.no_grad():
        trace = model(exact_images(model.config, 2), return_trace=True)
    assert trace.sizes.max() > 1
    assert torch.equal(torch.stack(sizes), trace.block_sizes)
    assert float(trace.ponder_loss) == model.config.depth + 1, "nothing halts: D + 1 for everyone"


@pytest.mark.parametrize("variant", VARIANTS)
def test_trace_is_consistent(variant):
    model = exact_model(small(variant))
    c = model.config
    images = exact_images(c, 4, seed=9)
    with torch.no_grad():
        trace = model(images, return_trace=True)
        assert torch.equal(trace.logits, model(images))
    L, T, B, N = trace.active.shape
    assert (L, T, B, N) == (3, 3, 4, 16)
    a = trace.active
    assert not (a[1:] & ~a[:-1]).any() and not (a[:, 1:] & ~a[:, :-1]).any()
    assert (trace.scores[~a] == 0).all()
    assert trace.sizes.sum(1).tolist() == [16.0] * 4
    assert (trace.sizes.scatter_add(1, trace.source, torch.ones(4, 16)) > 0).any()
    # Weighted by size, the weights of an image sum to the original tokens of each timestep.
    total = (trace.weights * trace.block_sizes.unsqueeze(1)).sum((0, 3))
    expected = (trace.depth > 0).sum(2).float()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    if not c.merging:
        assert torch.equal(trace.weights.sum(0), (trace.depth > 0).float())
        assert torch.equal(trace.depth, a.sum(0))
    if c.halting is not None:
        assert len(trace.depth.unique()) > 1, "halting must be spread, or the test shows nothing"
    else:
        assert (trace.depth == L).all()
    if c.merging:
        assert trace.sizes.max() > 1
        held = a.gather(3, trace.source.expand(a.shape))
        assert torch.equal(held[-1].sum(0), trace.active[-1].sum(0).gather(1, trace.source))


@pytest.mark.parametrize("accumulator", reference.ACCUMULATORS)
def test_scores_give_the_activity_that_accumulate_gives(accumulator):
    model = exact_model(atsnn.SpikformerConfig(**SMALL, halting=accumulator))
    with torch.no_grad():
        trace = model(exact_images(model.config, 4), return_trace=True)
    state = reference.accumulate(trace.scores, accumulator, model.config.eps)
    assert torch.equal(state.active, trace.active)
    assert torch.equal(state.weights, trace.weights)
    assert torch.equal(state.depth, trace.depth)
    loss = reference.ponder_loss(state.depth, state.remainder)
    torch.testing.assert_close(trace.ponder_loss, loss)


def test_logits_are_the_weighted_readout():
    """From the tokens after each block, taken by hooks, by the formula of docs/method.md."""
    model = exact_model(small("halting and merging"))
    model.execution = "masked"  # so that the tokens after each block are dense
    after = []
    for block in model.block:
        block.forward_with_keys = lambda x, c, f=block.forward_with_keys: (
            after.append(f(x, c)) or after[-1]
        )
    with torch.no_grad():
        trace = model(exact_images(model.config, 4), return_trace=True)
        total = torch.zeros(4, 32, dtype=torch.float64)
        for block, (x, _) in enumerate(after):
            w = trace.weights[block].double() * trace.block_sizes[block].double()
            total += (w.unsqueeze(-1) * x.double()).sum((0, 2))
        features = (total / (3 * 16)).float().double()
        head = model.head
        want = features @ head.weight.double().T + head.bias.double()
        assert torch.equal(want.float(), trace.logits)


@pytest.mark.parametrize("accumulator", ["rectangle", "depth", "sequential"])
@pytest.mark.parametrize("how", ["mean-field", "last"])
def test_scores_of_zero_give_the_plain_spikformer(accumulator, how):
    model = exact_model(atsnn.SpikformerConfig(**SMALL, halting=accumulator, readout=how))
    images = exact_images(model.config, 3)
    with torch.no_grad():
        model.halting.beta.fill_(-60.0)
        plain = model.without_halting()
        assert plain.halting is None and model.halting is not None
        assert torch.equal(model(images), plain(images))
        names = [n for n in model.state_dict() if not n.startswith("halting")]
        assert list(plain.state_dict()) == names


def test_halted_tokens_keep_their_rows_and_take_no_part():
    """Block by block: inactive cells pass unchanged, active ones do not see them."""
    config = small("rectangle")
    model = exact_model(config)
    model.execution = "masked"
    seen = []
    for block in model.block:
        block.forward_with_keys = lambda x, c, f=block.forward_with_keys: (
            seen.append((x, c, f(x, c))) or seen[-1][2]
        )
    with torch.no_grad():
        model(exact_images(config, 2))
        for x, context, (y, keys) in seen[1:]:
            mask = context.layout.mask
            assert 0 < int(mask.sum()) < mask.numel()
            assert torch.equal(y[~mask], x[~mask]) and (keys[~mask] == 0).all()
            # Whatever stands in the inactive rows, the active ones come out the same.
            block = model.block[0]
            noise = torch.where(mask.unsqueeze(-1), x, torch.randint(0, 9, x.shape).float())
            a = type(block).forward_with_keys(block, noise, context)[0]
            b = type(block).forward_with_keys(block, x, context)[0]
            assert torch.equal(a[mask], b[mask])


def test_an_image_does_not_depend_on_the_others():
    for variant in VARIANTS:
        model = exact_model(small(variant))
        images = exact_images(model.config, 4)
        with torch.no_grad():
            together = model(images)
            alone = torch.cat([model(images[i : i + 1]) for i in range(4)])
        assert torch.equal(together, alone), variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_training_step_reaches_every_parameter(variant):
    torch.manual_seed(0)
    model = exact_model(small(variant)).train()
    trace = model(torch.rand(6, 2, 16, 16), return_trace=True)
    (trace.logits.square().sum() + trace.ponder_loss).backward()
    for name, p in model.named_parameters():
        if name == "halting.alpha" and model.config.score == "constant":
            continue
        if model.config.readout == "last" and name.startswith("halting") and p.grad is None:
            continue
        assert p.grad is not None and p.grad.isfinite().all(), name
    if model.halting is not None and model.config.readout == "mean-field":
        assert model.halting.beta.grad != 0


def test_batch_norm_sees_active_rows_only_in_layout_order():
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(5).train()
    twin = nn.BatchNorm1d(5).train()
    x = torch.randn(3, 4, 6, 5)
    layout = atsnn.TokenLayout.from_active_steps(torch.randint(0, 4, (4, 6)), 3)
    got = reference.masked_batch_norm(bn, x, layout)
    rows = torch.stack([x.flatten(0, 2)[i] for i in layout.index.tolist()])
    assert torch.equal(got[layout.mask], layout.unpack(twin(rows))[layout.mask])
    assert torch.equal(bn.running_var, twin.running_var)

    few = atsnn.TokenLayout.from_active_steps(torch.tensor([[1, 0, 0, 0, 0, 0]] * 4), 3)
    before = bn.running_mean.clone()
    got = reference.masked_batch_norm(bn, x, few)
    want = (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt()
    torch.testing.assert_close(got, want)
    assert torch.equal(bn.running_mean, before), "few rows leave the running statistics alone"


def test_a_block_without_active_cells_is_skipped():
    model = exact_model(atsnn.SpikformerConfig(**SMALL, halting="rectangle")).train()
    with torch.no_grad():
        model.halting.beta.fill_(20.0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    trace = model(torch.rand(4, 2, 16, 16), return_trace=True)
    assert (trace.depth == 1).all() and not trace.active[1:].any()
    for name, buffer in model.named_buffers():
        skipped = name.startswith(("block.1", "block.2"))
        assert torch.equal(buffer, before[name]) == (skipped or not buffer.is_floating_point()) or (
            "num_batches" in name and not skipped
        )


def test_empty_batch():
    for variant in VARIANTS:
        model = exact_model(small(variant))
        with torch.no_grad():
            assert model(torch.zeros(0, 2, 16, 16)).shape == (0, 5)


def test_float64_and_bfloat16_models_run():
    for dtype in (torch.float64, torch.bfloat16):
        model = exact_model(small("rectangle")).to(dtype)
        out = model(exact_images(model.config, 2).to(dtype))
        assert out.dtype == dtype and out.isfinite().all()


BAD_IMAGES = [
    (
        lambda: torch.zeros(1, 3, 16, 16),
        InvalidValue,
        r"\(C, H, W\) = \(2, 16, 16\), got \(1, 3, 16",
    ),
    (lambda: torch.zeros(1, 2, 17, 16), InvalidValue, "images must have shape"),
    (lambda: torch.zeros(2, 16, 16), InvalidValue, "images must have shape"),
    (lambda: torch.zeros(0, 1, 2, 16, 16), InvalidValue, "T >= 1 timesteps, got T = 0"),
    (lambda: torch.zeros(1, 2, 16, 16).double(), InvalidType, "torch.float32, got torch.float64"),
    (lambda: torch.zeros(1, 2, 16, 16, dtype=torch.uint8), InvalidType, "got torch.uint8"),
    (lambda: [[0.0]], InvalidType, "images must be a torch.Tensor, got list"),
    (lambda: torch.full((1, 2, 16, 16), float("nan")), InvalidValue, "got 512 NaN or infinite"),
    (lambda: torch.zeros(1, 2, 16, 16, device="meta"), InvalidValue, "parameters, cpu, got meta"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_bad_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        exact_model(small("plain"))(images())


BAD_CONFIGS = [
    (dict(image_size=18), "image_size must be a multiple of 4 for stem='cifar', got 18"),
    (dict(image_size=40, stem="imagenet"), "image_size must be a multiple of 16"),
    (dict(embed_dim=100), "embed_dim must be a multiple of"),
    (dict(num_heads=5), "embed_dim must be a multiple of num_heads 5, got 384"),
    (dict(T=0), "T must be a number >= 1 and <= 1048576, got 0"),
    (dict(depth=0), "depth must be a number >= 1 and <= 1000, got 0"),
    (dict(halting="both"), "halting must be one of None, 'rectangle'"),
    (dict(eps=0.0), "eps must be a number > 0 and < 1"),
    (dict(merge_r=(1, 2)), "merge_r must name depth - 1 = 3 block boundaries, got 2"),
    (dict(merge_r=1, merge_threshold=0.5), "at most one of merge_r and merge_threshold"),
    (dict(halting="sequential", merge_r=1), "cannot merge tokens"),
    (dict(mlp_ratio=0.001), "must have a hidden channel, got embed_dim"),
    (dict(bn_eps=0.0), "bn_eps must be a number > 0, got 0.0"),
    (dict(stem=["cifar"]), "stem must be one of 'cifar', 'imagenet'"),
    (dict(tau=1), "tau must be a number > 1, got 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(InvalidValue, match=message):
        atsnn.SpikformerConfig(**changes)


def test_configurations_round_trip_and_refuse_unknown_names():
    config = small("halting and merging")
    assert atsnn.SpikformerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InvalidValue, match="got depht"):
        atsnn.SpikformerConfig.from_dict({"depht": 3})
    with pytest.raises(InvalidType, match="expected a mapping"):
        atsnn.SpikformerConfig.from_dict([1])


def test_named_models():
    # 9.32 M and 16.81 M: Spikformer's paper, table 1 (4-384, CIFAR) and table 3 (8-384, ImageNet).
    for name, millions in (("spikformer_4_384", 9.32), ("spikformer_8_384", 16.81)):
        with torch.device("meta"):
            model = atsnn.ATSpikformer(MODELS[name])
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    model = atsnn.create_model("spikformer_2_384", num_classes=3, halting="depth")
    assert model.config.num_classes == 3 and model.halting.accumulator == "depth"
    with pytest.raises(InvalidValue, match="name must be one of 'spikformer_2_384'"):
        atsnn.create_model("spikformer_9")
    with pytest.raises(InvalidValue, match="got heads"):
        atsnn.create_model("spikformer_2_384", heads=3)


def test_modules_keep_their_state_like_spikingjellys():
    from spikingjelly.activation_based import neuron

    x = torch.randn(4, 3, 5)
    pairs = [
        (atsnn.nn.LIF(tau=3.0, v_reset=None), neuron.LIFNode(tau=3.0, v_reset=None, step_mode="m")),
        (atsnn.nn.IF(), neuron.IFNode(step_mode="m")),
        (atsnn.nn.PLIF(init_tau=1.7), neuron.ParametricLIFNode(init_tau=1.7, step_mode="m")),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x), theirs(x))
        ours.reset()
        theirs.reset()
        assert torch.equal(ours(x), theirs(x))
        ours.reset()
        ours.step_mode = "s"
        single = torch.stack([ours(step) for step in x])
        theirs.reset()
        assert torch.equal(single, theirs(x))
