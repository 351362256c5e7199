"""Spiking attention, restricted to active tokens."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..checks import (
    check_choice,
    check_dtype,
    check_number,
    check_shape,
    check_tensor,
)
from ..layout import TokenLayout
from .tokens import check_qkv, images_of


def spiking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    scale: float = 0.125,
    sizes: Tensor | None = None,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Spiking self-attention: ``scale * q @ (k^T diag(sizes) v)`` for each timestep and head.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes, rows of inactive tokens zero; with a layout ``[R, C]``.
    num_heads : int
        Number of heads; divides ``C``.
    scale : float
        Factor of the result (Spikformer: 0.125).
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for after merging; no gradient.
    layout : TokenLayout, optional
        Sums run over the active tokens, and they alone get an output.

    Returns
    -------
    Tensor
        Shaped as ``q``. The sums are integers, exact below 2^24 in float32, so both orders of
        the product and every backend give the same bits; the cheaper order is taken.
    """
    op = "spiking_attention"
    sizes = check_qkv(op, q, k, v, num_heads, sizes, layout)
    check_number(op, "scale", scale)
    return ops.spiking_attention(backend, layout, q, k, v, sizes, num_heads, scale)


def spike_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    v_threshold: float = 0.5,
    sizes: Tensor | None = None,
    tau: float = 2.0,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
    layout: TokenLayout | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Spike-driven self-attention (Spike-driven Transformer V1): ``q * LIF(sum_n k * v)``.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]`` spikes, rows of inactive tokens zero; with a layout ``[R, C]``.
    num_heads : int
        Divides ``C``; the operation acts on each channel by itself, whatever its head.
    v_threshold, tau, surrogate, alpha
        Of the LIF on the sums over tokens (hard reset to 0, ``detach_reset``).
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for after merging.
    state : Tensor, optional
        ``[B, 1, C]`` potentials of that LIF to begin with.
    return_state : bool
        Whether to return the final potentials too.
    layout : TokenLayout, optional
        Sums run over the active tokens, and they alone get an output.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Shaped as ``q``, and ``[B, 1, C]``.
    """
    op = "spike_driven_attention"
    sizes = check_qkv(op, q, k, v, num_heads, sizes, layout)
    check_number(op, "v_threshold", v_threshold)
    check_number(op, "tau", tau, above=1)
    check_choice(op, "surrogate", surrogate, reference.SURROGATES)
    alpha = reference.SURROGATES[surrogate].alpha if alpha is None else alpha
    check_number(op, "alpha", alpha, above=0)
    if state is not None:
        check_shape(
            op, "state", check_tensor(op, "state", state),
            B=images_of(q, layout)[0], one=1, C=q.shape[-1],
        )  # fmt: skip
        check_dtype(op, "state", state, (reference.arithmetic_dtype(q.dtype),))
    out, state = ops.spike_driven_attention(
        backend, layout, q, k, v, state, sizes, float(v_threshold), float(tau), surrogate,
        float(alpha),
    )  # fmt: skip
    return (out, state) if return_state else out
