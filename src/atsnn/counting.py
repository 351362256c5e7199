"""Other people's counters on atsnn's operators, so that they count what :func:`atsnn.cost` does.

``torch.utils.flop_counter`` and SpikingJelly's ``op_counter`` watch the operators that PyTorch
dispatches. Those of atsnn they do not know; :func:`flop_rules`, :func:`synop_rules`,
:func:`mac_rules` and :func:`ac_rules` tell them. What is counted are products: linear layers,
convolutions and attention, by one convention for all of them:

- A product whose operand holds nothing but spikes (0 and 1) is ``multiply-accumulates * rate``
  synaptic operations, with that operand's mean as the rate. Where both do, the one that fired less
  drives it, whichever side it stands on.
- The same for counts (0, 1, 2, ...), where no operand is of spikes: an integer k is k spikes, as
  the residual stream of a Spikformer has them.
- Any other product is multiply-accumulates.

Half the FLOPs times the firing rate is the measure of Spikformer's paper. SpikingJelly's own rules
differ from it in three places: counts are dense to them, of a product of spikes with spikes they
count the pairs that meet, and of a convolution not the taps that fall on the padding (which FLOPs
include).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cost import ATTENTION_DRIVERS, attention_macs
from .ops.library import LIBRARIES

__all__ = ["Decomposing", "ac_rules", "flop_rules", "mac_rules", "synop_rules"]

Rule = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates, and the operands that may be spikes; ``channels`` of them if bits."""

    macs: int
    operands: tuple[Tensor, ...]
    channels: int | None = None

    def rate(self) -> Fraction | None:
        """Spikes a value of the operand that drives the product; ``None``: it is not spikes."""
        operands = [_values(x, self.channels) for x in self.operands]
        for kind in (_are_spikes, _are_counts):
            rates = [_mean(x) for x in operands if kind(x)]
            if rates:
                return min(rates)
        return None

    @property
    def synops(self) -> Fraction:
        return self.macs * (self.rate() or Fraction(0)) if self.macs else Fraction(0)

    @property
    def dense_macs(self) -> int:
        return self.macs if self.macs and self.rate() is None else 0


def _values(x: Tensor, channels: int | None) -> Tensor:
    bits = channels is not None and x.dtype == torch.int64
    return torch.ops.atsnn.unpack_spikes(x, channels) if bits else x


def _are_spikes(x: Tensor) -> bool:
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())


def _are_counts(x: Tensor) -> bool:
    if x.is_complex():
        return False
    whole = x.frac() == 0 if x.is_floating_point() else x == x
    return bool((whole & (x >= 0)).all())


def _mean(x: Tensor) -> Fraction:
    return Fraction(int(x.sum(dtype=torch.float64)), max(x.numel(), 1))


# -- the products of each operator ----------------------------------------------------------------

Arguments = dict[str, Any]


def _runs(a: Arguments, rows: Tensor) -> list[int]:
    """Tokens of each timestep and image; ``rows`` are dense, ``[T, B, N, C]``, without offsets."""
    if a["offsets"] is None:
        T, B, N, _ = rows.shape
        return [N] * (T * B)
    return a["offsets"].diff().tolist()


def _existing(a: Arguments, rows: Tensor) -> Tensor:
    """Rows without those past the end of the offsets, which mean nothing."""
    offsets = a.get("offsets")
    return rows if offsets is None else rows[: int(offsets[-1])]


def _attention(a: Arguments) -> list[Product]:
    return _attention_products(a, _runs(a, a["q"]), a["q"].shape[-1])


