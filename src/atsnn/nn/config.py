"""Configuration of an AT-Spikformer and the named models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import (
    InvalidType,
    InvalidValue,
    check_choice,
    check_integer,
    check_number,
)
from ..reference import ACCUMULATORS, MATCHES, READOUTS, SCORES, SURROGATES

STEMS = {"cifar": 4, "imagenet": 16}  # name: pixels a token is wide
POOLS = ("after_lif", "before_lif")
ATTENTIONS = ("ssa", "sdsa")
TASKS = ("classes", "pixels")


@dataclass(frozen=True)
class SpikformerConfig:
    """What an :class:`~atsnn.ATSpikformer` is made of.

    Attributes
    ----------
    image_size : int
        Height and width of the images in pixels; a multiple of the stem's patch (4 or 16).
    in_channels, num_classes : int
        Channels of the images, classes of the head.
    embed_dim, depth, num_heads, mlp_ratio
        Channels ``C``, blocks ``L``, heads, width of the MLP over ``C``.
    T : int
        Timesteps a still image is shown for.
    stem : {"cifar", "imagenet"}
        Spikformer's patch embedding with pooling after the last two or after all four
        convolutions.
    pool : {"after_lif", "before_lif"}
        Max-pooling of spikes (Spikformer's code) or of potentials (SpikingJelly's model).
    attention : {"ssa", "sdsa"}
        Spiking self-attention or spike-driven self-attention.
    attn_scale, attn_threshold : float
        Scale of the spiking attention and threshold of the LIF after it.
    bias : bool
        Whether the linear layers of the blocks have a bias (Spikformer for CIFAR has).
    bn_eps : float
        ``eps`` of every BatchNorm.
    tau, surrogate, alpha
        Of every LIF: time constant, surrogate derivative and its steepness.
    halting : {"rectangle", "depth", "sequential"} or None
        Accumulator of the halting scores; ``None`` is the plain Spikformer.
    readout : {"mean-field", "last"}
    score : {"first", "mean", "linear", "constant"}
        What the halting score is computed from.
    eps : float
        A token is active while its accumulator is below ``1 - eps``.
    merge_r : int or tuple of int
        Pairs of tokens that merge at each (or at every) block boundary.
    merge_threshold : float, optional
        Merge every pair whose similarity, in -1 .. 1, exceeds it, instead of ``merge_r``.
    merge_match : {"similar", "random"}
        How partners are found; ``random`` is a control.
    merge_sizes : bool
        Whether merged tokens weigh by their size in the attention.
    task : {"classes", "pixels"}
        Whether the head gives the class of an image or of each of its pixels.
    """

    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 10
    embed_dim: int = 384
    depth: int = 4
    num_heads: int = 12
    mlp_ratio: float = 4.0
    T: int = 4
    stem: str = "cifar"
    pool: str = "after_lif"
    attention: str = "ssa"
    attn_scale: float = 0.125
    attn_threshold: float = 0.5
    bias: bool = True
    bn_eps: float = 1e-5
    tau: float = 2.0
    surrogate: str = "sigmoid"
    alpha: float | None = None
    halting: str | None = None
    readout: str = "mean-field"
    score: str = "first"
    eps: float = 0.01
    merge_r: int | tuple[int, ...] = 0
    merge_threshold: float | None = None
    merge_match: str = "similar"
    merge_sizes: bool = True
    task: str = "classes"

    def __post_init__(self) -> None:
        op = "SpikformerConfig"
        # The upper bounds are far beyond any use; they keep a damaged file from building for ever.
        for name in ("in_channels", "num_classes", "depth", "num_heads", "T"):
            check_integer(
                op,
                name,
                getattr(self, name),
                at_least=1,
                at_most=1000 if name == "depth" else 2**20,
            )
        for name, values in (
            ("stem", STEMS), ("pool", POOLS), ("attention", ATTENTIONS), ("readout", READOUTS),
            ("score", SCORES), ("merge_match", MATCHES), ("surrogate", SURROGATES), ("task", TASKS),
            ("halting", (None, *ACCUMULATORS)), ("bias", (True, False)),
            ("merge_sizes", (True, False)),
        ):  # fmt: skip
            check_choice(op, name, getattr(self, name), values)
        check_integer(op, "image_size", self.image_size, at_least=self.patch)
        if self.image_size % self.patch:
            raise InvalidValue(
                f"{op}: image_size must be a multiple of {self.patch} for stem={self.stem!r}, "
                f"got {self.image_size}"
            )
        check_integer(op, "embed_dim", self.embed_dim, at_least=8)
        for name, divisor in (("num_heads", self.num_heads), ("8, for the stem,", 8)):
            if self.embed_dim % divisor:
                raise InvalidValue(
                    f"{op}: embed_dim must be a multiple of {name} {divisor}, got {self.embed_dim}"
                )
        check_number(op, "mlp_ratio", self.mlp_ratio, above=0)
        check_number(op, "attn_scale", self.attn_scale, above=0)
        check_number(op, "attn_threshold", self.attn_threshold, above=0)
        if int(self.embed_dim * self.mlp_ratio) < 1:
            raise InvalidValue(
                f"{op}: the MLP must have a hidden channel, got embed_dim * mlp_ratio = "
                f"{self.embed_dim} * {self.mlp_ratio}"
            )
        check_number(op, "bn_eps", self.bn_eps, above=0)
        check_number(op, "tau", self.tau, above=1)
        check_number(op, "eps", self.eps, above=0, below=1)
        if self.alpha is not None:
            check_number(op, "alpha", self.alpha, above=0)
        if isinstance(self.merge_r, list):
            object.__setattr__(self, "merge_r", tuple(self.merge_r))
        if isinstance(self.merge_r, tuple):
            if len(self.merge_r) != self.depth - 1:
                raise InvalidValue(
                    f"{op}: merge_r must name depth - 1 = {self.depth - 1} block boundaries, "
                    f"got {len(self.merge_r)}"
                )
            for r in self.merge_r:
                check_integer(op, "merge_r", r, at_least=0)
        else:
            check_integer(op, "merge_r", self.merge_r, at_least=0)
        if self.merge_threshold is not None:
            check_number(op, "merge_threshold", self.merge_threshold, at_least=-1, at_most=1)
            if any(self.merges):
                raise InvalidValue(
                    f"{op}: at most one of merge_r and merge_threshold may be given, "
                    f"got {self.merge_r} and {self.merge_threshold}"
                )
        if self.halting == "sequential" and self.merging:
            raise InvalidValue(
                f"{op}: halting='sequential' cannot merge tokens, whose lifetimes it does not "
                "know at a block boundary; expected merge_r=0 and merge_threshold=None, "
                f"got {self.merge_r} and {self.merge_threshold}"
            )

    @property
    def patch(self) -> int:
        """Pixels a token is wide and high."""
        return STEMS[self.stem]

    @property
    def grid(self) -> int:
        """Tokens along a side of the image."""
        return self.image_size // self.patch

    @property
    def outputs(self) -> int:
        """Numbers the head gives: an image's classes, or those of a token's pixels."""
        return self.num_classes * (self.patch**2 if self.task == "pixels" else 1)

    @property
    def merges(self) -> tuple[int, ...]:
        """``merge_r`` of each of the ``depth - 1`` block boundaries."""
        if isinstance(self.merge_r, tuple):
            return self.merge_r
        return (self.merge_r,) * (self.depth - 1)

    @property
    def merging(self) -> bool:
        return any(self.merges) or self.merge_threshold is not None

    @property
    def adaptive(self) -> bool:
        """Whether tokens can halt or merge; otherwise the model is plain Spikformer."""
        return self.halting is not None or self.merging

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpikformerConfig:
        """Build from a mapping; an unknown name is an error."""
        if not isinstance(values, Mapping):
            raise InvalidType(
                f"SpikformerConfig: expected a mapping of names to values, "
                f"got {type(values).__name__}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidValue(
                f"SpikformerConfig: expected names among {', '.join(sorted(known))}; "
                f"got {', '.join(map(str, unknown))}"
            )
        return cls(**values)

    def replace(self, **changes: Any) -> SpikformerConfig:
        """A copy with some values changed."""
        return self.from_dict({**self.to_dict(), **changes})


def _cifar(dim: int, depth: int) -> SpikformerConfig:
    return SpikformerConfig(embed_dim=dim, depth=depth, num_heads=12 if dim == 384 else 8)


def _imagenet(dim: int, depth: int, heads: int) -> SpikformerConfig:
    return SpikformerConfig(
        image_size=224, num_classes=1000, embed_dim=dim, depth=depth, num_heads=heads,
        stem="imagenet", bias=False,
    )  # fmt: skip


# Spikformer-L-D of the paper (arXiv 2209.15425, tables 1 and 3): L blocks, D channels.
MODELS: dict[str, SpikformerConfig] = {
    "spikformer_2_384": _cifar(384, 2),
    "spikformer_4_256": _cifar(256, 4),
    "spikformer_4_384": _cifar(384, 4),
    "spikformer_6_512": _imagenet(512, 6, 8),
    "spikformer_8_384": _imagenet(384, 8, 8),
    "spikformer_8_512": _imagenet(512, 8, 8),
    "spikformer_8_768": _imagenet(768, 8, 8),
    "spikformer_10_512": _imagenet(512, 10, 8),
}


def model_config(name: str, **changes: Any) -> SpikformerConfig:
    """The configuration of a named model, with some values changed."""
    check_choice("create_model", "name", name, MODELS)
    return MODELS[name].replace(**changes)
