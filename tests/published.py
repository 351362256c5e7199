"""The published Spikformer, ZK-Zhou/spikformer: its names and shapes, and its forward from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import judge
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as nnf


def published(variant, dim=32, depth=2, classes=5, channels=2, hidden=None, dtype=torch.float32):
    """A state dict with the names and shapes of ZK-Zhou/spikformer and values of no meaning."""
    hidden = hidden or 4 * dim
    generator = torch.Generator().manual_seed(dim + depth)
    state = OrderedDict()

    def put(name, *shape):
        state[name] = torch.randn(shape, generator=generator).to(dtype)

    def norm(name, width):
        for part in ("weight", "bias", "running_mean"):
            put(f"{name}.{part}", width)
        state[f"{name}.running_var"] = torch.rand(width, generator=generator).to(dtype)
        state[f"{name}.num_batches_tracked"] = torch.randint(2**40, (), generator=generator)

    widths = (channels, dim // 8, dim // 4, dim // 2, dim)
    for number, suffix in enumerate(("", "1", "2", "3")):
        put(f"patch_embed.proj_conv{suffix}.weight", widths[number + 1], widths[number], 3, 3)
        norm(f"patch_embed.proj_bn{suffix}", widths[number + 1])
    put("patch_embed.rpe_conv.weight", dim, dim, 3, 3)
    norm("patch_embed.rpe_bn", dim)
    cifar = variant == "cifar"
    kind = "linear" if cifar else "conv"
    for number in range(depth):
        block = f"block.{number}"
        state[f"{block}.norm1.weight"] = torch.ones(dim, dtype=dtype)
        state[f"{block}.norm1.bias"] = torch.zeros(dim, dtype=dtype)
        for name in ("q", "k", "v", "proj"):
            put(f"{block}.attn.{name}_{kind}.weight", dim, dim, *([] if cifar else [1]))
            if cifar or name == "proj":
                put(f"{block}.attn.{name}_{kind}.bias", dim)
            norm(f"{block}.attn.{name}_bn", dim)
        state[f"{block}.norm2.weight"] = torch.ones(dim, dtype=dtype)
        state[f"{block}.norm2.bias"] = torch.zeros(dim, dtype=dtype)
        for name, after, before in (("fc1", hidden, dim), ("fc2", dim, hidden)):
            put(f"{block}.mlp.{name}_{kind}.weight", after, before, *([] if cifar else [1, 1]))
            put(f"{block}.mlp.{name}_{kind}.bias", after)
            norm(f"{block}.mlp.{name}_bn", after)
    put("head.weight", classes, dim)
    put("head.bias", classes)
    return state


def published_logits(state, images, T, heads, stem, eps):
    """The published network, from its state dict alone, with SpikingJelly's neuron."""

    def fire(name, x, v_threshold=1.0):
        return judge.neuron(x, v_threshold=v_threshold)[0]

    def norm(name, x):
        parts = ("running_mean", "running_var", "weight", "bias")
        return nnf.batch_norm(x, *(state[f"{name}.{part}"] for part in parts), eps=eps)

    def conv(name, x):
        y = nnf.conv2d(
            x.flatten(0, 1), state[f"patch_embed.{name[0]}_conv{name[1]}.weight"], padding=1
        )
        return norm(f"patch_embed.{name[0]}_bn{name[1]}", y).unflatten(0, x.shape[:2])

    def linear(name, x):
        found = [n for n in state if n.startswith((f"{name}_linear.", f"{name}_conv."))]
        weight, *bias = (state[n] for n in found)
        y = nnf.linear(x, weight.flatten(1), *bias)
        return norm(f"{name}_bn", y.flatten(0, 2)).view_as(y)

    x = images.expand(T, *images.shape)
    for number, suffix in enumerate(("", "1", "2", "3")):
        x = fire(None, conv(("proj", suffix), x))
        if stem == "imagenet" or number >= 2:
            x = nnf.max_pool2d(x.flatten(0, 1), 3, 2, 1).unflatten(0, x.shape[:2])
    x = x + fire(None, conv(("rpe", ""), x))
    x = x.flatten(3).transpose(2, 3)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("block."))
    for block in (f"block.{number}" for number in range(depth)):
        q, k, v = (
            fire(None, linear(f"{block}.attn.{name}", x)).unflatten(3, (heads, -1)).transpose(2, 3)
            for name in "qkv"
        )
        y = fire(None, (q @ k.mT @ v * 0.125).transpose(2, 3).flatten(3), 0.5)
        x = x + fire(None, linear(f"{block}.attn.proj", y))
        y = fire(None, linear(f"{block}.mlp.fc1", x))
        x = x + fire(None, linear(f"{block}.mlp.fc2", y))
    return nnf.linear(x.double().mean((0, 2)).float(), state["head.weight"], state["head.bias"])


def save_plain(state: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def save_old(state: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def save_safe(state: Mapping[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"
