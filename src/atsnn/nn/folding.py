"""A layer and its BatchNorm as one weight and one bias, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue


def fold(layer: nn.Linear | nn.Conv2d, bn: Any) -> tuple[Tensor, Tensor]:
    """Weight ``[outputs, inputs]`` and bias of a layer with its BatchNorm, float64.

    ``W' = s W`` and ``b' = s (b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``; without a
    BatchNorm (``None``) those of the layer. The inputs of a convolution are in the order
    ``(ky, kx, channel)``.
    """
    weight = layer.weight.detach().double()
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
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
    """A linear layer with its BatchNorm, folded and packed once.

    It is made again after a parameter or a statistic changed; a change through ``.data`` or NumPy
    is seen only after :meth:`forget`.
    """

    def __init__(self) -> None:
        self._packed: tuple[tuple[Any, ...], F.PackedLinear] | None = None

    def packed(self, linear: nn.Linear, bn: nn.BatchNorm1d | None) -> F.PackedLinear:
        tensors = [*linear.parameters(), *(() if bn is None else bn.parameters())]
        tensors += [] if bn is None else list(bn.buffers())
        # Tensors made in inference mode have no version.
        versions = ((t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        key = (*versions, None if bn is None else bn.eps)
        if self._packed is None or self._packed[0] != key:
            if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
                raise InvalidValue(
                    "folding: weights must be folded before a CUDA graph is captured, which would "
                    "record it instead; expected one call of the model before, got none"
                )
            weight, bias = (t.to(torch.float32) for t in fold(linear, bn))
            self._packed = key, F.pack_linear(weight, bias)
        return self._packed[1]

    def forget(self) -> None:
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # made again where it is needed
