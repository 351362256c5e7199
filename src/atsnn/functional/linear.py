"""Linear maps of spikes with their neurons, for inference: work only where a spike fired."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checks import (
    InvalidValue,
    check_device,
    check_dtype,
    check_finite,
    check_integer,
    check_shape,
    check_tensor,
    shape_of,
)
from ..layout import TokenLayout
from .neuron import check_neuron, check_state

WORD = 64
MOST_INPUTS = 2**16 - 1  # the twin of most_inputs in csrc/engine/linear.h
MOST_TIMESTEPS = 4096


@dataclass(frozen=True)
class PackedLinear:
    """Weights of a linear map, as :func:`spike_linear_lif` reads them; see :func:`pack_linear`.

    Attributes
    ----------
    weight : Tensor
        ``[ceil(outputs / 64), inputs, 64]`` float32: panels of 64 outputs, an input a row.
    bias : Tensor
        ``[ceil(outputs / 64), 64]`` float32.
    outputs : int
    """

    weight: Tensor
    bias: Tensor
    outputs: int

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    def __repr__(self) -> str:
        return f"PackedLinear({self.inputs} -> {self.outputs})"


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """Pack the weights of a linear map once, for many calls of :func:`spike_linear_lif`.

    Parameters
    ----------
    weight : Tensor
        ``[outputs, inputs]`` float32, finite; at most 65535 inputs.
    bias : Tensor, optional
        ``[outputs]`` float32.

    Returns
    -------
    PackedLinear
        A copy: later changes of ``weight`` are not seen.
    """
    op = "pack_linear"
    check_shape(op, "weight", check_tensor(op, "weight", weight), outputs=None, inputs=None)
    check_dtype(op, "weight", weight, (torch.float32,))
    outputs, inputs = weight.shape
    if outputs < 1 or not 1 <= inputs <= MOST_INPUTS:
        raise InvalidValue(
            f"{op}: weight must have at least 1 output and 1 .. {MOST_INPUTS} inputs, "
            f"got {shape_of(weight)}"
        )
    check_finite(op, "weight", weight)
    if bias is not None:
        check_shape(op, "bias", check_tensor(op, "bias", bias), outputs=outputs)
        check_dtype(op, "bias", bias, (torch.float32,))
        check_device(op, "bias", bias, "weight", weight)
        check_finite(op, "bias", bias)
        bias = bias.detach()
    return PackedLinear(*ops.pack_linear(weight.detach(), bias), outputs)


def pack_spikes(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Spikes as bits: ``[..., C]`` to words ``[..., ceil(C / 64)]``.

    Parameters
    ----------
    x : Tensor
        float32; bit ``c % 64`` of word ``c // 64`` is set where channel ``c`` is not zero, as a NaN
        is not.

    Returns
    -------
    Tensor
        int64; bits past the last channel are zero.
    """
    op = "pack_spikes"
    check_dtype(op, "x", check_tensor(op, "x", x), (torch.float32,))
    if x.dim() < 1:
        raise InvalidValue(f"{op}: x must have shape (..., C), got a 0-d tensor")
    return ops.pack_spikes(backend, x.detach())