def _attention_products(
    a: Arguments, tokens: Sequence[int], C: int, channels: int | None = None
) -> list[Product]:
    macs = attention_macs(tokens, a["num_heads"], C // a["num_heads"])
    return [
        Product(macs[order], tuple(_existing(a, a[name]) for name in drivers), channels)
        for order, both in ATTENTION_DRIVERS.items()
        for drivers in both
    ]


def _driven_attention(a: Arguments) -> list[Product]:
    k, v = (_existing(a, a[name]) for name in "kv")
    return [Product(k.numel(), (k, v))]


def _attention_of_bits(a: Arguments) -> list[Product]:
    T, B, N, _ = a["q"].shape
    C = a["channels"]
    if a["scale"] is None:
        return [Product(T * B * N * C, (a["k"], a["v"]), C)]
    return _attention_products(a, [N] * (T * B), C, C)


def _linear(a: Arguments) -> list[Product]:
    x, inputs = _existing(a, a["spikes"]), a["weight"].shape[1]
    rows = x[..., 0].numel()
    return [Product(rows * inputs * a["outputs"], (x,), inputs)]


def _convolution(a: Arguments) -> list[Product]:
    """Of bits or counts ``[..., H, W, C]``, or of floats ``[..., C, H, W]``."""
    maps, window, inputs = a["maps"], a["window"], a["weight"].shape[1]
    sides = maps.shape[-2:] if maps.dtype == torch.float32 else maps.shape[-3:-1]
    places = [
        (side + 2 * padding - kernel) // stride + 1
        for side, kernel, stride, padding in zip(
            sides, window[:2], window[2:4], window[4:], strict=True
        )
    ]
    macs = prod(maps.shape[:-3]) * prod(places) * inputs * a["outputs"]
    return [Product(macs, (maps,), inputs // (window[0] * window[1]))]


FORWARD: dict[str, Callable[[Arguments], list[Product]]] = {
    "spiking_attention": _attention,
    "spike_driven_attention": _driven_attention,
    "spike_linear_lif": _linear,
    "spike_linear": _linear,
    "spike_conv": _convolution,
    "spike_conv_lif": _convolution,
    "attend_lif": _attention_of_bits,
}
# Each product has two gradients, each as large; what a kernel computes again is not counted.
BACKWARD = {"spiking_attention_backward", "spike_driven_attention_backward"}


def _operators(name: str) -> Iterator[Any]:
    for namespace in LIBRARIES:
        found = getattr(getattr(torch.ops, namespace), name, None)
        if found is not None:
            yield found


def _bound(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    names = [argument.name for argument in operator.default._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _products(operator: Any, find: Callable[[Arguments], list[Product]]) -> Any:
    def products(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
        return find(_bound(operator, args, kwargs))

    return products


# -- PyTorch's own operators ----------------------------------------------------------------------

# Where the first of both operands stands. ``linear``, ``matmul`` and ``conv*d`` arrive as
# themselves in inference mode alone: elsewhere autograd takes them apart first.
MATRICES = {
    "mm": 0, "bmm": 0, "mv": 0, "dot": 0, "linear": 0, "matmul": 0,
    "addmm": 1, "baddbmm": 1, "addmv": 1,
}  # fmt: skip
CONVOLUTIONS = ("convolution", "conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def _matrix(first: int) -> Any:
    def products(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[Product]:
        x, y = args[first : first + 2]
        return [Product(out.numel() * x.shape[-1], (x, y))]

    return products


def _window(transposed: bool) -> Any:
    def products(args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[Product]:
        x, weight = args[:2]
        # Only ``convolution`` has the argument.
        swapped = transposed or (len(args) > 8 and bool(args[6]))
        places = (x if swapped else out).numel()
        return [Product(places * weight[0].numel(), (x, weight))]

    return products


def _plain() -> Iterator[tuple[Any, Any]]:
    """PyTorch's operators, each overload, with their products."""
    aten = torch.ops.aten
    rules = {name: _matrix(first) for name, first in MATRICES.items()}
    rules |= dict.fromkeys(CONVOLUTIONS, _window(False))
    rules |= dict.fromkeys(TRANSPOSED, _window(True))
    for name, products in rules.items():
        packet = getattr(aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                yield getattr(packet, overload), products


# -- rules ----------------------------------------------------------------------------------------


def flop_rules() -> dict[Any, Any]:
    """FLOPs of atsnn's operators, as ``FlopCounterMode(custom_mapping=...)`` takes them.

    With them PyTorch's counter gives what :func:`atsnn.cost` says of stem, attention, MLP and head,
    exactly; what halting and merging add are elementwise operations and comparisons inside
    operators, which only :func:`atsnn.cost` counts. A backward pass counts twice its forward.

    Examples
    --------
    >>> import torch, atsnn
    >>> from atsnn.counting import flop_rules
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> model = atsnn.create_model("spikformer_2_384", T=1).eval()
    >>> x = torch.rand(1, 3, 32, 32)
    >>> with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_rules()) as found:
    ...     _ = model(x)
    >>> found.get_total_flops() == atsnn.cost(model, x).flops.total
    True
    """
    rules = {}
    for name, find in FORWARD.items():
        for operator in _operators(name):
            rules[operator] = _flop_rule(operator, find, 2)
    for name in BACKWARD:
        for operator in _operators(name):
            rules[operator] = _flop_rule(operator, FORWARD[name.removesuffix("_backward")], 4)
    return rules


def _flop_rule(operator: Any, find: Callable[[Arguments], list[Product]], factor: int) -> Any:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return factor * sum(product.macs for product in find(_bound(operator, args, kwargs)))

    # PyTorch gives shapes to a formula without this mark; offsets are values.
    flops._get_raw = True  # type: ignore[attr-defined]
    return flops


def synop_rules() -> dict[Any, Rule]:
    """Synaptic operations, for ``SynOpCounter(extra_rules=...)`` of SpikingJelly.

    They cover atsnn's operators and replace the counter's own rules for PyTorch's, so that counts
    of the residual stream are k spikes each; see the module for the convention. Then the counter
    gives ``atsnn.cost(model, x).sops.total``.

    An input counts as spikes by its values alone, so images of integers (frames of events, or
    pixels 0 .. 255) make synaptic operations of the first convolution; :func:`atsnn.cost` always
    takes it for multiply-accumulates.

    Examples
    --------
    >>> import torch
    >>> from atsnn.counting import synop_rules
    >>> from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
    >>> counter = SynOpCounter(extra_rules=synop_rules())
    >>> with torch.no_grad(), DispatchCounterMode([counter]):
    ...     _ = torch.nn.Linear(3, 5)(torch.tensor([[0.0, 2.0, 1.0]]))
    >>> counter.get_total()
    15
    """
    return _rules(lambda products: round(sum(product.synops for product in products)))


def mac_rules() -> dict[Any, Rule]:
    """Multiply-accumulates, for ``MACCounter(extra_rules=...)``: products without spikes.

    A linear layer on counts has none, where SpikingJelly's own rule takes it for dense. The
    counter's rule for BatchNorm stays as it is.

    Examples
    --------
    >>> import torch
    >>> from atsnn.counting import mac_rules
    >>> from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter
    >>> counter = MACCounter(extra_rules=mac_rules())
    >>> with torch.no_grad(), DispatchCounterMode([counter]):
    ...     _ = torch.nn.Linear(3, 5)(torch.tensor([[0.0, 2.0, 1.0]]))
    ...     _ = torch.nn.Linear(3, 5)(torch.tensor([[0.5, 2.0, 1.0]]))
    >>> counter.get_total()
    15
    """
    return _rules(lambda products: sum(product.dense_macs for product in products))


def ac_rules() -> dict[Any, Rule]:
    """Accumulates of products, for ``ACCounter(extra_rules=...)``: those of :func:`synop_rules`.

    What else that counter counts, additions and BatchNorm, it goes on counting where PyTorch's
    operators do it; the additions inside atsnn's neurons it does not see.

    Examples
    --------
    >>> import torch
    >>> from atsnn.counting import ac_rules
    >>> from spikingjelly.activation_based.op_counter import ACCounter, DispatchCounterMode
    >>> counter = ACCounter(extra_rules=ac_rules())
    >>> with torch.no_grad(), DispatchCounterMode([counter]):
    ...     _ = torch.nn.Linear(3, 5)(torch.tensor([[0.0, 2.0, 1.0]]))
    >>> counter.get_total()
    15
    """
    return synop_rules()


def _rules(count: Callable[[list[Product]], int]) -> dict[Any, Rule]:
    found = dict(_plain())
    for name, find in FORWARD.items():
        for operator in _operators(name):
            found[operator.default] = _products(operator, find)

    def rule(products: Any) -> Rule:
        return lambda args, kwargs, out: count(products(args, kwargs, out))

    return {operator: rule(products) for operator, products in found.items()}


class Decomposing(TorchDispatchMode):
    """Takes composite operations apart, so that a counter around it counts in inference mode too.

    Under ``torch.inference_mode()`` no autograd kernel runs, and it is those that take composite
    operations apart: ``linear``, ``conv2d``, ``batch_norm`` or ``einsum`` reach a counter whole,
    and SpikingJelly's has rules for their parts alone, so it silently counts nothing. The rules of
    this module know ``linear``, ``conv*d`` and ``matmul``; for all else enter this mode inside the
    counter's. Outside inference mode it changes nothing.

    Examples
    --------
    >>> import torch
    >>> from atsnn.counting import Decomposing
    >>> from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter
    >>> norm, counter = torch.nn.BatchNorm1d(4).eval(), MACCounter()
    >>> with torch.inference_mode(), DispatchCounterMode([counter]), Decomposing():
    ...     _ = norm(torch.rand(3, 4))
    >>> counter.get_total()
    12
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_composite(func):
            return func(*args, **kwargs)
        with self:  # the parts may be composite themselves
            # Not func.decompose(): that prefers kernels made for tracing, which have other parts.
            return func._op_dk(COMPOSITE, *args, **kwargs)


COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def _is_composite(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE)
    )
