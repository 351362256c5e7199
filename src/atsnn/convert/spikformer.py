"""The published Spikformer: the names and shapes of ZK-Zhou/spikformer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    AtsnnError,
    CheckpointError,
    InvalidType,
    InvalidValue,
    check_choice,
    shape_of,
)
from ..nn.config import MODELS, STEMS, SpikformerConfig
from ..nn.model import ATSpikformer
from .common import build, check_fixed, check_plain, fold_biases, plain, ratio_of
from .reading import check_tensors, check_values, few, read, unwrap

IMAGE_SIZES = {"cifar": 32, "imagenet": 224}
NORMS = {"norm1": "attn.q_linear.weight", "norm2": "mlp.fc1_linear.weight"}  # and what follows them


def from_spikformer(
    source: Mapping[str, Any] | str | Path,
    *,
    num_heads: int | None = None,
    pool: str = "after_lif",
    **overrides: Any,
) -> ATSpikformer:
    """A model with the weights of a checkpoint of ZK-Zhou/spikformer: on the CPU, in eval mode.

    Channels, blocks, classes, the width of the MLP and the stem are read from names and shapes:
    ``attn.q_linear`` is the code for CIFAR, ``attn.q_conv`` that for ImageNet, whose queries, keys
    and values have no bias (here they get one of zeros).

    Parameters
    ----------
    source : mapping, str or Path
        A state dict, or a file of one: ``.safetensors``, or ``.pth``, ``.pt`` or ``.pth.tar``,
        which is read without running code in it. It may be wrapped, as training scripts save it;
        of several the first of ``"state_dict"``, ``"model"``, ``"state_dict_ema"``,
        ``"model_ema"`` is taken (for another one, pass it). A prefix ``module.`` is taken off.
        Floating-point tensors have one dtype, which becomes the model's.
    num_heads : int, optional
        Heads, which no shape shows; required for sizes that :func:`~atsnn.create_model` has no
        name for (of those CIFAR's 2-384 and 4-384 have 12, all others 8).
    pool : {"after_lif", "before_lif"}
        What the stem pools; the published code pools spikes.
    **overrides
        Further values of :class:`~atsnn.SpikformerConfig`: ``image_size`` (by default 32 for
        CIFAR, 224 for ImageNet), ``T`` (4), ``halting``, ``merge_r``, ... Halting starts untrained.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or would run code, or if names, shapes, dtypes or values
        are not those of a Spikformer; before anything is built of the size that it claims.
    InvalidValue
        If ``num_heads`` is needed or does not fit, or an override contradicts the weights.
    """
    op = "from_spikformer"
    where, found = op, source
    if isinstance(source, str | Path):
        where = f"{op}: {source}"
        found = read(where, Path(source))
    elif not isinstance(source, Mapping):
        raise InvalidType(f"{op}: expected a state dict or a path, got {type(source).__name__}")
    tensors = unwrap(where, found)
    dtype = check_tensors(where, tensors)
    config, variant = _infer(where, tensors)
    check_fixed(op, config, overrides)
    heads = _heads(op, config) if num_heads is None else num_heads
    config = config.replace(num_heads=heads, pool=pool, **overrides)
    return build(config, _our_tensors(where, tensors, config, variant), dtype).eval()


def to_spikformer(
    model: ATSpikformer, *, variant: str | None = None, drop_halting: bool = False
) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of ZK-Zhou/spikformer, as copies on the CPU.

    Only weights are in it: ``T``, heads, pooling, thresholds and so on are arguments or constants
    of the code that loads it. That code never uses its LayerNorms; they are written as it
    initialises them.

    Parameters
    ----------
    model : ATSpikformer
    variant : {"cifar", "imagenet"}, optional
        Names and shapes of linear layers or of convolutions; by default those of the stem. For
        ``"imagenet"`` biases of queries, keys and values go into the mean of their BatchNorm.
    drop_halting : bool
        Whether to leave halting and merging out, which that code does not have: its numbers are
        those of ``model.without_halting()``.

    Raises
    ------
    InvalidValue
        If tokens halt or merge and ``drop_halting`` is not set, or if the attention is another.
    """
    op = "to_spikformer"
    check_plain(op, model, drop_halting)
    variant = model.config.stem if variant is None else variant
    check_choice(op, "variant", variant, STEMS)
    config = model.config.replace(bias=True)
    entries = list(_entries(config, variant))
    ours = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    ours = fold_biases(ours, [e.ours.removesuffix(".bias") for e in entries if e.theirs is None])
    dtype, state = model.head.weight.dtype, {}
    for entry in entries:
        for norm, follows in NORMS.items():
            if entry.ours.endswith(follows):
                name = entry.ours.removesuffix(follows) + norm
                state[f"{name}.weight"] = torch.ones(config.embed_dim, dtype=dtype)
                state[f"{name}.bias"] = torch.zeros(config.embed_dim, dtype=dtype)
        if entry.theirs is not None:
            tensor = ours.get(entry.ours)
            tensor = torch.zeros(entry.shape, dtype=dtype) if tensor is None else tensor.clone()
            state[entry.theirs] = tensor.reshape(entry.their_shape)
    return state


class _Entry(NamedTuple):
    """One of our tensors and what it is in the published code; ``theirs`` None: it has none."""

    ours: str
    theirs: str | None
    shape: tuple[int, ...]
    their_shape: tuple[int, ...]


def _entries(config: SpikformerConfig, variant: str) -> Iterator[_Entry]:
    with torch.device("meta"):
        model = ATSpikformer(plain(config))
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        found = re.fullmatch(r"(block\.[0-9]+\.(attn|mlp)\.\w+)_linear\.(weight|bias)", name)
        if variant == "cifar" or found is None:
            yield _Entry(name, name, shape, shape)
        elif re.search(r"\.[qkv]_linear\.bias$", name):
            yield _Entry(name, None, shape, ())
        else:
            # A linear layer as a convolution of one pixel: Conv1d in the attention, else Conv2d.
            ones = {"attn": (1,), "mlp": (1, 1)}[found[2]] if found[3] == "weight" else ()
            yield _Entry(name, f"{found[1]}_conv.{found[3]}", shape, shape + ones)


def _infer(where: str, tensors: dict[str, Tensor]) -> tuple[SpikformerConfig, str]:
    """What names and shapes say, with one head and other defaults; and whose names they are."""
    kinds = {"cifar": "linear", "imagenet": "conv"}
    variants = [v for v, kind in kinds.items() if f"block.0.attn.q_{kind}.weight" in tensors]
    if len(variants) != 1:
        raise CheckpointError(
            f"{where}: expected either block.0.attn.q_linear.weight (CIFAR) or "
            f"block.0.attn.q_conv.weight (ImageNet), got {'both' if variants else 'neither'} "
            f"among {len(tensors)} names {few(tensors)}"
        )
    variant = variants[0]
    fc1 = f"block.0.mlp.fc1_{kinds[variant]}.weight"
    dim = _size(where, tensors, "patch_embed.rpe_bn.weight", 1, 0)
    hidden = _size(where, tensors, fc1, 2 if variant == "cifar" else 4, 0)
    try:
        config = SpikformerConfig(
            image_size=IMAGE_SIZES[variant], stem=variant, num_heads=1, embed_dim=dim,
            in_channels=_size(where, tensors, "patch_embed.proj_conv.weight", 4, 1),
            num_classes=_size(where, tensors, "head.weight", 2, 0),
            depth=_depth(where, tensors), mlp_ratio=ratio_of(hidden, dim),
        )  # fmt: skip
    except CheckpointError:
        raise
    except AtsnnError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config, variant


def _size(where: str, tensors: dict[str, Tensor], name: str, dims: int, at: int) -> int:
    if name not in tensors:
        raise CheckpointError(
            f"{where}: expected a tensor {name}, got none among {len(tensors)} {few(tensors)}"
        )
    if tensors[name].dim() != dims:
        raise CheckpointError(
            f"{where}: {name} must have {dims} dimensions, got shape {shape_of(tensors[name])}"
        )
    return tensors[name].shape[at]


def _depth(where: str, tensors: dict[str, Tensor]) -> int:
    found = (re.match(r"block\.([0-9]{1,6})\.", name) for name in tensors)
    numbers = sorted({int(match[1]) for match in found if match})
    if numbers != list(range(len(numbers))):
        gap = next(n for n, number in enumerate(numbers) if n != number)
        raise CheckpointError(
            f"{where}: expected blocks numbered from 0 without gaps, got block {numbers[gap]} "
            f"but no block {gap}"
        )
    return len(numbers)


def _heads(op: str, config: SpikformerConfig) -> int:
    for known in MODELS.values():
        if (known.stem, known.embed_dim, known.depth) == (
            config.stem, config.embed_dim, config.depth,
        ):  # fmt: skip
            return known.num_heads
    raise InvalidValue(
        f"{op}: num_heads must be given for a {config.stem} Spikformer-{config.depth}-"
        f"{config.embed_dim}, as no shape shows it and no published model has this size; got None"
    )


def _our_tensors(
    where: str, tensors: dict[str, Tensor], config: SpikformerConfig, variant: str
) -> dict[str, Tensor]:
    """The tensors under our names; names, shapes and values are checked."""
    entries = list(_entries(config, variant))
    want = {entry.theirs: entry.their_shape for entry in entries if entry.theirs is not None}
    unused = {
        f"block.{number}.{norm}.{part}": (config.embed_dim,)
        for number in range(config.depth) for norm in NORMS for part in ("weight", "bias")
    }  # fmt: skip
    missing = [name for name in want if name not in tensors]
    foreign = [name for name in tensors if name not in want and name not in unused]
    if missing or foreign:
        raise CheckpointError(
            f"{where}: expected the {len(want)} tensors of a {variant} Spikformer-{config.depth}-"
            f"{config.embed_dim}, got {len(missing)} missing {few(missing)} and {len(foreign)} "
            f"foreign {few(foreign)}"
        )
    for name, tensor in tensors.items():
        shape = want[name] if name in want else unused[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{where}: {name} must have shape {shape_of(shape)}, got {shape_of(tensor)}"
            )
    for name, tensor in tensors.items():
        check_values(where, name, tensor)
    return {
        entry.ours: torch.zeros(entry.shape) if entry.theirs is None
        else tensors[entry.theirs].reshape(entry.shape)
        for entry in entries
    }  # fmt: skip