def unpack_spikes(bits: Tensor, channels: int, *, backend: str = "auto") -> Tensor:
    """Bits as spikes: words ``[..., ceil(channels / 64)]`` to float32 ``[..., channels]``."""
    op = "unpack_spikes"
    check_dtype(op, "bits", check_tensor(op, "bits", bits), (torch.int64,))
    check_integer(op, "channels", channels, at_least=1)
    words = -(-channels // WORD)
    if bits.dim() < 1 or bits.shape[-1] != words:
        raise InvalidValue(
            f"{op}: bits must have shape (..., {words}) for {channels} channels, "
            f"got {shape_of(bits)}"
        )
    return ops.unpack_spikes(backend, bits, channels)


def spike_linear_lif(
    spikes: Tensor,
    weight: Tensor | PackedLinear,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    inv_tau: Tensor | None = None,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    layout: TokenLayout | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``neuron(linear(spikes))`` in one pass, for inference: adds the weights of what fired.

    Parameters
    ----------
    spikes : Tensor
        ``[T, ..., inputs]`` float32, or the same as bits, int64 ``[T, ..., ceil(inputs / 64)]``
        (:func:`pack_spikes`). With a layout ``[R, inputs]``. Floats need not be spikes: zeros are
        passed over, ones added, other values multiplied. Finite, which is not checked.
    weight : Tensor or PackedLinear
        ``[outputs, inputs]`` float32, packed on the spot, or packed before
        (:func:`pack_linear`), which is what to do for more than one call.
    bias : Tensor, optional
        ``[outputs]``; with a packed weight it is part of that.
    v : Tensor, optional
        ``[..., outputs]`` membrane to begin with (``[B, N, outputs]`` with a layout).
    kind, tau, inv_tau, v_threshold, v_reset, decay_input
        Of the neurons; see :func:`neuron`. The value of ``inv_tau`` is read, which on a GPU waits
        for it.
    layout : TokenLayout, optional
        The active cells, which ``spikes`` then holds the rows of.
    return_state : bool
        Whether to return the final membrane too.

    Returns
    -------
    s : Tensor
        Spikes ``[T, ..., outputs]``; bits if ``spikes`` are bits.
    v : Tensor
        Final membrane, if ``return_state``.

    Notes
    -----
    For each row the sum starts from the bias and the weights of its inputs that are not zero are
    added in ascending order (where more than 36 % fired, in groups of four), so it depends on the
    row's own inputs alone, not on the rows beside it, the number of threads or the instruction
    set. It rounds otherwise than a matrix product; on weights whose sums are exact both are the
    same bits. There is no gradient.

    Examples
    --------
    >>> s = spike_linear_lif(torch.ones(2, 1, 3), torch.full((1, 3), 0.5))
    >>> s.flatten().tolist()
    [0.0, 1.0]
    """
    op = "spike_linear_lif"
    check_tensor(op, "spikes", spikes)
    check_dtype(op, "spikes", spikes, (torch.float32, torch.int64))
    if isinstance(weight, PackedLinear):
        if bias is not None:
            raise InvalidValue(f"{op}: a packed weight holds its bias; expected bias=None, got one")
        packed = weight
    else:
        packed = pack_linear(check_tensor(op, "weight", weight), bias)
    as_bits = spikes.dtype == torch.int64
    last = -(-packed.inputs // WORD) if as_bits else packed.inputs
    dims = f"[R, {last}]" if layout is not None else f"[T, ..., {last}]"
    least = 1 if layout is not None else 2
    if spikes.dim() < least or spikes.shape[-1] != last or (layout and spikes.dim() != 2):
        raise InvalidValue(
            f"{op}: spikes must have shape {dims} for {packed.inputs} inputs"
            f"{' as bits' if as_bits else ''}, got {shape_of(spikes)}"
        )
    if layout is not None and spikes.shape[0] != layout.num_rows:
        raise InvalidValue(
            f"{op}: spikes must have the {layout.num_rows} rows of the layout, "
            f"got {shape_of(spikes)}"
        )
    T = spikes.shape[0] if layout is None else layout.T
    if T > MOST_TIMESTEPS:
        raise InvalidValue(f"{op}: T must be at most {MOST_TIMESTEPS}, got {T}")
    check_device(op, "weight", packed.weight, "spikes", spikes)
    check_neuron(op, spikes, kind, tau, inv_tau, v_threshold, v_reset, decay_input)
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (spikes, weight, bias, v, inv_tau)
    ):
        raise InvalidValue(
            f"{op}: has no gradient; expected a call under torch.no_grad() or of tensors that "
            "need none, got one that does"
        )
    if v is not None:
        shape = (*(spikes.shape[1:-1] if layout is None else (layout.B, layout.N)), packed.outputs)
        names = "(..., outputs)" if layout is None else "(B, N, outputs)"
        check_state(op, v, shape, names, torch.float32, spikes)
    s, state = ops.spike_linear_lif(
        backend, layout, spikes, packed.weight, packed.bias, v, packed.outputs, kind,
        tau if kind == "lif" else 1.0, None if inv_tau is None else float(inv_tau.detach()),
        float(v_threshold), None if v_reset is None else float(v_reset), decay_input, return_state,
    )  # fmt: skip
    return (s, state) if return_state else s
