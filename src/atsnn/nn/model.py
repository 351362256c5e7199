"""AT-Spikformer: Spikformer whose tokens halt over blocks and timesteps, and merge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor, nn

from ..checks import (
    BackendError,
    InvalidType,
    InvalidValue,
    certain,
    check_choice,
    check_finite,
    shape_of,
)
from ..ops import resolve_backend
from ..reference import readout
from .blocks import MLP, Context, SpikeDrivenSelfAttention, SpikformerBlock, SpikingSelfAttention
from .config import SpikformerConfig, model_config
from .execution import RUNS, MaskedRun, PackedRun, PaddedRun
from .halting import Halting
from .merging import TokenMerge
from .sequential import run_sequential
from .stem import SpikingPatchSplitting
from .trace import FiringRates, Trace


class Head(nn.Linear):
    """A linear layer that adds in float64 and rounds once.

    The readout has up to 24 significant bits, so float32 sums would depend on the order of
    addition, which the matrix product chooses by the size of the batch. So an image's logits do
    not depend on the images beside it.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        return nn.functional.linear(x.double(), self.weight.double(), bias).to(self.weight.dtype)


class ATSpikformer(
    nn.Module,
    ModelHubMixin,
    library_name="atsnn",
    paper_url="https://arxiv.org/abs/2408.12293",
    tags=["spiking-neural-network", "vision-transformer"],
):
    """Spikformer with adaptive tokens.

    Parameters
    ----------
    config : SpikformerConfig

    Notes
    -----
    ``execution`` says how halted cells are treated: ``"packed"`` (the default) computes the rows
    of active cells only, ``"masked"`` every cell, and zeroes the halted ones; ``"padded"`` is
    packed in buffers of a fixed size, so that a GPU need not be waited for (inference, on Triton's
    kernels). The numbers are the same.
    """

    def __init__(self, config: SpikformerConfig) -> None:
        super().__init__()
        if not isinstance(config, SpikformerConfig):
            raise InvalidType(
                f"ATSpikformer: config must be a SpikformerConfig, got {type(config).__name__}"
            )
        self.config = config
        self.extra: dict[str, Any] | None = None  # what its checkpoint says of its training
        self._execution = "packed"
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
        self.head = Head(dim, config.outputs)
        self.halting: Halting | None = None
        if config.halting is not None:
            self.halting = Halting(
                dim, config.score, config.eps, config.halting, depth=config.depth, T=config.T
            )
        self.merge: Any = token_merges(config)
        for norm in batch_norms(self):
            norm.eps = config.bn_eps
        self.apply(_initialise)

    # -- execution --------------------------------------------------------------------------------

    @property
    def execution(self) -> str:
        """``"packed"``: halted cells do not exist; ``"masked"``: they are computed and zeroed;
        ``"padded"``: packed in buffers of a fixed size."""
        return self._execution

    @execution.setter
    def execution(self, value: str) -> None:
        op = "ATSpikformer"
        check_choice(op, "execution", value, RUNS)
        if value == "padded" and self.config.halting == "sequential":
            raise InvalidValue(
                f"{op}: execution='padded' runs all timesteps of a block at once, "
                "got halting='sequential'"
            )
        if value == "padded" and self.config.task == "pixels":
            raise InvalidValue(
                f"{op}: execution='padded' gives the class of an image, got task='pixels'"
            )
        self._execution = value

    def without_halting(self) -> ATSpikformer:
        """The plain Spikformer with the same weights: nothing halts, nothing merges."""
        plain = copy.copy(self)
        # A shallow copy shares the parameters; what is removed must not be removed here too.
        plain._modules = dict(self._modules)
        plain.config = self.config.replace(halting=None, merge_r=0, merge_threshold=None)
        plain.halting = None
        plain.merge = nn.ModuleList().train(self.training)
        return plain

    # -- checkpoints ------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]
        self, folder: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None,
        config: object = None, model_card_kwargs: dict[str, Any] | None = None, **hub: Any,
    ) -> Path:  # fmt: skip
        """Write the weights (safetensors), the configuration (JSON) and a model card to ``folder``.

        A card that is there already is kept.

        Parameters
        ----------
        folder : path
        push_to_hub : bool
            Whether to upload it to the Hugging Face hub too, as ``repo_id`` (default: the folder's
            name) and with options of ``push_to_hub``. ``config`` and ``model_card_kwargs`` are
            the hub's interface; the configuration is the model's own.
        """
        from ..checkpoint import save_pretrained

        path = save_pretrained(self, folder, self.extra)
        if push_to_hub:
            self.push_to_hub(repo_id or path.name, **hub)
        return path

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> ATSpikformer:  # type: ignore[override]
        """:func:`atsnn.from_pretrained`, with the hub's options such as ``revision``."""
        from ..checkpoint import from_pretrained

        return from_pretrained(name, **hub)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that ``save_pretrained`` writes."""
        from ..card import model_card

        return ModelCard(model_card(self.config, self.extra))

    def train(self, mode: bool = True) -> ATSpikformer:
        """Set the mode; weights that were folded for inference are made again."""
        for module in self.modules():
            module.__dict__.pop("_folded", None)
        return super().train(mode)

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
            ``[B, num_classes]`` logits; ``[B, num_classes, H, W]`` with ``task="pixels"``.
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
            return run_sequential(self, x, return_trace, rates)
        return self._parallel(x, return_trace, rates)

    def _images(self, x: Tensor) -> Tensor:
        op = "ATSpikformer"
        check_images(op, self.config, x)
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
        check_finite(op, "images", x)
        return x

    def _parallel(self, x: Tensor, return_trace: bool, rates: FiringRates | None) -> Tensor | Trace:
        """All timesteps of a block at once: the rectangle and the depth accumulator, or none."""
        c = self.config
        T, B, N, _ = x.shape
        # Where nothing halts or merges there is nothing to leave out.
        kind = RUNS[self._execution] if c.adaptive else MaskedRun
        if kind is PaddedRun:
            self._check_padded(x, return_trace)
        run = kind(c, x, return_trace)
        for number, block in enumerate(self.block):
            keys = None
            if not certain(run.layout.num_rows == 0):
                run.x, keys = block.forward_with_keys(run.x, run.context(number, rates))
            run.finish_block(number, self._scores(number, run))
            if number + 1 < c.depth:
                plan = None
                if len(self.merge) and keys is not None:
                    counts = run.firing_counts(keys)
                    plan = self.merge[number].plan(counts, run.steps)
                run.advance(plan)
        logits = self.classify(run.features, T, N)
        if run.kept is None:
            return logits
        kept = run.kept
        return Trace(
            logits, torch.stack(kept.active), run.depth,
            (run.ponder / max(T * B * N, 1)).to(torch.float32), torch.stack(kept.scores),
            torch.stack(kept.weights), run.sizes, torch.stack(kept.sizes), run.source,
            {} if rates is None else rates.rates(),
        )  # fmt: skip

    def classify(self, features: Tensor, T: int, N: int) -> Tensor:
        """Logits from the readout summed over ``T`` timesteps and, of an image, ``N`` tokens."""
        c = self.config
        if c.task == "classes":
            return self.head(readout(features, max(T * N, 1)))
        return maps_of_tokens(c, self.head(readout(features, max(T, 1))))

    def _check_padded(self, x: Tensor, return_trace: bool) -> None:
        op = "ATSpikformer"
        if self.training or return_trace:
            raise InvalidValue(
                f"{op}: execution='padded' is for inference without a trace, got "
                f"{'a model in training' if self.training else 'return_trace=True'}"
            )
        if resolve_backend(op, "auto", x.device) is not torch.ops.atsnn_triton:
            raise BackendError(
                f"{op}: execution='padded' needs Triton's kernels, got tokens on {x.device} "
                "without backend 'triton'"
            )
        if torch.is_grad_enabled():
            raise InvalidValue(
                f"{op}: execution='padded' has no gradient; expected a call under "
                "torch.no_grad(), got one with gradients enabled"
            )

    def _scores(self, number: int, run: PackedRun) -> Tensor | None:
        """Scores ``[R]`` of the active cells after block ``number``."""
        return None if self.halting is None else run.rows(self.halting(run.x))


def maps_of_tokens(config: SpikformerConfig, tokens: Tensor) -> Tensor:
    """Logits ``[B, num_classes, H, W]`` from those of the pixels of each token's patch.

    ``tokens [B, N, num_classes * patch**2]``.
    """
    maps = tokens.transpose(1, 2).unflatten(2, (config.grid, config.grid))
    return nn.functional.pixel_shuffle(maps, config.patch)


def check_images(op: str, config: SpikformerConfig, x: Tensor) -> None:
    """Check the shape of still images or video for a model of this configuration."""
    if not isinstance(x, Tensor):
        raise InvalidType(f"{op}: images must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise InvalidType(f"{op}: images must be a dense tensor, got layout {x.layout}")
    want = (config.in_channels, config.image_size, config.image_size)
    if x.dim() not in (4, 5) or tuple(x.shape[-3:]) != want:
        raise InvalidValue(
            f"{op}: images must have shape [B, C, H, W] or [T, B, C, H, W] with "
            f"(C, H, W) = {want}, got {shape_of(x)}"
        )
    if x.dim() == 5 and x.shape[0] == 0:
        raise InvalidValue(f"{op}: images must have T >= 1 timesteps, got T = 0")


def token_merges(config: SpikformerConfig) -> nn.ModuleList:
    """What merges tokens at each block boundary; empty where nothing does."""
    threshold = config.merge_threshold
    return nn.ModuleList(
        TokenMerge(r=r if threshold is None else None, threshold=threshold,
                   match=config.merge_match)
        for r in (config.merges if config.merging else ())
    )  # fmt: skip


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every BatchNorm of a model."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in.

    Random matching draws the same pairs whenever a model is evaluated, and the caller's generators
    do not notice.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            torch.default_generator.manual_seed(0)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(0)
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
