"""AT-Spikformer: Spikformer whose tokens halt over blocks and timesteps, and merge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    InvalidType,
    InvalidValue,
    check_choice,
    check_finite,
    shape_of,
)
from ..layout import TokenLayout
from ..reference import (
    SCORE_BITS,
    accumulate_block,
    active_cells,
    halting_weights,
    merge_tokens,
    merged_sizes,
    ponder_block,
    readout,
    readout_block,
)
from .blocks import (
    MLP,
    Context,
    SpikeDrivenSelfAttention,
    SpikformerBlock,
    SpikingSelfAttention,
    firing_counts,
)
from .config import SpikformerConfig, model_config
from .halting import Halting
from .merging import TokenMerge
from .stem import SpikingPatchSplitting
from .trace import FiringRates, Trace

EXECUTIONS = ("masked",)


class Head(nn.Linear):
    """A linear layer that adds in float64 and rounds once.

    The readout has up to 24 significant bits, so float32 sums would depend on the order of
    addition, which the matrix product chooses by the size of the batch. So an image's logits do
    not depend on the images beside it.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(x.double(), self.weight.double(), bias).to(self.weight.dtype)


class _Run:
    """Halting and merging of a pass over all timesteps: what changes from block to block."""

    def __init__(self, model: ATSpikformer, x: Tensor) -> None:
        self.model = model
        T, B, N, _ = x.shape
        self.sizes = x.new_ones((B, N), dtype=torch.float32)
        self.source = torch.arange(N, device=x.device).repeat(B, 1)
        self.H = x.new_zeros((T, B, N), dtype=torch.float32)
        self.active = torch.ones((T, B, N), dtype=torch.bool, device=x.device)
        self.depth = torch.zeros((T, B, N), dtype=torch.int64, device=x.device)
        self.ponder = x.new_zeros((), dtype=torch.float64)
        self.features = x.new_zeros((B, x.shape[-1]), dtype=torch.float64)

    def layout(self) -> TokenLayout | None:
        """The active cells; ``None`` while nothing can have halted or merged."""
        if self.model.halting is None and not self.model.config.merging:
            return None
        return TokenLayout.from_active_steps(self.active.sum(0), self.active.shape[0])


