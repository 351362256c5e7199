"""The contract in plain PyTorch: every formula once, dense, readable and slow.

This is the home of each formula; kernels are judged against it. It follows AT-SNN
(arXiv 2408.12293) where its abstract states a rule, its parents where the rule is theirs
(A-ViT, arXiv 2112.07658; Spikformer, arXiv 2209.15425; ToMe, arXiv 2210.09461), and
``docs/method.md`` where neither says. Cells that are not active are zero ("masked form").

Shapes: ``T`` timesteps, ``B`` images, ``N`` tokens, ``C`` channels, ``L`` blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .layout import TokenLayout

# -- spiking neurons ------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """A surrogate derivative ``sigma'(z)`` at ``z = u - v_threshold`` and its default ``alpha``."""

    alpha: float
    derivative: Callable[[Tensor, float], Tensor]


def _sigmoid(z: Tensor, alpha: float) -> Tensor:
    s = torch.sigmoid(alpha * z)
    return alpha * s * (1 - s)


def _piecewise_quadratic(z: Tensor, alpha: float) -> Tensor:
    return (alpha - alpha**2 * z.abs()).masked_fill(z.abs() > 1 / alpha, 0.0)


# Formulas and default alphas are those of SpikingJelly 2.0 (activation_based/surrogate.py).
SURROGATES: dict[str, Surrogate] = {
    "sigmoid": Surrogate(4.0, _sigmoid),
    "atan": Surrogate(2.0, lambda z, a: a / 2 / (1 + (math.pi / 2 * a * z) ** 2)),
    "piecewise_quadratic": Surrogate(1.0, _piecewise_quadratic),
    "piecewise_exp": Surrogate(1.0, lambda z, a: a / 2 * torch.exp(-a * z.abs())),
    "soft_sign": Surrogate(2.0, lambda z, a: 1 / (2 * a * (1 / a + z.abs()) ** 2)),
    "super_spike": Surrogate(1.0, lambda z, a: a / (z.abs() + 1) ** 2),
    "erf": Surrogate(2.0, lambda z, a: a / math.sqrt(math.pi) * torch.exp(-((a * z) ** 2))),
}

# What SpikingJelly calls them.
SURROGATE_CLASSES = {
    "sigmoid": "Sigmoid",
    "atan": "ATan",
    "piecewise_quadratic": "PiecewiseQuadratic",
    "piecewise_exp": "PiecewiseExp",
    "soft_sign": "SoftSign",
    "super_spike": "SuperSpike",
    "erf": "Erf",
}


