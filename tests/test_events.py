"""Operators on bits for layers that were not made for it: the native ones against the reference."""

import pytest
import torch

from atsnn.cases import Numbers
from atsnn.ops import events

OPS = torch.ops.atsnn
LIF = ("lif", 2.0, None, 1.0, 0.0, True)
NEURONS = {
    "lif": LIF,
    "lif soft": ("lif", 3.0, None, 0.75, None, False),
    "if": ("if", 1.0, None, 1.0, -0.25, True),
    "plif": ("plif", 1.0, 0.375, 1.0, 0.0, True),
}
WINDOWS = {
    "3x3": (3, 3, 1, 1, 1, 1),
    "1x1": (1, 1, 1, 1, 0, 0),
    "5x5 stride 2": (5, 5, 2, 2, 2, 2),
    "2x3 uneven": (2, 3, 1, 2, 0, 1),
    "padded beyond": (2, 2, 1, 1, 2, 2),
}


def packed(numbers, outputs, inputs):
    weight = numbers.integers(-8, 8, (outputs, inputs), bits=3).float()
    bias = numbers.integers(-8, 8, (outputs,), bits=3).float()
    return OPS.pack_linear(weight, bias)


def same(got, want):
    for one, other in zip(got, want, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 4, 5), (1, 70, 3, 70), (0, 3, 2), (2, 3, 0)])
def test_maps_are_packed_and_unpacked(shape):
    numbers = Numbers(1)
    x = numbers.spikes(shape).float()
    got = OPS.pack_maps(x)
    same(got, events._pack_maps(x))
    assert got[2] is True and torch.equal(OPS.unpack_maps(got[0], shape[1]), x)
    assert OPS.count_spikes(got[0]) == events._count_spikes(got[0]) == got[1]
    rows = x.movedim(1, -1)
    same(OPS.pack_counted(rows), got)
    for value in (2.0, -1.0, float("nan")):
        if x.numel():
            x.view(-1)[0] = value
            same(OPS.pack_maps(x), events._pack_maps(x))
            assert OPS.pack_maps(x)[2] is False


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("channels, outputs", [(3, 70), (64, 5), (100, 64)])
def test_convolutions(window, channels, outputs):
    numbers = Numbers(2)
    w = packed(numbers, outputs, channels * window[0] * window[1])
    for T, B in ((3, 2), (1, 1), (0, 2), (2, 0)):
        x = numbers.spikes((T, B, channels, 6, 7)).float()
        bits = OPS.pack_maps(x.flatten(0, 1))[0]
        assert torch.equal(
            OPS.spike_conv(bits, *w, outputs, window),
            events._spike_conv(bits, *w, outputs, window),
        )
        for name, neuron in NEURONS.items():
            for pool in (False, True):
                maps = bits.unflatten(0, (T, B))
                v = None
                if name != "lif":
                    state = events._spike_conv_lif(
                        maps, *w, None, outputs, window, pool, 0, *neuron
                    )[1]
                    v = numbers.integers(-4, 4, state.shape, bits=3).float()
                arguments = (*w, v, outputs, window, pool)
                got = OPS.spike_conv_lif(maps, *arguments, 0, *neuron)
                same(got, events._spike_conv_lif(maps, *arguments, 0, *neuron))
                if B:
                    floats = OPS.spike_conv_lif(x, *arguments, 0, *neuron)
                    same(floats, got)
    images = numbers.integers(-4, 4, (1, 2, channels, 6, 7), bits=2).float()
    arguments = (images, *w, None, outputs, window, False, 4, *LIF)
    same(OPS.spike_conv_lif(*arguments), events._spike_conv_lif(*arguments))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("channels, outputs", [(3, 70), (64, 5), (100, 64)])
def test_convolutions_of_counts(window, channels, outputs):
    numbers = Numbers(6)
    w = packed(numbers, outputs, channels * window[0] * window[1])
    x = (
        numbers.spikes((3, 2, channels, 6, 7)) * numbers.integers(1, 3, (3, 2, channels, 6, 7))
    ).float()
    counts = OPS.count_maps(x.flatten(0, 1))
    assert torch.equal(counts, events._count_maps(x.flatten(0, 1)))
    assert torch.equal(
        OPS.spike_conv(counts, *w, outputs, window), events._spike_conv(counts, *w, outputs, window)
    )
    for pool in (False, True):
        arguments = (counts.unflatten(0, (3, 2)), *w, None, outputs, window, pool, 0, *LIF)
        same(OPS.spike_conv_lif(*arguments), events._spike_conv_lif(*arguments))
    for other in (0.5, -1.0, 256.0, float("nan")):
        x[0, 0, 0, 0, 0] = other
        assert OPS.count_maps(x.flatten(0, 1)).numel() == 0
        assert events._count_maps(x.flatten(0, 1)).numel() == 0


