"""A linear map or convolution, what normalises it, and the neurons behind it, as one kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..checks import InvalidValue
from ..functional.linear import MOST_INPUTS, MOST_TIMESTEPS, PackedLinear
from ..nn.folding import Folded
from ..ops.events import HALVING, MOST_TAPS, Window
from .conditions import at_rest
from .neurons import Settings, known_settings, may_be_fused, membrane, run
from .spikes import OPS, Spikes

# Where more of the inputs are not zero, dense arithmetic is as fast: for convolutions, for inputs
# that are not spikes, and for linear layers of fewer rows than the second number. With more rows
# spikes are faster to add at any rate. (Measured on AVX-512; see docs/results/README.md.)
MOST_EVENTS, MANY_ROWS = 0.35, 16
# A layer whose input was too dense looks again after so many calls.
PATIENCE = 16
POINT: Window = (1, 1, 1, 1, 0, 0)
# Of convolutions with so few inputs a pixel's products cost less than looking for zeros.
FEW_INPUTS = 64


def window_of(conv: nn.Conv2d) -> Window:
    return (*conv.kernel_size, *conv.stride, *conv.padding)


def refusal(layer: nn.Module) -> str | None:
    """Why no event-driven kernel computes a Linear, Conv1d or Conv2d; ``None`` if one does."""
    if isinstance(layer, nn.Linear):
        return None if layer.in_features <= MOST_INPUTS else f"more than {MOST_INPUTS} inputs"
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return f"a {type(layer).__name__}"
    if layer.groups != 1:
        return f"{layer.groups} groups"
    if any(d != 1 for d in layer.dilation):
        return f"dilation {layer.dilation}"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"padding {layer.padding!r}, mode {layer.padding_mode!r}"
    taps = 1
    for size in layer.kernel_size:
        taps *= size
    if isinstance(layer, nn.Conv1d) and not pointwise(layer):
        return f"a Conv1d of {taps} taps, stride {layer.stride[0]}, padding {layer.padding[0]}"
    if taps > MOST_TAPS:
        return f"a kernel of {taps} > {MOST_TAPS} pixels"
    if taps * layer.in_channels > MOST_INPUTS:
        return f"more than {MOST_INPUTS} inputs"
    return None


def pointwise(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a convolution looks at its own pixel alone, and at all of them."""
    return all(
        (size, stride, pad) == (1, 1, 0)
        for size, stride, pad in zip(layer.kernel_size, layer.stride, layer.padding, strict=True)
    )


def shown_again(x: Tensor) -> bool:
    """Whether all timesteps of ``x`` are the first one again, as those of a still image are."""
    return len(x) > 1 and (x.stride(0) == 0 or all(torch.equal(x[0], later) for later in x[1:]))


