"""SpikingJelly's modules, computed by kernels; loaded where SpikingJelly is.

Each class here stands for one of SpikingJelly's, which it derives from: a module becomes one by a
change of its class. Where a call is not one the kernels know, the method of the original runs.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from spikingjelly.activation_based.model import spike_driven_transformer as sdt
from spikingjelly.activation_based.model import spikformer
from torch import Tensor, nn

from .. import functional as F
from ..reference import SURROGATE_CLASSES
from .chain import Chain
from .conditions import at_rest, events_serve
from .layers import Looks, Plans
from .neurons import is_number, known_settings, may_be_fused, membrane
from .sequence import (
    BATCH_NORMS,
    CONTAINERS,
    FOLDING,
    IDLE,
    LAYERS,
    POOLS,
    Item,
    children,
    items,
    kept_chains,
    open_sequential,
)
from .spikes import OPS, Spikes, dense

SURROGATES = {getattr(surrogate, theirs): ours for ours, theirs in SURROGATE_CLASSES.items()}

# One timestep of fewer neurons costs the original less than a call that keeps a graph does.
LEAST_STEP = 1 << 15

# -- neurons --------------------------------------------------------------------------------------


def common_settings(node: neuron.BaseNode) -> dict[str, Any] | str:
    """Keywords of :func:`atsnn.functional.neuron`, or why it cannot compute the neuron."""
    derivative = node.surrogate_function
    name = SURROGATES.get(type(derivative))
    if name is None:
        return f"its surrogate function is a {type(derivative).__name__}"
    if not derivative.spiking:
        return "its surrogate function does not spike"
    if not (is_number(derivative.alpha) and derivative.alpha > 0):
        return f"its surrogate's alpha is {derivative.alpha!r}"
    if node._neuron_precision is not None:
        return f"it has a precision of its own, {node._neuron_precision}"
    if not is_number(node.v_threshold):
        return f"its v_threshold is {node.v_threshold!r}"
    if node.v_reset is not None and not is_number(node.v_reset):
        return f"its v_reset is {node.v_reset!r}"
    return {
        "v_threshold": node.v_threshold, "v_reset": node.v_reset,
        "detach_reset": bool(node.detach_reset), "surrogate": name, "alpha": derivative.alpha,
    }  # fmt: skip


class Computed:
    """The transitions of a neuron by :func:`atsnn.functional.neuron`, on float32 or float64."""

    how = "training and inference: atsnn's neuron"
    step_mode: str

    def kernel_settings(self) -> dict[str, Any] | str:
        """Keywords of :func:`atsnn.functional.neuron`, or why it cannot compute the neuron."""
        raise NotImplementedError

    def multi_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        x, v = inputs[0], states[0]
        settings = self._now(inputs, v)
        if settings is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc]
        spikes, v = F.neuron(x, v, **settings)
        return (spikes,), (v, *states[1:])

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        x, v = inputs[0], states[0]
        small = torch.is_grad_enabled() and isinstance(x, Tensor) and x.numel() < LEAST_STEP
        settings = None if small else self._now(inputs, v)
        if settings is None:
            return super().single_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc]
        spikes, v = F.neuron(x.unsqueeze(0), v, **settings)
        return (spikes.squeeze(0),), (v, *states[1:])

    def _now(self, inputs: Any, v: Any) -> dict[str, Any] | None:
        x = inputs[0]
        if (
            len(inputs) != 1
            or not isinstance(x, Tensor)
            or not isinstance(v, Tensor)
            or x.device.type != "cpu"
            or x.dtype not in (torch.float32, torch.float64)
            or v.dtype != x.dtype
        ):
            return None
        settings = self.kernel_settings()
        return None if isinstance(settings, str) else settings


class EventLIFNode(Computed, neuron.LIFNode):
    """``LIFNode`` by :func:`atsnn.functional.neuron`."""

    replaces = neuron.LIFNode

    def kernel_settings(self) -> dict[str, Any] | str:
        found = common_settings(self)
        if isinstance(found, str):
            return found
        if not (is_number(self.tau) and self.tau > 1):
            return f"its tau is {self.tau!r}"
        return {"kind": "lif", "tau": self.tau, "decay_input": bool(self.decay_input), **found}


class EventIFNode(Computed, neuron.IFNode):
    """``IFNode`` by :func:`atsnn.functional.neuron`."""

    replaces = neuron.IFNode

    def kernel_settings(self) -> dict[str, Any] | str:
        found = common_settings(self)
        return found if isinstance(found, str) else {"kind": "if", **found}


class EventParametricLIFNode(Computed, neuron.ParametricLIFNode):
    """``ParametricLIFNode`` by :func:`atsnn.functional.neuron`."""

    replaces = neuron.ParametricLIFNode

    def kernel_settings(self) -> dict[str, Any] | str:
        found = common_settings(self)
        if isinstance(found, str):
            return found
        if self.w.dim() != 0:
            return f"its w has shape {tuple(self.w.shape)}"
        inv_tau = self.w.sigmoid()
        return {
            "kind": "plif", "inv_tau": inv_tau, "decay_input": bool(self.decay_input), **found
        }  # fmt: skip


# -- layers ---------------------------------------------------------------------------------------


class EventLayer(Looks):
    """A layer with a step mode: all timesteps are images to it."""

    step_mode: str

    def seen(self, x: Any) -> Tensor | None:
        if self.step_mode != "m" or isinstance(self, nn.Linear):
            return super().seen(x)
        if not isinstance(x, Tensor) or x.dim() < 3:
            return None
        y = super().seen(x.flatten(0, 1))
        return None if y is None else y.unflatten(0, x.shape[:2])


class EventJellyLinear(EventLayer, layer.Linear):
    """``layer.Linear`` that adds the weights of what fired where its input is spikes."""

    replaces = layer.Linear


class EventJellyConv1d(EventLayer, layer.Conv1d):
    """``layer.Conv1d`` of one tap that does."""

    replaces = layer.Conv1d


class EventJellyConv2d(EventLayer, layer.Conv2d):
    """``layer.Conv2d`` that does."""

    replaces = layer.Conv2d


class EventSeqToANNContainer(Plans, layer.SeqToANNContainer):
    """``SeqToANNContainer`` that folds its BatchNorms and looks for spikes."""

    replaces = layer.SeqToANNContainer


def open_folding(module: nn.Module, folded: bool) -> Any:
    for child in children(module):
        yield from items(child, True)


# -- Spikformer -----------------------------------------------------------------------------------


class EventConv2dBNLIF(Plans, spikformer.SpikformerConv2dBNLIF):
    """A convolution of Spikformer's stem, its BatchNorm, pooling and neurons as one kernel."""

    replaces = spikformer.SpikformerConv2dBNLIF


