"""For tests: the cases that judge a kernel, and exact models.

:func:`check` judges anyone's kernel by the cases that judge atsnn's own. Exact models lie on a
dyadic grid, where every backend gives the same bits.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .kit import Case, ConformanceError, Finding, Report, cases, check
from .nn.blocks import Context, _Attention
from .nn.config import SpikformerConfig
from .nn.model import ATSpikformer
from .nn.trace import Trace

__all__ = [
    "Case",
    "ConformanceError",
    "Finding",
    "Report",
    "cases",
    "check",
    "exact_images",
    "exact_model",
]

BN_EPS = 2.0**-10
IMAGE_BITS = 4  # images are multiples of 2^-4


def exact_images(
    config: SpikformerConfig, batch: int, seed: int = 0, T: int | None = None
) -> Tensor:
    """Random images on the grid, ``[B, C, H, W]`` (``[T, B, C, H, W]`` if ``T`` is given).

    Each is a smooth pattern under noise, so that its tokens differ as those of photographs do.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = (batch,) if T is None else (T, batch)
    shape = (*lead, config.in_channels, config.image_size, config.image_size)
    noise = torch.rand(shape, generator=generator)
    coarse = torch.rand((*lead, config.in_channels, 4, 4), generator=generator).flatten(0, -4)
    smooth = nn.functional.interpolate(coarse, shape[-2:], mode="bilinear").view(shape)
    return ((0.75 * smooth + 0.25 * noise) * 2**IMAGE_BITS).round() / 2**IMAGE_BITS


def exact_model(config: SpikformerConfig, seed: int = 0) -> ATSpikformer:
    """A model whose every sum is exact in float32, in evaluation mode.

    Weights, biases and BatchNorm constants are small multiples of powers of two, with
    ``eps = 2^-10`` and ``running_var = 4^k - eps``, so that sums come out the same in any order.
    BatchNorm and halting are calibrated on random images, so that layers fire (some 4 to 40 %)
    and tokens halt at different depths.

    Parameters
    ----------
    config : SpikformerConfig
    seed : int
        Chooses weights and calibration images.
    """
    generator = torch.Generator().manual_seed(seed)
    model = ATSpikformer(config.replace(bn_eps=BN_EPS)).eval()

    def grid(tensor: Tensor, low: int, high: int, bits: int) -> None:
        values = torch.randint(low, high + 1, tensor.shape, generator=generator)
        tensor.copy_(values / 2.0**bits)

    hooks = []
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                grid(module.weight, -2, 2, 3)
                if module.bias is not None:
                    grid(module.bias, -2, 2, 3)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                grid(module.bias, -2, 6, 3)
                hooks.append(module.register_forward_pre_hook(_calibrate))
        images = exact_images(config, 4, seed + 1)
        # One pass: each BatchNorm is set from its input before it runs, so the next ones see
        # what they will see. Halting and merging join afterwards.
        tokens = model.embed(images)
        for block in model.block:
            _enliven_attention(block.attn, tokens)
            tokens, _ = block.forward_with_keys(tokens, Context())
        for hook in hooks:
            hook.remove()
        if model.halting is not None:
            _spread_halting(model, images)
    return model


def _calibrate(bn: nn.Module, inputs: tuple[Tensor]) -> None:
    """Set running statistics near those of the input, on the grid."""
    bn = cast(nn.BatchNorm1d, bn)
    x = inputs[0].transpose(0, 1).flatten(1)
    power = torch.log2(x.std(1).clamp(2.0**-3, 2.0**5)).round()
    step = 2.0 ** (power - 3)
    bn.running_mean.copy_((x.mean(1) / step).round() * step)  # type: ignore[union-attr]
    bn.running_var.copy_(4.0**power - BN_EPS)  # type: ignore[union-attr]


def _enliven_attention(attention: _Attention, tokens: Tensor) -> None:
    """Shift the BatchNorm biases of q, k and v until the attention's LIF fires about 20 %."""
    norms = [getattr(attention, f"{name}_bn") for name in "qkv"]
    biases = [bn.bias.clone() for bn in norms]
    best, choice = float("inf"), 0.0
    for eighths in range(-6, 13):
        rates: dict[str, float] = {}
        for bn, bias in zip(norms, biases, strict=True):
            bn.bias.copy_(bias + eighths / 8)

        def record(name: str, s: Tensor, layout: object, rates: dict[str, float] = rates) -> None:
            rates[name] = float(s.mean())

        attention.forward_with_keys(tokens, Context(record=record))
        wanted = ("q_lif", "k_lif", "v_lif", "attn_lif")
        miss = sum(max(0.0, 0.05 - rates[n], rates[n] - 0.35) for n in wanted)
        miss += 0.1 * abs(rates["attn_lif"] - 0.2)
        if miss < best:
            best, choice = miss, eighths / 8
    for bn, bias in zip(norms, biases, strict=True):
        bn.bias.copy_(bias + choice)


def _spread_halting(model: ATSpikformer, images: Tensor) -> None:
    """Choose ``alpha`` and ``beta`` so that about 60 % of the cells run, at many depths."""
    halting = model.halting
    assert halting is not None
    if halting.weight is not None:
        halting.weight.copy_((torch.arange(len(halting.weight)) % 5 - 2) / 8)
    # Of the tokens after block 1: alpha makes their scores differ, beta sets how many run.
    tokens, _ = model.block[0].forward_with_keys(model.embed(images), Context())
    f = tokens[..., 0] if halting.score == "first" else tokens.mean(-1)
    halting.alpha.fill_(2.0 ** float(torch.log2(1 / f.std().clamp(2.0**-4, 4)).round()))
    centre = -round(float(halting.alpha * f.mean())) if halting.score in ("first", "mean") else 0
    best, choice = float("inf"), 0.0
    for quarters in range(-20, 5):
        halting.beta.fill_(centre + quarters / 4)
        trace = cast(Trace, model(images, return_trace=True))
        miss = abs(float(trace.active.double().mean()) - 0.6)
        if miss < best:
            best, choice = miss, centre + quarters / 4
    halting.beta.fill_(choice)