@pytest.mark.parametrize("inputs, outputs", [(5, 3), (64, 64), (130, 70)])
def test_linear_maps(inputs, outputs):
    numbers = Numbers(3)
    w = packed(numbers, outputs, inputs)
    for lead in ((2, 3), (5,), (), (0, 4)):
        x = numbers.spikes((*lead, inputs)).float()
        want = events._spike_linear(x, *w, outputs)
        assert torch.equal(OPS.spike_linear(x, *w, outputs), want)
        assert torch.equal(OPS.spike_linear(OPS.pack_counted(x)[0], *w, outputs), want)
        assert torch.equal(
            OPS.spike_linear(x * 3, *w, outputs), events._spike_linear(x * 3, *w, outputs)
        )


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_pooling_of_spikes(window):
    bits = OPS.pack_maps(Numbers(4).spikes((6, 70, 6, 7)).float())[0].unflatten(0, (3, 2))
    same(OPS.pool_spikes(bits, window), events._pool_spikes(bits, window))


@pytest.mark.parametrize("scale", [0.125, None], ids=["ssa", "sdsa"])
@pytest.mark.parametrize("channels, heads", [(64, 2), (48, 3), (130, 1), (384, 12)])
def test_attention(scale, channels, heads):
    numbers = Numbers(5)
    for T, B, N in ((3, 2, 9), (1, 1, 1), (2, 0, 3), (2, 2, 0)):
        x = numbers.spikes((T, B, N, 3 * channels)).float()
        q, k, v = (OPS.pack_counted(part)[0] for part in x.chunk(3, -1))
        for neuron in (LIF[:3] + (0.5, *LIF[4:]), NEURONS["plif"], NEURONS["if"]):
            shape = (B, N, channels) if scale else (B, channels)
            for state in (None, numbers.integers(-4, 4, shape, bits=3).float()):
                arguments = (state, channels, heads, scale, *neuron)
                want = events._attend_lif(q, k, v, *arguments)
                same(OPS.attend_lif(q, k, v, *arguments), want)
                # Side by side in one tensor.
                together = torch.cat((q, k, v), -1).chunk(3, -1)
                same(OPS.attend_lif(*together, *arguments), want)


WEIGHT = OPS.pack_linear(torch.ones(4, 18), None)
BITS = torch.zeros(2, 3, 5, 5, 1, dtype=torch.int64)


@pytest.mark.parametrize("message, call", [
    ("window must be", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 4, [3, 3])),
    ("stride must be", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 4, [3, 3, 0, 1, 1, 1])),
    ("padding must not", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 4, [3, 3, 1, 1, -1, 1])),
    ("multiple of 4 inputs", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 4, [2, 2, 1, 1, 0, 0])),
    ("at most 64 pixels", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 4, [9, 9, 1, 1, 0, 0])),
    ("must fit the padded", lambda: OPS.spike_conv(BITS[0, :, :2], *WEIGHT, 4,
                                                   [3, 3, 1, 1, 0, 0])),
    ("must be zero", lambda: OPS.spike_conv(BITS[0] + 4, *WEIGHT, 4, [3, 3, 1, 1, 1, 1])),
    ("packed weight", lambda: OPS.spike_conv(BITS[0], *WEIGHT, 65, [3, 3, 1, 1, 1, 1])),
    ("4 dimensions", lambda: OPS.spike_conv(BITS, *WEIGHT, 4, [3, 3, 1, 1, 1, 1])),
    ("still must be", lambda: OPS.spike_conv_lif(BITS, *WEIGHT, None, 4, [3, 3, 1, 1, 1, 1], False,
                                                 3, *LIF)),
    ("v must have", lambda: OPS.spike_conv_lif(BITS, *WEIGHT, torch.zeros(3, 5, 4, 4), 4,
                                               [3, 3, 1, 1, 1, 1], False, 0, *LIF)),
    ("last dimension", lambda: OPS.spike_linear(torch.zeros(2, 17), *WEIGHT, 4)),
    ("must be zero", lambda: OPS.spike_linear(torch.full((2, 1), 1 << 20), *WEIGHT, 4)),
    ("for 70 channels", lambda: OPS.unpack_maps(BITS[0], 70)),
    ("must divide", lambda: OPS.attend_lif(*[BITS[0]] * 3, None, 6, 4, 0.125, *LIF)),
    ("k must have", lambda: OPS.attend_lif(BITS[0], BITS[0, :2], BITS[0], None, 4, 2, 0.125, *LIF)),
    ("state must have", lambda: OPS.attend_lif(*[BITS[0]] * 3, torch.zeros(5, 4), 4, 2, 0.125,
                                               *LIF)),
])  # fmt: skip
def test_what_does_not_fit_is_refused(message, call):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