def open_conv(module: Any, folded: bool) -> Any:
    yield from items(module.conv_bn)
    yield Item(module.neuron, False)


def open_block(module: Any, folded: bool) -> Any:
    yield from items(module.block)


class EventMLP(Plans, spikformer.SpikformerMLP):
    """Spikformer's MLP: two chains, with bits between them."""

    replaces = spikformer.SpikformerMLP


CONTAINERS |= {
    layer.SeqToANNContainer: open_folding,
    EventSeqToANNContainer: open_folding,
    EventConv2dBNLIF: open_conv,
    spikformer.SpikformerConv2dBN: open_block,
    EventMLP: open_sequential,
}
FOLDING |= {EventSeqToANNContainer}
LAYERS |= {
    layer.Linear: nn.Linear, EventJellyLinear: nn.Linear,
    layer.Conv1d: nn.Conv1d, EventJellyConv1d: nn.Conv1d,
    layer.Conv2d: nn.Conv2d, EventJellyConv2d: nn.Conv2d,
}  # fmt: skip
BATCH_NORMS |= {layer.BatchNorm1d: nn.BatchNorm1d, layer.BatchNorm2d: nn.BatchNorm2d}
POOLS |= {layer.MaxPool2d}
IDLE |= {layer.Dropout, layer.Dropout2d}


# -- attention ------------------------------------------------------------------------------------


def fires(node: Any) -> bool:
    return isinstance(node, Computed) and node.step_mode == "m" and may_be_fused(node)


class EventSpikingSelfAttention(layer.SpikingSelfAttention):
    """Spiking self-attention on bits: projections, attention and neurons."""

    replaces = layer.SpikingSelfAttention
    how = "inference: projections and attention on bits"

    def forward(self, x_seq: Tensor) -> Tensor:
        y = self._on_bits(x_seq)
        return super().forward(x_seq) if y is None else y

    def _on_bits(self, x: Tensor) -> Tensor | None:
        if not events_serve(x) or x.dim() != 4 or self.dim % 64 or not fires(self.attn_lif):
            return None
        chains = kept_chains(
            self,
            (*pair(self.qkv_conv_bn), self.qkv_lif),
            (*pair(self.proj_conv_bn), self.proj_lif),
        )
        if not chains:
            return None
        qkv, proj = chains
        inside = (self.qkv_conv_bn, self.proj_conv_bn, self.attn_lif)
        if not (at_rest(inside) and qkv.ready(x) and proj.ready(x)):
            return None
        rows = qkv(x)
        if not isinstance(rows, Spikes):
            rows = packed_maps(rows)
        q, k, v = rows.bits.chunk(3, -1)
        B, N = q.shape[1:3]
        d = self.dim // self.num_heads
        # The neurons behind the attention see heads, channels, tokens.
        state = membrane(self.attn_lif, (B, self.num_heads, d, N))
        bits, left, count = OPS.attend_lif(
            q, k, v, None if state is None else state.flatten(1, 2).movedim(1, -1), self.dim,
            self.num_heads, self.scale, *known_settings(self.attn_lif),
        )  # fmt: skip
        self.attn_lif.v = left.movedim(-1, 1).unflatten(1, (self.num_heads, d))
        return dense(proj(Spikes(bits, self.dim, count)))


