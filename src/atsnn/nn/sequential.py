"""The sequential accumulator: one timestep after the other; a halted token is gone for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..checks import certain
from ..layout import TokenLayout
from ..reference import active_cells, halting_weights, ponder_block
from .blocks import Context
from .trace import FiringRates, Trace

if TYPE_CHECKING:
    from .model import ATSpikformer


def run_sequential(
    model: ATSpikformer, x: Tensor, return_trace: bool, rates: FiringRates | None
) -> Tensor | Trace:
    """Blocks, halting, readout and head of ``model`` from tokens ``x [T, B, N, C]``."""
    c = model.config
    packed = model.execution == "packed"
    L, (T, B, N, C) = c.depth, x.shape
    total = x.new_zeros((B, N), dtype=torch.float32)
    ran = torch.zeros((L, T, B, N), dtype=torch.bool, device=x.device)
    scores, weights = [], []  # of each cell, in the order they run
    features = x.new_zeros((B * N, C), dtype=torch.float64)
    ponder = x.new_zeros((), dtype=torch.float64)
    state: dict[str, Tensor] = {}
    training = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    try:
        # The statistics of one timestep's cells are not those of a batch.
        for bn in training:
            bn.eval()
        for t in range(T):
            layout = TokenLayout.from_active_steps(
                active_cells(total, c.eps, "sequential").long(), 1
            )
            y = layout.pack(x[t : t + 1]) if packed else x[t : t + 1]
            before = torch.zeros_like(total)
            for number, block in enumerate(model.block):
                active = layout.mask[0]
                ran[number, t] = active
                if not certain(layout.num_rows == 0):
                    context = Context(layout, None, state, rates, f"block.{number}", packed)
                    y, _ = block.forward_with_keys(y, context)
                assert model.halting is not None
                h = model.halting(y)
                h = (layout.unpack(h) if packed else h * active)[0]
                scores.append(h)
                total = total + h
                goes_on = active & active_cells(total, c.eps, "sequential")
                if number + 1 == L:
                    goes_on = torch.zeros_like(active)
                w, last = halting_weights(h, before, active, goes_on)
                before = before + h
                weights.append(w)
                used = w if c.readout == "mean-field" else last.to(w.dtype)
                features = features + _cells(used, y, layout, packed)
                ponder = ponder + ponder_block(number + 1, w, last)
                following = TokenLayout.from_active_steps(goes_on.long(), 1)
                if packed and following.num_rows != layout.num_rows:
                    y = ops.take_rows("auto", y, following.rows_in(layout))
                layout = following
    finally:
        for bn in training:
            bn.train()
    depth = ran.sum(0)
    timesteps = (depth > 0).sum(0).clamp(min=1)
    per_token = features.view(B, N, C) / timesteps.double().unsqueeze(-1)
    if c.task == "pixels":
        logits = model.classify(per_token, 1, N)
    else:
        logits = model.classify(per_token.sum(1), 1, N)
    if not return_trace:
        return logits
    sizes = x.new_ones((B, N), dtype=torch.float32)
    all_scores, all_weights = (
        torch.stack(cells).view(T, L, B, N).transpose(0, 1) for cells in (scores, weights)
    )
    return Trace(
        logits, ran, depth, (ponder / max(T * B * N, 1)).to(torch.float32), all_scores,
        all_weights, sizes, sizes.expand(L, B, N), torch.arange(N, device=x.device).repeat(B, 1),
        {} if rates is None else rates.rates(),
    )  # fmt: skip


def _cells(w: Tensor, y: Tensor, layout: TokenLayout, packed: bool) -> Tensor:
    """``w * y`` of one timestep in float64, ``[B * N, C]``; zero for tokens without a row."""
    if not packed:
        return (w.double().unsqueeze(-1) * y[0].double()).flatten(0, 1)
    rows = layout.pack(w.unsqueeze(0)).double().unsqueeze(-1) * y.double()
    return layout.unpack(rows).flatten(0, 2)