class ATSpikformer(nn.Module):
    """Spikformer with adaptive tokens.

    Parameters
    ----------
    config : SpikformerConfig

    Notes
    -----
    ``execution`` says how halted cells are treated: ``"masked"`` computes every cell and zeroes
    the halted ones.
    """

    def __init__(self, config: SpikformerConfig) -> None:
        super().__init__()
        if not isinstance(config, SpikformerConfig):
            raise InvalidType(
                f"ATSpikformer: config must be a SpikformerConfig, got {type(config).__name__}"
            )
        self.config = config
        self._execution = "masked"
        dim = config.embed_dim
        lif = {"tau": config.tau, "surrogate": config.surrogate, "alpha": config.alpha}
        common: dict[str, Any] = {"bias": config.bias, **lif}
        self.patch_embed = SpikingPatchSplitting(config)
        self.block: Any = nn.ModuleList()
        for _ in range(config.depth):
            if config.attention == "ssa":
                attention: Any = SpikingSelfAttention(
                    dim, config.num_heads, config.attn_scale,
                    attn_threshold=config.attn_threshold, **common,
                )  # fmt: skip
            else:
                attention = SpikeDrivenSelfAttention(
                    dim, config.num_heads, attn_threshold=config.attn_threshold, **common
                )
            mlp = MLP(dim, int(dim * config.mlp_ratio), **common)
            self.block.append(SpikformerBlock(attention, mlp))
        self.head = Head(dim, config.num_classes)
        self.halting: Halting | None = None
        if config.halting is not None:
            self.halting = Halting(
                dim, config.score, config.eps, config.halting, depth=config.depth, T=config.T
            )
        self.merge: Any = nn.ModuleList()
        for r in config.merges if config.merging else ():
            threshold = config.merge_threshold
            self.merge.append(
                TokenMerge(r=r if threshold is None else None, threshold=threshold,
                           match=config.merge_match)
            )  # fmt: skip
        for norm in batch_norms(self):
            norm.eps = config.bn_eps
        self.apply(_initialise)

    # -- execution --------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """How halted cells are treated: ``"masked"`` computes them and zeroes the result."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        check_choice("ATSpikformer", "execution", value, EXECUTIONS)
        self._execution = value

    def without_halting(self) -> ATSpikformer:
        """The plain Spikformer with the same weights: nothing halts, nothing merges."""
        plain = copy.copy(self)
        # A shallow copy shares the parameters; what is removed must not be removed here too.
        plain._modules = dict(self._modules)
        plain.config = self.config.replace(halting=None, merge_r=0, merge_threshold=None)
        plain.halting = None
        plain.merge = nn.ModuleList()
        return plain

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the weights (safetensors) and the configuration (JSON) to ``folder``."""
        from ..checkpoint import save_pretrained

        return save_pretrained(self, folder)

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, return_trace: bool = False, firing_rates: bool = True
    ) -> Tensor | Trace:
        """Images to logits.

        Parameters
        ----------
        x : Tensor
            ``[B, C, H, W]`` still images, shown ``T`` times, or ``[T, B, C, H, W]``; finite, in
            the dtype of the parameters.
        return_trace : bool
            Whether to return a :class:`Trace` instead of the logits.
        firing_rates : bool
            Whether the trace holds firing rates; counting spikes takes time in training.

        Returns
        -------
        Tensor or Trace
            ``[B, num_classes]`` logits.
        """
        rates = FiringRates() if return_trace and firing_rates else None
        return self.forward_tokens(self.embed(x, rates), return_trace, rates)

    def embed(self, x: Tensor, rates: FiringRates | None = None) -> Tensor:
        """The stem: images to tokens ``[T, B, N, C]``."""
        context = Context(record=rates, name="patch_embed")
        x = self._images(x)
        if x.dim() == 4:
            return self.patch_embed(x.unsqueeze(0), self.config.T, context)
        return self.patch_embed(x, 0, context)

    def forward_tokens(
        self, x: Tensor, return_trace: bool = False, rates: FiringRates | None = None
    ) -> Tensor | Trace:
        """Blocks, halting, merging, readout and head, from tokens ``[T, B, N, C]``."""
        if self.config.halting == "sequential":
            return self._sequential(x, return_trace, rates)
        return self._parallel(x, return_trace, rates)

    def _images(self, x: Tensor) -> Tensor:
        c = self.config
        op = "ATSpikformer"
        if not isinstance(x, Tensor):
            raise InvalidType(f"{op}: images must be a torch.Tensor, got {type(x).__name__}")
        want = (c.in_channels, c.image_size, c.image_size)
        if x.dim() not in (4, 5) or tuple(x.shape[-3:]) != want:
            raise InvalidValue(
                f"{op}: images must have shape [B, C, H, W] or [T, B, C, H, W] with "
                f"(C, H, W) = {want}, got {shape_of(x)}"
            )
        parameter = self.head.weight
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InvalidType(
                f"{op}: images must have the dtype of the parameters, {parameter.dtype}, "
                f"got {x.dtype}"
            )
        if x.device != parameter.device:
            raise InvalidValue(
                f"{op}: images must be on the device of the parameters, {parameter.device}, "
                f"got {x.device}"
            )
        if x.dim() == 5 and x.shape[0] == 0:
            raise InvalidValue(f"{op}: images must have T >= 1 timesteps, got T = 0")
        check_finite(op, "images", x)
        return x

    def _parallel(self, x: Tensor, return_trace: bool, rates: FiringRates | None) -> Tensor | Trace:
        """All timesteps of a block at once: the rectangle and the depth accumulator, or none."""
        c = self.config
        L, (T, B, N, _) = c.depth, x.shape
        run = _Run(self, x)
        kept: dict[str, list[Tensor]] = {"active": [], "scores": [], "weights": [], "sizes": []}
        for number, block in enumerate(self.block):
            layout = run.layout()
            context = Context(
                layout, run.sizes if c.merging and c.merge_sizes else None, None, rates,
                f"block.{number}",
            )  # fmt: skip
            keys = None
            if layout is None or layout.num_rows:
                x, keys = block.forward_with_keys(x, context)
            h = self._scores(x, run.active)
            g = accumulate_block(h, c.halting or "depth")
            after = run.H + g
            goes_on = self._goes_on(after, run.active, last=number + 1 == L)
            w, last = halting_weights(g, run.H, run.active, goes_on)
            self._read(run, x, w, last)
            held = run.active.gather(2, run.source.expand(run.active.shape))
            run.depth = run.depth + held
            run.ponder = run.ponder + ponder_block(number + 1, w, last, run.sizes)
            for name, value in (
                ("active", run.active), ("scores", h), ("weights", w), ("sizes", run.sizes),
            ):  # fmt: skip
                kept[name].append(value)
            run.H, run.active = after, goes_on
            if len(self.merge) and number + 1 < L and keys is not None:
                x = self._merge(run, x, keys, self.merge[number])
        logits = self.head(readout(run.features, max(T * N, 1)))
        if not return_trace:
            return logits
        return Trace(
            logits, torch.stack(kept["active"]), run.depth,
            (run.ponder / max(T * B * N, 1)).to(torch.float32), torch.stack(kept["scores"]),
            torch.stack(kept["weights"]), run.sizes, torch.stack(kept["sizes"]), run.source,
            {} if rates is None else rates.rates(),
        )  # fmt: skip

    def _sequential(
        self, x: Tensor, return_trace: bool, rates: FiringRates | None
    ) -> Tensor | Trace:
        """One timestep after the other; a halted token is gone from all that follows."""
        c = self.config
        L, (T, B, N, C) = c.depth, x.shape
        total = x.new_zeros((B, N), dtype=torch.float32)
        ran = torch.zeros((L, T, B, N), dtype=torch.bool, device=x.device)
        scores, weights = [], []  # of each cell, in the order they run
        features = x.new_zeros((B, N, C), dtype=torch.float64)
        ponder = x.new_zeros((), dtype=torch.float64)
        state: dict[str, Tensor] = {}
        training = [m for m in self.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
        try:
            # The statistics of one timestep's cells are not those of a batch.
            for bn in training:
                bn.eval()
            for t in range(T):
                y = x[t : t + 1]
                before = torch.zeros_like(total)
                for number, block in enumerate(self.block):
                    active = active_cells(total, c.eps, "sequential").unsqueeze(0)
                    ran[number, t] = active[0]
                    layout = TokenLayout.from_active_steps(active.sum(0), 1)
                    context = Context(layout, None, state, rates, f"block.{number}")
                    if layout.num_rows:
                        y, _ = block.forward_with_keys(y, context)
                    h = self._scores(y, active)[0]
                    scores.append(h)
                    total = total + h
                    goes_on = self._goes_on(total, active[0], last=number + 1 == L)
                    w, last = halting_weights(h, before, active[0], goes_on)
                    before = before + h
                    weights.append(w)
                    used = w if c.readout == "mean-field" else last.to(w.dtype)
                    features = features + used.double().unsqueeze(-1) * y[0].double()
                    ponder = ponder + ponder_block(number + 1, w, last)
        finally:
            for bn in training:
                bn.train()
        depth = ran.sum(0)
        timesteps = (depth > 0).sum(0).clamp(min=1)
        per_token = features / timesteps.double().unsqueeze(-1)
        logits = self.head(readout(per_token.sum(1), max(N, 1)))
        if not return_trace:
            return logits
        sizes = x.new_ones((B, N), dtype=torch.float32)
        all_scores, all_weights = (
            torch.stack(cells).view(T, L, B, N).transpose(0, 1) for cells in (scores, weights)
        )
        return Trace(
            logits, ran, depth, (ponder / max(T * B * N, 1)).to(torch.float32), all_scores,
            all_weights, sizes, sizes.expand(L, B, N),
            torch.arange(N, device=x.device).repeat(B, 1), {} if rates is None else rates.rates(),
        )  # fmt: skip

    def _scores(self, x: Tensor, active: Tensor) -> Tensor:
        """Scores ``[T, B, N]`` of the tokens after a block, zero where it did not run."""
        if self.halting is None:
            return x.new_zeros(x.shape[:-1], dtype=torch.float32)
        return self.halting(x) * active

    def _goes_on(self, H: Tensor, active: Tensor, last: bool) -> Tensor:
        if last:
            return torch.zeros_like(active)
        if self.halting is None:
            return active
        # A merged-away token stays away although its own accumulator says nothing of it.
        return active & active_cells(H, self.config.eps, self.config.halting or "depth")

    def _read(self, run: _Run, x: Tensor, w: Tensor, last: Tensor) -> None:
        """Add what this block gives to the readout."""
        if self.config.readout == "last":
            w = last.to(w.dtype)
        if self.halting is None and not bool(last.any()):
            return  # all weights are zero until the last block
        sizes = run.sizes if self.config.merging else None
        run.features = run.features + readout_block(x, w, sizes)

    def _merge(self, run: _Run, x: Tensor, keys: Tensor, merge: TokenMerge) -> Tensor:
        """Merge similar tokens at a block boundary: tokens, accumulators, sizes, source map."""
        plan = merge.plan(firing_counts(keys), run.active.sum(0))
        x = merge_tokens(x, plan, run.sizes)
        run.H = merge_tokens(run.H, plan, run.sizes, SCORE_BITS)
        run.sizes = merged_sizes(run.sizes, plan)
        run.active = run.active & ~plan.merged
        run.source = plan.target.gather(1, run.source)
        return x


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm of a model."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _initialise(module: nn.Module) -> None:
    """Spikformer's initialisation: truncated normal weights of std 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_model(name: str, **changes: Any) -> ATSpikformer:
    """A named model, e.g. ``create_model("spikformer_4_384", halting="rectangle")``.

    Parameters
    ----------
    name : str
        ``spikformer_L_D``; see ``atsnn.nn.config.MODELS``.
    **changes
        Values of :class:`SpikformerConfig` to change.
    """
    return ATSpikformer(model_config(name, **changes))
