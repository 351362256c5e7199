"""Linear maps of spikes with their neurons, as operators. Inference only: they have no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout
from .backends import resolve_backend
from .library import composite, fake, layout_of, parts
from .neuron import neuron_reference

WORD = 64  # bits of a word of spikes, outputs of a panel of weights


def _words(channels: int) -> int:
    return -(-channels // WORD)


@composite("pack_spikes")
def _pack_spikes(x):
    C = x.shape[-1]
    bits = torch.nn.functional.pad((x != 0).to(torch.int64), (0, _words(C) * WORD - C))
    return (bits.unflatten(-1, (_words(C), WORD)) << torch.arange(WORD, device=x.device)).sum(-1)


@composite("unpack_spikes")
def _unpack_spikes(bits, channels):
    spikes = (bits.unsqueeze(-1) >> torch.arange(WORD, device=bits.device)) & 1
    return spikes.flatten(-2)[..., :channels].to(torch.float32)


@composite("pack_linear")
def _pack_linear(weight, bias):
    outputs = weight.shape[0]
    missing = _words(outputs) * WORD - outputs
    bias = weight.new_zeros(outputs) if bias is None else bias
    padded = torch.nn.functional.pad(weight, (0, 0, 0, missing)).unflatten(0, (-1, WORD))
    biases = torch.nn.functional.pad(bias, (0, missing)).view(-1, WORD)
    return padded.transpose(1, 2).contiguous(), biases.clone()


@composite("spike_linear_lif")
def _spike_linear_lif(
    spikes, weight, bias, v, token, offsets, outputs, kind, tau, inv_tau, v_threshold, v_reset,
    decay_input, keep,
):  # fmt: skip
    as_bits = spikes.dtype == torch.int64
    x = _unpack_spikes(spikes, weight.shape[1]) if as_bits else spikes
    plain = weight.transpose(1, 2).flatten(0, 1)[:outputs]
    y = torch.nn.functional.linear(x, plain, bias.flatten()[:outputs])
    factor = None if inv_tau is None else x.new_tensor(inv_tau)
    settings = (kind, tau, v_threshold, v_reset, decay_input, True, "sigmoid", 4.0)
    s, state = neuron_reference(y, v, factor, layout_of(token, offsets), settings)
    state = state.clone() if state is v else state
    return (_pack_spikes(s) if as_bits else s), (state if keep else state.new_empty(0))


@fake("pack_spikes")
def _pack_spikes_fake(x):
    return x.new_empty((*x.shape[:-1], _words(x.shape[-1])), dtype=torch.int64)


@fake("unpack_spikes")
def _unpack_spikes_fake(bits, channels):
    return bits.new_empty((*bits.shape[:-1], channels), dtype=torch.float32)


@fake("pack_linear")
def _pack_linear_fake(weight, bias):
    panels = _words(weight.shape[0])
    return weight.new_empty((panels, weight.shape[1], WORD)), weight.new_empty((panels, WORD))


@fake("spike_linear_lif")
def _spike_linear_lif_fake(spikes, weight, bias, v, token, offsets, outputs, *settings):
    last = _words(outputs) if spikes.dtype == torch.int64 else outputs
    lead = spikes.shape[1:-1] if token is None else token.shape
    state = (*lead, outputs) if settings[-1] else 0
    return spikes.new_empty((*spikes.shape[:-1], last)), weight.new_empty(state)


def pack_spikes(backend: str, x: Tensor) -> Tensor:
    operators = resolve_backend("pack_spikes", backend, x.device)
    if operators is None:
        return _pack_spikes(x)
    return operators.pack_spikes(x)


def unpack_spikes(backend: str, bits: Tensor, channels: int) -> Tensor:
    operators = resolve_backend("unpack_spikes", backend, bits.device)
    if operators is None:
        return _unpack_spikes(bits, channels)
    return operators.unpack_spikes(bits, channels)


def pack_linear(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.ops.atsnn.pack_linear(weight, bias)


def spike_linear_lif(
    backend: str,
    layout: TokenLayout | None,
    spikes: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    outputs: int,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """The operator by the chosen backend; settings as in the schema, from ``kind`` on."""
    arguments = (spikes, weight, bias, v, *parts(layout), outputs, *settings)
    operators = resolve_backend("spike_linear_lif", backend, spikes.device)
    if operators is None:
        return _spike_linear_lif(*arguments)
    return operators.spike_linear_lif(*arguments)