def pair(container: Any) -> tuple[Any, Any]:
    """The layer and the BatchNorm in a container of them."""
    return tuple(container) if len(container) == 2 else (None, None)


def packed_maps(x: Tensor) -> Spikes:
    bits, count, _ = OPS.pack_maps(x.flatten(0, 1))
    return Spikes(bits.unflatten(0, x.shape[:2]), x.shape[2], count)


class EventSpikeDrivenSelfAttention(layer.SpikeDrivenSelfAttention):
    """Spike-driven self-attention on bits."""

    replaces = layer.SpikeDrivenSelfAttention
    how = "inference: projections and attention on bits"

    def forward(self, x: Tensor) -> Tensor:
        y = self._on_bits(x)
        return super().forward(x) if y is None else y

    def _on_bits(self, x: Tensor) -> Tensor | None:
        if not events_serve(x) or x.dim() != 5 or not fires(self.attn_lif):
            return None
        chains = kept_chains(
            self,
            (self.q_conv, self.q_bn, self.q_lif),
            (self.k_conv, self.k_bn, self.k_lif),
            (self.v_conv, self.v_bn, self.v_lif),
            (self.proj_conv, self.proj_bn, None),
        )
        if not chains:
            return None
        q, k, v, proj = chains
        if not at_rest((self.shortcut_lif, self.attn_lif)):
            return None
        if not all(chain.ready(x) for chain in (q, k, v, proj)):
            return None
        _, B, C, H, W = x.shape
        s = packed_maps(self.shortcut_lif(x))
        rows = []
        for chain in (q, k, v):
            y = chain(s)
            maps = y if isinstance(y, Spikes) else packed_maps(y)
            rows.append(maps.bits.flatten(2, 3))
        state = membrane(self.attn_lif, (B, self.num_heads, 1, C // self.num_heads))
        bits, left, count = OPS.attend_lif(
            *rows, None if state is None else state.flatten(1), C, self.num_heads, None,
            *known_settings(self.attn_lif),
        )  # fmt: skip
        self.attn_lif.v = left.view(B, self.num_heads, 1, -1)
        return dense(proj(Spikes(bits.unflatten(2, (H, W)), C, count))) + x


# -- Spike-driven Transformer ---------------------------------------------------------------------


class EventDrivenMLP(sdt._MLP):
    """The MLP of Spike-driven Transformer: neurons before each layer, a residual after it."""

    replaces = sdt._MLP
    how = "inference: two kernels, bits between them"

    def forward(self, x: Tensor) -> Tensor:
        chains: tuple[Chain, ...] = ()
        if events_serve(x) and at_rest((self.lif1, self.lif2)):
            between = None if self.residual else self.lif2
            chains = kept_chains(self, (self.fc1, self.bn1, between), (self.fc2, self.bn2, None))
        if not chains or not chains[0].ready(x):
            return super().forward(x)
        first, second = chains
        middle = first(self.lif1(x))
        if self.residual:
            x = dense(middle) + x
            middle = self.lif2(x)
        if not second.ready(middle):
            return self.bn2(self.fc2(dense(middle))) + x
        return dense(second(middle)) + x


class EventPatchEmbed(sdt._PatchEmbed):
    """The stem of Spike-driven Transformer, whose position is a convolution of spikes."""

    replaces = sdt._PatchEmbed
    how = "inference: the position on bits"

    def forward(self, x: Tensor) -> Tensor:
        chains: tuple[Chain, ...] = ()
        if events_serve(x):
            chains = kept_chains(self, (self.rpe_conv, self.rpe_bn, None))
        if not chains:
            return super().forward(x)
        (position,) = chains
        for stage in self.stages:
            x = stage(x)
        x = self.final_stage(x)
        spikes = self.final_lif(x)
        if not position.ready(spikes):
            return self.rpe_bn(self.rpe_conv(spikes)) + x
        return dense(position(spikes)) + x


# What a person expects to be computed, if only some of it is.
EXPECTED = (neuron.BaseNode, neuron.SimpleBaseNode, layer.QKAttention)
SWAPS: tuple[type, ...] = (
    EventLIFNode, EventIFNode, EventParametricLIFNode, EventJellyLinear, EventJellyConv1d,
    EventJellyConv2d, EventSeqToANNContainer, EventConv2dBNLIF, EventMLP,
    EventSpikingSelfAttention, EventSpikeDrivenSelfAttention, EventDrivenMLP, EventPatchEmbed,
)  # fmt: skip
