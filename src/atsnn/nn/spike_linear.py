"""Linear, BatchNorm and neuron as one layer, event-driven in inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import InvalidType, InvalidValue, check_integer, check_tensor, shape_of
from ..ops import kernels_serve
from .folding import Folded
from .neurons import IF, LIF, PLIF, Neuron


class SpikeLinear(nn.Module):
    """``Linear -> BatchNorm -> neuron``; in inference only the weights of what fired are added.

    Where no gradient is needed, in evaluation mode, on float32 tensors that there are kernels for,
    the three run as one kernel (:func:`atsnn.functional.spike_linear_lif`) on weights that are
    folded and packed once; otherwise as the three modules they are. So call it under
    ``torch.no_grad()``: where a parameter requires a gradient the modules run, which on a CPU is
    some ten times slower. A change of a parameter or statistic is seen, but one through ``.data``
    or NumPy only after ``train()`` or ``eval()``. Inputs must be finite, which is not checked.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        Whether the linear layer has a bias.
    norm : bool
        Whether there is a BatchNorm.
    neuron : Neuron, optional
        LIF, IF or PLIF with ``step_mode="m"``; default ``LIF()``. Its membrane is kept from call
        to call until ``reset()``, as that of a neuron module is: call it between batches.

    Attributes
    ----------
    linear, bn, neuron
        The three modules; :meth:`of` makes a layer of existing ones.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        norm: bool = True,
        neuron: Neuron | None = None,
    ) -> None:
        super().__init__()
        check_integer("SpikeLinear", "in_features", in_features, at_least=1)
        check_integer("SpikeLinear", "out_features", out_features, at_least=1)
        self._set(
            nn.Linear(in_features, out_features, bias=bias),
            nn.BatchNorm1d(out_features) if norm else None,
            LIF() if neuron is None else neuron,
        )

    @classmethod
    def of(cls, linear: nn.Linear, bn: nn.BatchNorm1d | None, neuron: Neuron) -> SpikeLinear:
        """A layer made of these modules, which it shares."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(linear, bn, neuron)
        return layer

    def _set(self, linear: nn.Linear, bn: nn.BatchNorm1d | None, neuron: Neuron) -> None:
        op = "SpikeLinear"
        for name, module, kinds in (
            ("linear", linear, (nn.Linear,)), ("bn", bn, (nn.BatchNorm1d, type(None))),
            ("neuron", neuron, (LIF, IF, PLIF)),
        ):  # fmt: skip
            if not isinstance(module, kinds):
                names = ", ".join("None" if k is type(None) else k.__name__ for k in kinds)
                raise InvalidType(f"{op}: {name} must be of {names}, got {type(module).__name__}")
        if bn is not None and bn.num_features != linear.out_features:
            raise InvalidValue(
                f"{op}: bn must have the {linear.out_features} features of linear, "
                f"got {bn.num_features}"
            )
        if neuron.step_mode != "m":
            raise InvalidValue(f"{op}: neuron must have step_mode='m', got {neuron.step_mode!r}")
        self.linear, self.bn, self.neuron = linear, bn, neuron
        self._folded = Folded()

    def forward(self, x: Tensor) -> Tensor:
        """Spikes ``[T, ..., in_features]`` to spikes ``[T, ..., out_features]``."""
        op = "SpikeLinear"
        check_tensor(op, "x", x)
        if x.dim() < 2 or x.shape[-1] != self.linear.in_features:
            raise InvalidValue(
                f"{op}: x must have shape (T, ..., {self.linear.in_features}), got {shape_of(x)}"
            )
        if not self._event_driven(x):
            y = self.linear(x)
            if self.bn is not None:
                y = self.bn(y.flatten(0, -2)).view(y.shape)
            return self.neuron(y)
        v, wanted = self.neuron.v, (*x.shape[1:-1], self.linear.out_features)
        if v is not None and tuple(v.shape) != wanted:
            raise InvalidValue(
                f"{op}: x must fit the membrane kept from the last call, of shape "
                f"{shape_of(v)}, or reset() be called before; got x of shape {shape_of(x)}"
            )
        weights = self._folded.packed(self.linear, self.bn)
        spikes, self.neuron.v = self.neuron.run_linear(x, weights, v)
        return spikes

    def reset(self) -> None:
        """Forget the membrane; the next call starts at rest."""
        self.neuron.reset()

    def train(self, mode: bool = True) -> SpikeLinear:
        """Set the mode; the packed weights are made again."""
        self._folded.forget()
        return super().train(mode)

    def _event_driven(self, x: Tensor) -> bool:
        weight = self.linear.weight
        needs_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        return (
            not self.training and not needs_gradient and not torch.compiler.is_compiling()
            and x.device == weight.device and kernels_serve(x.device)
            and x.dtype == weight.dtype == torch.float32
            and (self.bn is None or (self.bn.running_mean is not None and not self.bn.training))
        )  # fmt: skip
