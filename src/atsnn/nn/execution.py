"""How the cells of a block are run: every one, the halted ones zeroed, or the active ones alone.

Both forms keep the same state from block to block and give the same numbers; the model's loop
(:mod:`atsnn.nn.model`) does not know which one it drives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import functional as F
from .. import ops
from ..checks import certain
from ..layout import TokenLayout
from ..reference import SCORE_BITS, MergePlan, merged_sizes, ponder_block, readout_tokens
from .blocks import Context, Record
from .config import SpikformerConfig


@dataclass
class Kept:
    """What a trace keeps of each block: ``[T, B, N]`` (sizes ``[B, N]``), one entry a block."""

    active: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)


class PackedRun:
    """A pass over all timesteps in which the rows of active cells exist, and nothing else.

    Attributes
    ----------
    layout : TokenLayout
        The active cells of the block at hand.
    steps : Tensor
        ``[B, N]``, timesteps each token is active in the next block, once this one is finished.
    x : Tensor
        The tokens, ``[R, C]``.
    H : Tensor
        ``[R]``, accumulators before the block.
    sizes, source : Tensor
        ``[B, N]``: original tokens each token stands for; the token that holds each of them.
    features : Tensor
        ``[B, C]`` float64, the readout so far; ``[B, N, C]`` where it is that of each token.
    kept : Kept, optional
        For a trace.
    """

    packed = True
    padded = False

    def __init__(self, config: SpikformerConfig, x: Tensor, trace: bool) -> None:
        T, B, N, C = x.shape
        self.config = config
        self.sizes = x.new_ones((B, N), dtype=torch.float32)
        self.source = torch.arange(N, device=x.device).repeat(B, 1)
        self.layout = TokenLayout.full(T, B, N, x.device, self.padded)
        self.steps = self.layout.active_steps
        self.x = self._take_in(x)
        self.H = x.new_zeros(self.layout.num_rows, dtype=torch.float32)
        shape = (B, N, C) if config.task == "pixels" else (B, C)
        self.features = x.new_zeros(shape, dtype=torch.float64)
        self.ponder = x.new_zeros((), dtype=torch.float64)
        self.depth = torch.zeros((T, B, N), dtype=torch.int64, device=x.device)
        self.kept = Kept() if trace else None

    def context(self, number: int, record: Record | None) -> Context:
        """What accompanies the tokens through block ``number``."""
        c = self.config
        sizes = self.sizes if c.merging and c.merge_sizes else None
        # Where nothing can halt or merge the masked form is plain Spikformer.
        layout = self.layout if c.adaptive else None
        name = f"block.{number}"
        return Context(layout, sizes, None, record, name, self.packed, fused=self.padded)

    def finish_block(self, number: int, h: Tensor | None) -> None:
        """Halt and read out after block ``number``.

        ``h`` are the scores ``[R]`` of its cells; ``None``: the model does not halt.
        """
        c = self.config
        final = number + 1 == c.depth
        if h is None:
            h = torch.zeros_like(self.H)
        w, last, self.H, self.steps = F.halt(
            h, self.H, self.layout, accumulator=c.halting or "depth", eps=c.eps, final=final
        )
        if c.halting is not None or final:  # otherwise all weights are zero until the last block
            used = last.to(w.dtype) if c.readout == "last" else w
            self.features = self.features + self._read(used)
        if self.kept is not None:
            h, w, last = (self.layout.unpack(values) for values in (h, w, last))
            active = self.layout.mask
            self.ponder = self.ponder + ponder_block(number + 1, w, last, self.sizes)
            self.depth = self.depth + active.gather(2, self.source.expand(active.shape))
            self.kept.active.append(active)
            self.kept.scores.append(h)
            self.kept.weights.append(w)
            self.kept.sizes.append(self.sizes)

    def advance(self, plan: MergePlan | None) -> None:
        """Go on to the next block: the tokens that go on, merged by ``plan`` if one is given."""
        if not self.config.adaptive:
            return  # every cell goes on
        sizes = self.sizes
        steps = self.steps if plan is None else self.steps.masked_fill(plan.merged, 0)
        to = self.layout.following(steps)
        if plan is not None:
            self.sizes = merged_sizes(sizes, plan)
            self.source = plan.target.gather(1, self.source)
            self.H = ops.merge_tokens("auto", self.layout, to, self.H, plan, sizes, SCORE_BITS)
            self._merge(to, plan, sizes)
        # Cells are nested: as many are the same.
        elif to.padded or not certain(to.num_rows == self.layout.num_rows):
            rows = to.rows_in(self.layout)
            self.H = ops.take_rows("auto", self.H, rows)
            self._take(rows)
        self.layout = to

    # -- what depends on the form of the tokens ---------------------------------------------------

    def _take_in(self, x: Tensor) -> Tensor:
        return self.layout.pack(x)

    def rows(self, values: Tensor) -> Tensor:
        """``[R]``: values of each token in its form, at the active cells."""
        return values

    def firing_counts(self, keys: Tensor) -> Tensor:
        """``[B, N, C]``: spikes of the keys over the timesteps."""
        return F.firing_counts(keys, layout=self.layout)

    def _read(self, w: Tensor) -> Tensor:
        """What the block gives to the readout, with weights ``w [R]``."""
        if self.config.task == "pixels":
            return readout_tokens(self._dense(), self.layout.unpack(w), self.source)
        return self._read_all(w, self.sizes if self.config.merging else None)

    def _dense(self) -> Tensor:
        return self.layout.unpack(self.x)

    def _read_all(self, w: Tensor, sizes: Tensor | None) -> Tensor:
        return F.readout(self.x, w, sizes=sizes, layout=self.layout)

    def _take(self, rows: Tensor) -> None:
        self.x = ops.take_rows("auto", self.x, rows)

    def _merge(self, to: TokenLayout, plan: MergePlan, sizes: Tensor) -> None:
        self.x = ops.merge_tokens("auto", self.layout, to, self.x, plan, sizes)


class PaddedRun(PackedRun):
    """A packed pass in buffers for every cell, which never asks the device how many are active.

    So the host runs ahead, and a GPU's work can be captured in a CUDA graph. For inference without
    a trace, on Triton's kernels: they take the runs of the layout and leave the other rows alone.
    Linear layers run with their BatchNorm and neuron as one kernel, for a matrix product would go
    over every row.
    """

    padded = True


class MaskedRun(PackedRun):
    """A pass in which every cell is computed; after each neuron the halted ones are zeroed.

    The tokens ``x`` are dense, ``[T, B, N, C]``; accumulators and weights are those of the active
    cells, as in the packed form.
    """

    packed = False

    def _take_in(self, x: Tensor) -> Tensor:
        return x

    def rows(self, values: Tensor) -> Tensor:
        return self.layout.pack(values)

    def firing_counts(self, keys: Tensor) -> Tensor:
        return F.firing_counts(keys)

    def _dense(self) -> Tensor:
        return self.x

    def _read_all(self, w: Tensor, sizes: Tensor | None) -> Tensor:
        return F.readout(self.x, self.layout.unpack(w), sizes=sizes)

    def _take(self, rows: Tensor) -> None:
        pass

    def _merge(self, to: TokenLayout, plan: MergePlan, sizes: Tensor) -> None:
        self.x = ops.merge_tokens("auto", None, None, self.x, plan, sizes)


RUNS: dict[str, type[PackedRun]] = {"packed": PackedRun, "masked": MaskedRun, "padded": PaddedRun}
