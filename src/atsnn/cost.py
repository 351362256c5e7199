"""What a forward pass costs, counted from the cells it executed.

FLOPs are ``2 * M * K * N`` per linear layer on the rows of active cells, attention in the cheaper
order for the tokens that are active, the stem's convolutions included. SOPs (synaptic operations)
are half the FLOPs times the firing rate of what goes in; where spikes meet spikes, of those that
are fewer. Energy is 4.6 pJ per multiply-accumulate where the input is not spikes and 0.9 pJ per
SOP elsewhere (45 nm; Horowitz, ISSCC 2014). Neurons, normalisation and the mean over the tokens
are elementwise and, as is customary, not counted; what halting and merging add is, all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import InvalidType
from .nn.config import SpikformerConfig
from .nn.model import ATSpikformer, evaluating
from .nn.trace import Trace
from .reference import attention_order

__all__ = ["Cost", "Parts", "cost", "cost_of_trace"]

PJ_PER_MAC, PJ_PER_SOP = 4.6, 0.9
FLOAT_BYTES = 4

# Of both products of spiking attention, by their order, the operands that are spikes: the other
# one of the second product is the first product.
ATTENTION_DRIVERS = {"q_kv": ("kv", "q"), "qk_v": ("qk", "v")}


def attention_macs(tokens: Iterable[int], num_heads: int, head_dim: int) -> dict[str, int]:
    """Multiply-accumulates of one of both products of spiking attention, by their order.

    ``tokens`` are those of each timestep and image, which take the cheaper order each.
    """
    found = dict.fromkeys(ATTENTION_DRIVERS, 0)
    for n in tokens:
        order = attention_order(n, head_dim)
        found[order] += num_heads * n * head_dim * (head_dim if order == "q_kv" else n)
    return found


@dataclass
class Parts:
    """One quantity by part of the model."""

    stem: float = 0.0
    attention: float = 0.0
    mlp: float = 0.0
    halting: float = 0.0
    merging: float = 0.0
    head: float = 0.0

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(dataclasses.asdict(self).items())

    def __getitem__(self, part: str) -> float:
        return dict(self)[part]

    @property
    def total(self) -> float:
        return sum(value for _, value in self)

    @property
    def blocks(self) -> float:
        """Everything between the stem and the head."""
        return self.attention + self.mlp + self.halting + self.merging

    def add(self, part: str, value: float) -> None:
        setattr(self, part, getattr(self, part) + value)


@dataclass
class Cost:
    """Cost of one batch.

    Attributes
    ----------
    flops, sops, bytes, energy_pj : Parts
    cells : Tensor
        ``[L, T]`` int64, executed cells by block and timestep.
    dense : Cost, optional
        The same with nothing halted and nothing merged.
    """

    flops: Parts
    sops: Parts
    bytes: Parts
    energy_pj: Parts
    cells: Tensor
    dense: Cost | None = None

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            name: dict(getattr(self, name)) | {"total": getattr(self, name).total}
            for name in ("flops", "sops", "bytes", "energy_pj")
        }
        out["cells"] = self.cells.tolist()
        if self.dense is not None:
            out["dense"] = self.dense.to_dict()
        return out

    def _layer(
        self, part: str, macs: float, rate: float | None, values: float, weights: float
    ) -> None:
        """One layer: ``rate`` is None where its input is not spikes."""
        self.flops.add(part, 2 * macs)
        self.bytes.add(part, FLOAT_BYTES * (values + weights))
        if rate is None:
            self.energy_pj.add(part, PJ_PER_MAC * macs)
        else:
            self.sops.add(part, macs * rate)
            self.energy_pj.add(part, PJ_PER_SOP * macs * rate)


def cost(model: ATSpikformer, x: Tensor) -> Cost:
    """Cost of ``model`` in evaluation on the images ``x``, and the same with nothing halted.

    Parameters
    ----------
    model : ATSpikformer
    x : Tensor
        Images, as the model takes them.
    """
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"cost: model must be an ATSpikformer, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise InvalidType(f"cost: x must be a torch.Tensor, got {type(x).__name__}")
    with evaluating(model), torch.no_grad():
        still = x.dim() == 4
        found = cost_of_trace(model.config, model(x, return_trace=True), still)
        plain = model.without_halting().eval()
        found.dense = cost_of_trace(plain.config, plain(x, return_trace=True), still)
    return found


def cost_of_trace(
    config: SpikformerConfig,
    trace: Trace,
    still: bool = True,
    stem_pixels: dict[str, int] | None = None,
) -> Cost:
    """Cost of the pass that ``trace`` describes; ``still``: its images stood still.

    ``stem_pixels``: of which each convolution of the stem was computed, if not of all; see
    :class:`atsnn.engine.EngineTrace`.
    """
    L, T, B, _ = trace.active.shape
    found = Cost(Parts(), Parts(), Parts(), Parts(), trace.active.sum((2, 3)).cpu())
    _stem(found, config, trace.firing_rates, B, T, still, stem_pixels)
    for block in range(L):
        _block(found, config, trace, block)
    C = config.embed_dim
    ran = float(found.cells.sum())
    if config.halting is not None:
        # Score (for "first": product, sum, sigmoid), accumulator and weight; weighted readout.
        per_score = {"first": 4, "mean": C + 4, "linear": 7 * C + 4, "constant": 3}[config.score]
        found._layer("halting", ran * ((per_score + 4) / 2 + C), None, ran * C, 0)
    outputs = config.outputs
    read = B * (config.grid**2 if config.task == "pixels" else 1)
    found._layer("head", read * C * outputs, None, read * (C + outputs), C * outputs)
    return found


def _stem(
    found: Cost,
    config: SpikformerConfig,
    rates: dict[str, float],
    B: int,
    T: int,
    still: bool,
    computed: dict[str, int] | None,
) -> None:
    dim, side, before = config.embed_dim, config.image_size, config.in_channels
    pooled = ("proj2", "proj3") if config.stem == "cifar" else ("proj", "proj1", "proj2", "proj3")
    layers = (("proj", dim // 8), ("proj1", dim // 4), ("proj2", dim // 2), ("proj3", dim))
    for name, after in (*layers, ("rpe", dim)):
        first = name == "proj"
        frames = B if first and still else B * T
        pixels = frames * side * side if computed is None else computed[name]
        rate = None if first else rates[f"patch_embed.{name}.input"]
        found._layer(
            "stem", pixels * 9 * before * after, rate,
            pixels * (before + after), 9 * before * after,
        )  # fmt: skip
        if name in pooled:
            side //= 2
        before = after


def _block(found: Cost, config: SpikformerConfig, trace: Trace, block: int) -> None:
    rates = trace.firing_rates
    prefix = f"block.{block}"
    if f"{prefix}.attn.input" not in rates:
        return  # no cell was active: the block was skipped
    C, h = config.embed_dim, config.num_heads
    hidden, d = int(C * config.mlp_ratio), C // h
    tokens = trace.active[block].sum(-1).flatten()  # of each (t, b)
    R = float(tokens.sum())
    rate_in = rates[f"{prefix}.attn.input"]
    for rate in (rate_in, rate_in, rate_in, rates[f"{prefix}.attn.attn_lif"]):  # q, k, v, proj
        found._layer("attention", R * C * C, rate, R * 2 * C, C * C)
    fired = {name: rates[f"{prefix}.attn.{name}_lif"] for name in "qkv"}
    found.bytes.add("attention", FLOAT_BYTES * R * 4 * C)
    if config.attention == "ssa":
        for order, products in attention_macs(tokens.tolist(), h, d).items():
            for drivers in ATTENTION_DRIVERS[order]:
                found._layer("attention", products, min(fired[x] for x in drivers), 0, 0)
    else:
        found._layer("attention", R * C, min(fired[x] for x in "kv"), 0, 0)
    found._layer("mlp", R * C * hidden, rates[f"{prefix}.mlp.input"], R * (C + hidden), C * hidden)
    found._layer(
        "mlp", R * C * hidden, rates[f"{prefix}.mlp.fc1_lif"], R * (C + hidden), C * hidden
    )
    r = config.merges[block] if block < config.depth - 1 else 0
    if block < config.depth - 1 and (r or config.merge_threshold is not None):
        # Half of an image's tokens are compared with the other half; the merged are averaged.
        n = trace.active[block].any(0).sum(-1).double()
        T = trace.active.shape[1]
        macs = float((n / 2).square().sum()) * C + float(n.sum()) * T * C / 2
        found._layer("merging", macs, None, float(n.sum()) * T * C, 0)