class Chain:
    """A layer, its BatchNorm, a halving max-pooling and neurons; all but the layer may be missing.

    It computes what the modules would, and leaves the neurons' membrane where they keep it. What
    is too dense for events runs as the folded dense layer, and neurons.
    """

    def __init__(
        self,
        layer: Any,
        bn: nn.Module | None = None,
        pool: nn.Module | None = None,
        neuron: nn.Module | None = None,
    ) -> None:
        self.layer, self.bn, self.pool, self.neuron = layer, bn, pool, neuron
        self.modules = tuple(m for m in (layer, bn, pool, neuron) if m is not None)
        self._folded = Folded()
        self._rest = 0  # calls to let pass without a look

    def ready(self, x: Tensor | Spikes) -> bool:
        """Whether the chain can be computed as one, on such an input, as its modules are now."""
        if not at_rest(self.modules):
            return False
        if self.neuron is not None and not may_be_fused(self.neuron):
            return False
        if self.bn is not None and self.bn.running_mean is None:
            return False
        if not self._fits(x):
            return False
        tensors = (self.layer.weight, self.layer.bias, getattr(self.bn, "running_mean", None))
        if any(t is not None and (t.dtype, t.device.type) != (torch.float32, "cpu")
               for t in tensors):  # fmt: skip
            return False
        return self._packed() is not None

    def _fits(self, x: Tensor | Spikes) -> bool:
        """Whether the input has the layer's channels; of others the modules shall speak."""
        shape = x.bits.shape if isinstance(x, Spikes) else x.shape
        if 0 in shape or not shape or shape[0] > MOST_TIMESTEPS:
            return False
        if isinstance(self.layer, nn.Linear):
            return len(shape) >= 2 and shape[-1] == self.layer.in_features
        if len(shape) != (4 if isinstance(self.layer, nn.Conv1d) else 5):
            return False
        channels = x.channels if isinstance(x, Spikes) else shape[2]
        return channels == self.layer.in_channels

    def __call__(self, x: Tensor | Spikes) -> Tensor | Spikes:
        """``x [T, ...]`` to spikes, or without neurons to sums."""
        packed = self._weights()
        if self._few_inputs(x):
            return self._convolve(x, packed)
        events = self._events(x)
        if events is None:
            return self._dense(x)
        if self.neuron is None:
            return self._sum(events, packed)
        if isinstance(self.layer, nn.Linear):
            return self._fire(events, packed)
        if pointwise(self.layer) and events.dtype == torch.int64:
            return self._fire_maps(events, packed)
        return self._convolve(events, packed)

    def sums(self, x: Tensor | Spikes) -> Tensor | None:
        """The same without neurons; ``None`` where dense arithmetic is faster."""
        events = self._events(x)
        return None if events is None else self._sum(events, self._weights())

    # -- what fires --------------------------------------------------------------------------------

    def _few_inputs(self, x: Tensor | Spikes) -> bool:
        few = self.layer.weight[0].numel() <= FEW_INPUTS
        return (
            few
            and isinstance(self.layer, nn.Conv2d)
            and isinstance(x, Tensor)
            and bool(self.neuron)
        )

    def _events(self, x: Tensor | Spikes) -> Tensor | None:
        """Inputs with the channels last: bits, or where they are not all 0 or 1 what they are.

        That is the floats of a linear layer, and counts as bytes of maps. ``None`` where too many
        are not 0, or maps hold anything but counts.
        """
        if isinstance(x, Spikes):
            return None if self._too_many(x.count, x.numel, True) else x.bits
        if self.rests():
            return None
        maps = not isinstance(self.layer, nn.Linear)
        bits, nonzero, binary = OPS.pack_maps(x.flatten(0, 1)) if maps else OPS.pack_counted(x)
        if self._too_many(nonzero, x.numel(), binary):
            self._rest = PATIENCE
            return None
        if not maps:
            return bits if binary else x
        events = bits if binary else OPS.count_maps(x.flatten(0, 1))
        return events.unflatten(0, x.shape[:2]) if events.numel() else None

    def rests(self) -> bool:
        """Whether the input was too dense a few calls ago, so that it is not worth a look."""
        self._rest = max(self._rest - 1, 0)
        return self._rest > 0

    def _too_many(self, nonzero: int, inputs: int, binary: bool) -> bool:
        """Whether dense arithmetic is faster for so many of the inputs."""
        layer = self.layer
        if binary and (isinstance(layer, nn.Linear) or pointwise(layer)):
            width = layer.weight.shape[1]
            if inputs >= MANY_ROWS * width:
                return False
        return nonzero > MOST_EVENTS * inputs

    # -- kernels -----------------------------------------------------------------------------------

    def _sum(self, events: Tensor, packed: PackedLinear) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return OPS.spike_linear(events, packed.weight, packed.bias, packed.outputs)
        maps = self._planes(events).flatten(0, 1)
        y = OPS.spike_conv(maps, packed.weight, packed.bias, packed.outputs, self._window())
        y = y.squeeze(2) if isinstance(self.layer, nn.Conv1d) else y
        return y.unflatten(0, events.shape[:2])

    def _planes(self, maps: Tensor) -> Tensor:
        """Maps ``[T, B, height, width, ...]``: tokens of a Conv1d are of height 1."""
        return maps.unsqueeze(2) if isinstance(self.layer, nn.Conv1d) else maps

    def _window(self) -> Window:
        return POINT if isinstance(self.layer, nn.Conv1d) else window_of(self.layer)

    def _fire(self, rows: Tensor, packed: PackedLinear) -> Tensor:
        """Spikes of rows of channels: of bits bits, of floats floats."""
        v = membrane(self.neuron, (*rows.shape[1:-1], packed.outputs))
        s, state = self._step(rows, packed, v)
        self._keep(state)
        return s if rows.dtype == torch.float32 else OPS.unpack_spikes(s, packed.outputs)

    def _step(self, rows: Tensor, packed: PackedLinear, v: Tensor | None) -> tuple[Tensor, Tensor]:
        return OPS.spike_linear_lif(
            rows, packed.weight, packed.bias, v, None, None, packed.outputs, *self._settings(), True
        )

    def _fire_maps(self, bits: Tensor, packed: PackedLinear) -> Spikes:
        """The same for maps, whose neurons keep their membrane with channels first."""
        v = membrane(self.neuron, (bits.shape[1], packed.outputs, *bits.shape[2:-1]))
        s, state = self._step(bits, packed, None if v is None else v.movedim(1, -1))
        self._keep(state.movedim(-1, 1))
        return Spikes(s, packed.outputs, OPS.count_spikes(s))

    def _convolve(self, maps: Any, packed: PackedLinear) -> Spikes:
        """Of bits or counts with the channels last, or of float maps of a Conv2d."""
        floats = maps.dtype == torch.float32
        T, B = maps.shape[:2]
        still = floats and shown_again(maps)
        if still:
            maps = maps[:1]
        height, width = self._sizes((maps if floats else self._planes(maps)[..., 0]).shape[-2:])
        flat = isinstance(self.layer, nn.Conv1d)
        shape = (packed.outputs, width) if flat else (packed.outputs, height, width)
        v = membrane(self.neuron, (B, *shape))
        if v is not None:
            v = v.reshape(B, packed.outputs, height, width).movedim(1, -1)
        bits, state, count = OPS.spike_conv_lif(
            maps if floats else self._planes(maps), packed.weight, packed.bias, v, packed.outputs,
            self._window(), self.pool is not None, T if still else 0, *self._settings(),
        )  # fmt: skip
        self._keep(state.movedim(-1, 1).reshape(B, *shape))
        return Spikes(bits.squeeze(2) if flat else bits, packed.outputs, count)

    def _sizes(self, sizes: Any) -> list[int]:
        """Height and width of what the neurons get."""
        for w in [self._window(), *[HALVING] * (self.pool is not None)]:
            sizes = [(size + 2 * w[4 + i] - w[i]) // w[2 + i] + 1 for i, size in enumerate(sizes)]
        return sizes

    def _dense(self, x: Tensor | Spikes) -> Tensor:
        analog = isinstance(x, Tensor)
        x = x if isinstance(x, Tensor) else x.dense()
        weight, bias = self._folded.dense(self.layer, self.bn)
        T = len(x)
        still = analog and shown_again(x)
        if still:
            x = x[:1]
        if isinstance(self.layer, nn.Linear):
            y = nnf.linear(x, weight, bias)
        else:
            convolve: Any = nnf.conv1d if isinstance(self.layer, nn.Conv1d) else nnf.conv2d
            y = convolve(x.flatten(0, 1), weight, bias, self.layer.stride, self.layer.padding)
            if self.pool is not None:
                y = nnf.max_pool2d(y, HALVING[:2], HALVING[2:4], HALVING[4:])
            y = y.unflatten(0, x.shape[:2])
        if still:
            y = y.expand(T, *y.shape[1:])
        return y if self.neuron is None else run(self.neuron, y)

    # -- what the kernels are given ----------------------------------------------------------------

    def _keep(self, v: Tensor) -> None:
        neuron: Any = self.neuron
        neuron.v = v

    def _settings(self) -> Settings:
        return known_settings(self.neuron)

    def _packed(self) -> PackedLinear | None:
        try:
            return self._folded.packed(self.layer, self.bn)
        except InvalidValue:  # a weight that is not finite
            return None

    def _weights(self) -> PackedLinear:
        packed = self._packed()
        assert packed is not None  # ready() asked
        return packed
