"""Convolutions and linear maps of bits, for layers that were not made for it; see ``EVENTS``.

Inference on the CPU: they have no gradient and no Triton kernel. Bits are channels-last,
``[T, B, H, W, words]``, float maps as PyTorch's. ``window`` is ``(kernel_y, kernel_x, stride_y,
stride_x, pad_y, pad_x)``; the inputs of a packed convolution are in the order (ky, kx, channel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf

from .. import reference
from .library import composite
from .linear import WORD, _pack_spikes, _unpack_spikes
from .neuron import neuron_reference

Window = tuple[int, int, int, int, int, int]
HALVING: Window = (3, 3, 2, 2, 1, 1)
MOST_TAPS = 64  # pixels of a kernel


def _counted(x, bits):
    return bits, int((x != 0).sum()), bool(((x == 0) | (x == 1)).all())


@composite("pack_counted")
def _pack_counted(x):
    return _counted(x, _pack_spikes(x))


@composite("pack_maps")
def _pack_maps(x):
    return _counted(x, _pack_spikes(x.movedim(1, -1)))


@composite("unpack_maps")
def _unpack_maps(bits, channels):
    return _unpack_spikes(bits, channels).movedim(-1, 1).contiguous()


@composite("count_spikes")
def _count_spikes(bits):
    return int(_unpack_spikes(bits, bits.shape[-1] * WORD).sum())


@composite("count_maps")
def _count_maps(x):
    counts = x.to(torch.uint8)
    if not bool((counts == x).all()):
        return counts.new_empty(0)
    return counts.movedim(1, -1).contiguous()


def _plain(weight, bias, outputs):
    """Weight ``[outputs, inputs]`` and bias of a packed map."""
    return weight.transpose(1, 2).flatten(0, 1)[:outputs], bias.flatten()[:outputs]


@composite("spike_linear")
def _spike_linear(spikes, weight, bias, outputs):
    x = _unpack_spikes(spikes, weight.shape[1]) if spikes.dtype == torch.int64 else spikes
    return nnf.linear(x, *_plain(weight, bias, outputs))


def _conv(x, weight, bias, outputs, window):
    kernel, stride, padding = window[:2], window[2:4], window[4:]
    weight, bias = _plain(weight, bias, outputs)
    weight = weight.view(outputs, *kernel, -1).permute(0, 3, 1, 2)
    return nnf.conv2d(x, weight, bias, stride, padding)


def _channels(weight, window):
    return weight.shape[1] // (window[0] * window[1])


def _floats(maps, channels):
    """Maps ``[M, C, ...]`` of bits or of counts, whose channels come last."""
    return (
        _unpack_maps(maps, channels) if maps.dtype == torch.int64 else maps.movedim(-1, 1).float()
    )


@composite("spike_conv")
def _spike_conv(maps, weight, bias, outputs, window):
    x = _floats(maps, _channels(weight, window))
    return _conv(x, weight, bias, outputs, window)


@composite("spike_conv_lif")
def _spike_conv_lif(
    maps, weight, bias, v, outputs, window, pool, still, kind, tau, inv_tau, v_threshold, v_reset,
    decay_input,
):  # fmt: skip
    x = maps.flatten(0, 1)
    if maps.dtype != torch.float32:
        x = _floats(x, _channels(weight, window))
    y = _conv(x, weight, bias, outputs, window)
    if pool:
        y = nnf.max_pool2d(y, HALVING[:2], HALVING[2:4], HALVING[4:])
    y = y.movedim(1, -1).unflatten(0, maps.shape[:2])
    if still:
        y = y.expand(still, *y.shape[1:])
    factor = None if inv_tau is None else y.new_tensor(inv_tau)
    settings = (kind, tau, v_threshold, v_reset, decay_input, True, "sigmoid", 4.0)
    s, state = neuron_reference(y, v, factor, None, settings)
    return _pack_spikes(s), state.clone(), int(s.sum())


@composite("pool_spikes")
def _pool_spikes(bits, window):
    *lead, height, width, words = bits.shape
    x = _unpack_maps(bits.reshape(-1, height, width, words), words * WORD)
    x = nnf.max_pool2d(_padded(x, window), window[:2], window[2:4])
    return _pack_spikes(x.movedim(1, -1)).unflatten(0, lead), int(x.sum())


def _padded(x, window):
    """With zeros around it: of a padding beyond half the kernel PyTorch's pooling knows nothing."""
    return nnf.pad(x, (window[5], window[5], window[4], window[4]))


@composite("attend_lif")
def _attend_lif(
    q, k, v, state, channels, num_heads, scale, kind, tau, inv_tau, v_threshold, v_reset,
    decay_input,
):  # fmt: skip
    q, k, v = (_unpack_spikes(x, channels) for x in (q, k, v))
    settings = (kind, tau, v_threshold, v_reset, decay_input, True, "sigmoid", 4.0)
    factor = None if inv_tau is None else q.new_tensor(inv_tau)
    if scale is None:
        gate, state = neuron_reference((k * v).sum(-2), state, factor, None, settings)
        s = q * gate.unsqueeze(-2)
    else:
        attended = reference.spiking_attention(q, k, v, num_heads, scale)
        s, state = neuron_reference(attended, state, factor, None, settings)
    return _pack_spikes(s), state.clone(), int(s.sum())
