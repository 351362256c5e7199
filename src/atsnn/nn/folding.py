"""A layer and its BatchNorm as one weight and one bias, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def fold(layer: Layer, bn: Any) -> tuple[Tensor, Tensor]:
    """Weight ``[outputs, inputs]`` and bias of a layer with its BatchNorm, float64.

    ``W' = s W`` and ``b' = s (b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``; without a
    BatchNorm (``None``) those of the layer. The inputs of a convolution are in the order
    ``(ky, kx, channel)``.
    """
    weight = layer.weight.detach().double()
    if weight.dim() > 2:
        weight = weight.movedim(1, -1).flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if bn is None:
        return weight, bias
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    bias = (bias - bn.running_mean.double()) * scale
    if bn.bias is not None:
        bias = bias + bn.bias.detach().double()
    return weight * scale[:, None], bias


class Folded:
    """A layer with its BatchNorm, folded and packed once.

    It is made again after a parameter or a statistic changed; a change through ``.data`` or NumPy
    is seen only after :meth:`forget`.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._packed: F.PackedLinear | None = None
        self._dense: tuple[Tensor, Tensor] | None = None

    def packed(self, layer: Layer, bn: Any) -> F.PackedLinear:
        """The map as :func:`~atsnn.functional.spike_linear_lif` takes it."""
        self._follow(layer, bn)
        if self._packed is None:
            weight, bias = (t.to(torch.float32) for t in fold(layer, bn))
            self._packed = F.pack_linear(weight, bias)
        return self._packed

    def dense(self, layer: Layer, bn: Any) -> tuple[Tensor, Tensor]:
        """Weight in the shape of the layer's, and bias, float32."""
        self._follow(layer, bn)
        if self._dense is None:
            weight, bias = (t.to(torch.float32) for t in fold(layer, bn))
            outputs, inputs, *kernel = layer.weight.shape
            weight = weight.view(outputs, *kernel, inputs).movedim(-1, 1).contiguous()
            self._dense = weight, bias
        return self._dense

    def _follow(self, layer: Layer, bn: Any) -> None:
        tensors = [*layer.parameters(), *(() if bn is None else bn.parameters())]
        tensors += [] if bn is None else list(bn.buffers())
        # Tensors made in inference mode have no version.
        versions = ((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        key = (*versions, None if bn is None else bn.eps)
        if self._key == key:
            return
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidValue(
                "folding: weights must be folded before a CUDA graph is captured, which would "
                "record it instead; expected one call of the model before, got none"
            )
        self.forget()
        self._key = key

    def forget(self) -> None:
        self._key = self._packed = self._dense = None

    def __getstate__(self) -> dict[str, Any]:
        return dict.fromkeys(self.__dict__)  # made again where it is needed