class _Fire(torch.autograd.Function):
    """``s = 1 if z >= 0 else 0``, differentiated by a surrogate."""

    @staticmethod
    def forward(ctx, z: Tensor, surrogate: str, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return (z >= 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return grad * SURROGATES[ctx.surrogate].derivative(z, ctx.alpha), None, None


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is float32 whatever the storage type; float64 is kept for gradient checks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def neuron(
    x: Tensor,
    v: Tensor | None,
    inv_tau: Tensor | None,
    kind: str,
    tau: float,
    v_threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    r"""Spiking neurons over ``T`` steps; see :func:`atsnn.functional.neuron`.

    Notes
    -----
    With :math:`v[0] = v_\text{reset}` (0 under a soft reset) unless a state is given, each step::

        charge   if:                     u = v + x
                 lif, decay_input:       u = v + (x - (v - v_reset)) / tau
                 lif, not decay_input:   u = v - (v - v_reset) / tau + x
                 plif:                   as lif, multiplied by inv_tau instead of divided by tau
        fire     s = 1 if u >= v_threshold else 0
        reset    hard: v = v_reset where s, else u         soft: v = u - s * v_threshold

    Each operation is rounded once, in this order (Spikformer's neuron as SpikingJelly 2.0
    computes it).
    """
    dtype = arithmetic_dtype(x.dtype)
    rest = 0.0 if v_reset is None else v_reset
    if v is None:
        v = x.new_full(x.shape[1:], rest, dtype=dtype)
    if inv_tau is not None:
        inv_tau = inv_tau.to(dtype)
    # A tensor: on a GPU PyTorch would multiply by the reciprocal of a number.
    divisor = x.new_full((), tau, dtype=dtype)
    spikes = []
    for x_t in x.to(dtype):
        if kind == "if":
            u = v + x_t
        else:
            drive = (x_t - (v - rest)) if decay_input else (v - rest)
            drive = drive / divisor if inv_tau is None else drive * inv_tau
            u = v + drive if decay_input else v - drive + x_t
        s = _Fire.apply(u - v_threshold, surrogate, alpha)
        fired = s.detach() if detach_reset else s
        v = u - fired * v_threshold if v_reset is None else (1 - fired) * u + fired * v_reset
        spikes.append(s)
    return (torch.stack(spikes) if spikes else torch.empty_like(x, dtype=dtype)).to(x.dtype), v


# -- attention ------------------------------------------------------------------------------------


def attention_order(tokens: int, head_dim: int) -> str:
    """The cheaper order: ``q (k^T v)`` costs ``2 n d^2`` products a head, ``(q k^T) v`` 2 n^2 d."""
    return "q_kv" if head_dim <= tokens else "qk_v"


def spiking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: float = 0.125,
    sizes: Tensor | None = None,
    order: str = "auto",
) -> Tensor:
    """Spiking self-attention of Spikformer: ``scale * q @ (k^T diag(sizes) v)``, no softmax.

    Parameters
    ----------
    q, k, v : Tensor
        ``[T, B, N, C]``; rows of inactive cells are zero.
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for.
    order : {"auto", "q_kv", "qk_v"}
        Both orders are the same integers, so the same bits.
    """
    T, B, N, C = q.shape
    heads = (T, B, N, num_heads, C // num_heads)
    storage, dtype = q.dtype, arithmetic_dtype(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if sizes is not None:
        v = v * sizes.to(dtype)[None, :, :, None]
    q, k, v = (x.reshape(heads).transpose(2, 3) for x in (q, k, v))
    if order == "auto":
        order = attention_order(N, C // num_heads)
    # Autocast would take the products in a type in which the integers are not exact.
    with torch.autocast(q.device.type, enabled=False):
        out = q @ (k.transpose(-2, -1) @ v) if order == "q_kv" else (q @ k.transpose(-2, -1)) @ v
    return (out * scale).transpose(2, 3).reshape(T, B, N, C).to(storage)


def spike_driven_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_threshold: float = 0.5,
    sizes: Tensor | None = None,
    tau: float = 2.0,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Spike-driven self-attention (Spike-driven Transformer V1): ``q * LIF(sum_n k * v)``.

    ``q, k, v`` are ``[T, B, N, C]`` with inactive rows zero; the LIF runs over ``T`` on one
    potential per image and channel, ``state [B, 1, C]``, with hard reset to 0 and
    ``detach_reset``. Returns the output and the final potentials.
    """
    kv = (k * v).to(arithmetic_dtype(v.dtype))
    if sizes is not None:
        kv = kv * sizes.to(kv.dtype)[None, :, :, None]
    alpha = SURROGATES[surrogate].alpha if alpha is None else alpha
    gate, state = neuron(
        kv.sum(2, keepdim=True), state, None, "lif", tau, v_threshold, 0.0, True, True,
        surrogate, alpha,
    )  # fmt: skip
    return q * gate.to(q.dtype), state


# -- halting --------------------------------------------------------------------------------------

SCORE_BITS = 18  # scores, accumulators and weights are multiples of 2^-18: exact below 64
ROW_BITS = 8  # merged rows are multiples of 2^-8
SCORES = ("first", "mean", "linear", "constant")
ACCUMULATORS = ("rectangle", "depth", "sequential")
READOUTS = ("mean-field", "last")


class _RoundTo(torch.autograd.Function):
    """Round to a multiple of ``2^-bits``, ties to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x: Tensor, bits: int) -> Tensor:
        return torch.round(x * 2.0**bits) * 2.0**-bits

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_to(x: Tensor, bits: int) -> Tensor:
    return _RoundTo.apply(x, bits)


def halting_scores(x: Tensor, weight: Tensor, bias: Tensor, score: str = "first") -> Tensor:
    """Halting scores ``h = sigmoid(alpha * f(x) + beta)`` (A-ViT), a multiple of ``2^-18``.

    Parameters
    ----------
    x : Tensor
        ``[..., C]``, the tokens after a block.
    weight : Tensor
        ``alpha``, 0-d; for ``score="linear"`` the linear map ``[C]``, ``alpha`` included.
    bias : Tensor
        ``beta``, 0-d.
    score : {"first", "mean", "linear", "constant"}
        ``f``: the first channel; the mean over channels; a linear map of the detached,
        layer-normalised token; zero (one schedule for all tokens).

    Returns
    -------
    Tensor
        ``[...]`` float32 in ``[0, 1]``, evaluated in float64 and rounded once.
    """
    bias = bias.double()
    if score == "first":
        z = weight.double() * x[..., 0].double() + bias
    elif score == "mean":
        z = weight.double() * x.double().mean(-1) + bias
    elif score == "linear":
        z = nnf.layer_norm(x.detach().double(), x.shape[-1:]) @ weight.double() + bias
    else:
        z = bias.expand(x.shape[:-1])
    return round_to(torch.sigmoid(z), SCORE_BITS).to(torch.float32)


def accumulate_block(h: Tensor, accumulator: str) -> Tensor:
    """``g[t]``, what one block adds to the accumulator: ``h [T, ...]``, zero where not executed.

    ``rectangle``: ``g[t] = sum_{t' <= t} h[t']`` (AT-SNN accumulates over time and depth);
    ``depth`` and ``sequential``: ``g = h`` (A-ViT).
    """
    return h.cumsum(0) if accumulator == "rectangle" else h


def active_cells(H: Tensor, eps: float, accumulator: str) -> Tensor:
    """``[T, ...]`` bool: cells whose accumulator before the block is below ``1 - eps``.

    ``rectangle`` is a prefix in time by itself; for ``depth`` a token that is inactive at one
    timestep stays inactive at the later ones.
    """
    active = 1 - eps > H
    return active.cumprod(0).bool() if accumulator == "depth" else active


def halting_weights(
    g: Tensor, H_before: Tensor, active: Tensor, goes_on: Tensor
) -> tuple[Tensor, Tensor]:
    """Readout weights of one block and where they are remainders.

    ``w = g`` where the token goes on, the remainder ``1 - H_before`` at its last block, 0 where
    the cell did not run. All ``[T, ...]``.
    """
    last = active & ~goes_on
    w = torch.where(active, torch.where(last, 1 - H_before, g), torch.zeros_like(g))
    return w, last


def halt(
    h: Tensor, H: Tensor, active: Tensor, accumulator: str, eps: float, final: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block's halting step, from scores to what runs next.

    Parameters
    ----------
    h, H : Tensor
        ``[T, B, N]`` scores after the block and accumulators before it, zero where not active.
    active : Tensor
        ``[T, B, N]`` bool, the cells that ran.
    accumulator : {"rectangle", "depth"}
    eps : float
    final : bool
        Whether it was the last block, after which nothing goes on.

    Returns
    -------
    w, last : Tensor
        Readout weights and where they are remainders; see :func:`halting_weights`.
    H : Tensor
        The accumulators after the block.
    active_steps : Tensor
        ``[B, N]`` int64, the timesteps each token is active in the next block.
    """
    g = accumulate_block(h, accumulator)
    after = H + g
    # A merged-away token stays away although its own accumulator says nothing of it.
    goes_on = active & active_cells(after, eps, accumulator)
    if final:
        goes_on = torch.zeros_like(active)
    w, last = halting_weights(g, H, active, goes_on)
    return w, last, after, goes_on.sum(0)


@dataclass
class HaltingState:
    """What halting makes of the scores of all cells.

    Attributes
    ----------
    active : Tensor
        ``[L, T, B, N]`` bool, the executed cells.
    H : Tensor
        ``[L, T, B, N]`` float32, the accumulator after each block.
    weights : Tensor
        ``[L, T, B, N]`` float32, mean-field readout weights; they sum to one over the blocks
        of each timestep with ``depth >= 1``.
    depth : Tensor
        ``[T, B, N]`` int64, the number of blocks executed at each timestep.
    """

    active: Tensor
    H: Tensor
    weights: Tensor
    depth: Tensor

    @property
    def remainder(self) -> Tensor:
        """``[T, B, N]``: the weight of the last executed block, 0 where none was."""
        if not len(self.weights):
            return torch.zeros_like(self.depth, dtype=self.weights.dtype)
        last = (self.depth - 1).clamp(min=0).unsqueeze(0)
        return self.weights.gather(0, last).squeeze(0) * (self.depth > 0)


def accumulate(h: Tensor, accumulator: str = "rectangle", eps: float = 0.01) -> HaltingState:
    """Scores of all cells to activity, accumulators, weights and depths.

    Parameters
    ----------
    h : Tensor
        ``[L, T, B, N]`` scores; those of cells that turn out not to be executed are ignored.
    """
    L, T = h.shape[:2]
    active, H, weights = [], [], []
    if accumulator == "sequential":
        total = h.new_zeros(h.shape[2:])
        cells = torch.zeros(h.shape, dtype=torch.bool, device=h.device)
        for t in range(T):
            for block in range(L):
                cells[block, t] = total < 1 - eps
                total = total + h[block, t] * cells[block, t]
    else:
        cells = None
    before = h.new_zeros(h.shape[1:])
    for block in range(L):
        runs = active_cells(before, eps, accumulator) if cells is None else cells[block]
        g = accumulate_block(h[block] * runs, accumulator)
        after = before + g
        if block + 1 == L:
            goes_on = torch.zeros_like(runs)
        else:
            goes_on = active_cells(after, eps, accumulator) if cells is None else cells[block + 1]
        w, _ = halting_weights(g, before, runs, goes_on)
        active.append(runs)
        H.append(after)
        weights.append(w)
        before = after
    if not active:
        empty = h.new_zeros(h.shape)
        return HaltingState(
            empty.bool(), empty, empty, h.new_zeros(h.shape[1:], dtype=torch.int64)
        )  # fmt: skip
    ran = torch.stack(active)
    return HaltingState(ran, torch.stack(H), torch.stack(weights), ran.sum(0))


def ponder_loss(depth: Tensor, remainder: Tensor, sizes: Tensor | None = None) -> Tensor:
    """A-ViT's ponder loss ``mean_{t,k}(D + w[D])``, a 0-d tensor.

    Parameters
    ----------
    depth, remainder : Tensor
        ``[T, B, N]``.
    sizes : Tensor, optional
        ``[B, N]``; tokens weigh as many times as they stand for original tokens.
    """
    cost = depth + remainder
    if sizes is None:
        return cost.sum() / max(cost.numel(), 1)
    return (cost * sizes).sum() / (sizes.sum() * depth.shape[0]).clamp(min=1)


def ponder_block(block: int, w: Tensor, last: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What tokens that stop at a block (the first is 1) give to the ponder loss: sum of D + w[D].

    ``w`` and ``last`` are those of :func:`halting_weights`; 0-d float64, the sum that
    :func:`ponder_loss` takes the mean of.
    """
    cost = (block + w.double()) * last
    return (cost if sizes is None else cost * sizes).sum()


def executed_share(active: Tensor) -> Tensor:
    """Share of the ``L * T * B * N`` cells that were executed, a 0-d tensor."""
    return (active.sum(dtype=torch.float64) / max(active.numel(), 1)).to(torch.float32)


def readout_block(x: Tensor, w: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What one block gives to the readout: ``sum_{t,k} size * w * x`` in float64, ``[B, C]``.

    ``x [T, B, N, C]``, ``w [T, B, N]``, ``sizes [B, N]``.
    """
    w = w.double()
    if sizes is not None:
        w = w * sizes.double()
    return torch.einsum("tbn,tbnc->bc", w, x.double())


def readout_tokens(x: Tensor, w: Tensor, source: Tensor) -> Tensor:
    """What one block gives to the readout of each original token, ``[B, N, C]`` float64.

    ``sum_t w * x`` of the token that holds it: ``x [T, B, N, C]``, ``w [T, B, N]``, ``source
    [B, N]``. Summed over the original tokens it is :func:`readout_block` with their sizes.
    """
    total = torch.einsum("tbn,tbnc->bnc", w.double(), x.double())
    return unmerge_tokens(total[None], source)[0]


def readout(total: Tensor, cells: Tensor | float) -> Tensor:
    """The mean over timesteps and original tokens, rounded once to float32.

    ``total [..., C]`` float64 is the sum of :func:`readout_block` over the blocks, ``cells`` the
    number of (timestep, original token) pairs it stands for, or ``[B]`` of them.
    """
    # A tensor: on a GPU PyTorch would multiply by the reciprocal of a number.
    cells = cells.view(-1, 1) if isinstance(cells, Tensor) else total.new_full((), cells)
    return (total / cells).to(torch.float32)


# -- merging --------------------------------------------------------------------------------------

MATCHES = ("similar", "random")


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which tokens merge into which.

    Attributes
    ----------
    target : Tensor
        ``[B, N]`` int64: the token that each token is held in after the merge (itself if it
        stays).
    merged : Tensor
        ``[B, N]`` bool: tokens that are gone after the merge.
    """

    target: Tensor
    merged: Tensor

    @classmethod
    def of(cls, target: Tensor) -> MergePlan:
        """The plan in which each token is held in its target."""
        return cls(target, target != torch.arange(target.shape[1], device=target.device))

    @property
    def shape(self) -> torch.Size:
        return self.target.shape


def firing_counts(keys: Tensor) -> Tensor:
    """``[B, N, C]`` float32: spikes of ``keys [T, B, N, C]`` over the timesteps, no gradient."""
    with torch.no_grad():
        return keys.sum(0, dtype=torch.float32)


def firing_similarity(counts: Tensor) -> Tensor:
    """Squared cosine of firing counts ``[B, N, C]``: ``[B, N, N]`` float64.

    ``dot(a, b)^2 / (|a|^2 |b|^2)`` from exact integers; 1 where both tokens are silent, which is to
    fire alike, and 0 where one of them is. Counts are not negative, so it orders as the cosine
    does; and without a square root equal ratios are equal bits, so that ties are ties.
    """
    c = counts.double()
    dot = c @ c.transpose(1, 2)
    square = dot.diagonal(dim1=1, dim2=2)
    norm = square.unsqueeze(2) * square.unsqueeze(1)
    # Where a token is silent there is no ratio, and equal squares are those of two silent tokens.
    silent = (square.unsqueeze(2) == square.unsqueeze(1)).to(dot.dtype)
    return torch.where(norm > 0, dot * dot / norm.clamp(min=1), silent)


def match_tokens(
    counts: Tensor,
    r: int | None = None,
    threshold: float | None = None,
    active_steps: Tensor | None = None,
    match: str = "similar",
    generator: torch.Generator | None = None,
) -> MergePlan:
    """Bipartite matching of tokens with equal lifetimes (after ToMe).

    Within each group of tokens with the same number of active timesteps (> 0), in index order,
    tokens are split alternately into two sets; each token of the first finds its most similar
    partner in the second, ties to the lower index. The ``r`` best pairs of an image, ties to the
    lower index of the first set, or all pairs above ``threshold``, merge.
    """
    B, N, _ = counts.shape
    device = counts.device
    lifetime = (
        torch.ones(B, N, dtype=torch.int64, device=device)
        if active_steps is None
        else active_steps.to(torch.int64)
    )
    same = (lifetime.unsqueeze(2) == lifetime.unsqueeze(1)) & (lifetime > 0).unsqueeze(2)
    earlier = torch.ones(N, N, dtype=torch.bool, device=device).tril(-1)
    parity = (same & earlier).sum(2) % 2  # position in the group, alternately first and second
    similarity = (
        firing_similarity(counts)
        if match == "similar"
        else torch.rand(B, N, N, generator=generator, dtype=torch.float64, device=device)
    )
    pairs = same & (parity == 0).unsqueeze(2) & (parity == 1).unsqueeze(1)
    similarity = similarity.masked_fill(~pairs, -1.0)
    identity = torch.arange(N, device=device).expand(B, N)
    if N == 0:
        return MergePlan(identity.clone(), torch.zeros(B, N, dtype=torch.bool, device=device))
    best = similarity.max(2).values
    # `max` does not promise which of equal elements it names; the first is the lower index.
    partner = (similarity == best.unsqueeze(2)).to(torch.int8).argmax(2)
    has_partner = best >= 0
    if threshold is not None:
        # Similarities are squared cosines; every one exceeds a threshold below 0.
        limit = threshold if match == "random" else math.copysign(threshold**2, threshold)
        merged = has_partner & (best > limit)
    else:
        order = torch.sort(best, dim=1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(1, order, identity.contiguous())
        merged = has_partner & (place < (r or 0))
    return MergePlan(torch.where(merged, partner, identity), merged)


def merged_sizes(sizes: Tensor, plan: MergePlan) -> Tensor:
    """Sizes ``[B, N]`` after the merge: the total is kept, merged-away tokens have size 0."""
    return torch.zeros_like(sizes).scatter_add(1, plan.target, sizes)


def merge_tokens(x: Tensor, plan: MergePlan, sizes: Tensor, bits: int = ROW_BITS) -> Tensor:
    """Size-weighted mean of the tokens that merge, rounded to a multiple of ``2^-bits``.

    ``x [T, B, N, C]`` (or ``[T, B, N]``), ``sizes [B, N]``; merged-away tokens become zero, and
    a token that nothing merged into is left as it is. Sums are float64.
    """
    flat = x.unsqueeze(-1) if x.dim() == 3 else x
    weight = sizes.double()[None, :, :, None]
    target = plan.target[None, :, :, None].expand(flat.shape)
    total = torch.zeros_like(flat, dtype=torch.float64)
    total = total.scatter_add(2, target, flat.double() * weight)
    after = merged_sizes(sizes.double(), plan)[None, :, :, None]
    mean = round_to(total / after.masked_fill(after == 0, 1.0), bits).to(x.dtype)
    takes = merged_sizes(torch.ones_like(plan.target), plan) > 1
    out = torch.where(takes[None, :, :, None], mean, flat)
    out = out.masked_fill(plan.merged[None, :, :, None], 0.0)
    return out.squeeze(-1) if x.dim() == 3 else out


def unmerge_tokens(y: Tensor, source: Tensor) -> Tensor:
    """Give every original token the row of the token it is held in: ``[T, B, N, C]``."""
    return y.gather(2, source[None, :, :, None].expand(y.shape))


# -- batch normalisation over active rows ---------------------------------------------------------

MIN_BATCH_NORM_ROWS = 32


def batch_norm_rows(bn: nn.modules.batchnorm._BatchNorm, rows: Tensor) -> Tensor:
    """``bn`` over the rows ``[R, C]`` of active cells.

    In training with fewer than 32 rows the running statistics are used and not updated.
    """
    if bn.training and rows.shape[0] < MIN_BATCH_NORM_ROWS:
        return _running_batch_norm(bn, rows)
    return bn(rows)


def masked_batch_norm(
    bn: nn.modules.batchnorm._BatchNorm, x: Tensor, layout: TokenLayout | None
) -> Tensor:
    """``bn`` over the active rows of ``x [T, B, N, C]``; inactive rows are not meaningful.

    In training the statistics are those of the active rows, gathered in layout order. ``layout``
    is ``None`` where neither halting nor merging is on: then ``bn`` is applied as it is, as in
    plain Spikformer.
    """
    if layout is None or not bn.training:
        return bn(x.flatten(0, 2)).view(x.shape)
    if layout.num_rows < MIN_BATCH_NORM_ROWS:
        return _running_batch_norm(bn, x.flatten(0, 2)).view(x.shape)
    return layout.unpack(batch_norm_rows(bn, layout.pack(x)))


def _running_batch_norm(bn: nn.modules.batchnorm._BatchNorm, rows: Tensor) -> Tensor:
    return nnf.batch_norm(
        rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps
    )
