"""SpikingJelly 2.0 as the outside judge: its neuron, behind our signature, and its Spikformer."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.model.spikformer import Spikformer
from torch import Tensor, nn

import atsnn

SURROGATES = {
    "sigmoid": surrogate.Sigmoid,
    "atan": surrogate.ATan,
    "piecewise_quadratic": surrogate.PiecewiseQuadratic,
    "piecewise_exp": surrogate.PiecewiseExp,
    "soft_sign": surrogate.SoftSign,
    "super_spike": surrogate.SuperSpike,
    "erf": surrogate.Erf,
}


def neuron(
    x: Tensor,
    v: Tensor | None = None,
    *,
    kind: str = "lif",
    tau: float = 2.0,
    w: Tensor | None = None,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Spikes and final membrane; a PLIF is given by ``w``, where ``inv_tau = sigmoid(w)``."""
    if v is None:
        v = torch.full_like(x[0], 0.0 if v_reset is None else v_reset)
    make = SURROGATES[surrogate]
    derivative = make() if alpha is None else make(alpha=alpha)
    last = (v_threshold, v_reset, derivative, detach_reset, False)
    if kind == "lif":
        return functional.lif_multi_step(x, v, tau, decay_input, *last)[:2]
    if kind == "if":
        return functional.if_multi_step(x, v, *last)[:2]
    return functional.plif_multi_step(x, v, w, decay_input, *last)[:2]


def carry_over(ours: atsnn.ATSpikformer, theirs: Spikformer) -> None:
    """Our weights into SpikingJelly's model, whose q, k and v are one convolution."""

    def linear(target: nn.Module, *sources: nn.Module) -> None:
        target.weight.copy_(torch.cat([s.weight for s in sources]).view_as(target.weight))
        assert all(s.bias is None for s in sources)

    def norm(target: nn.Module, *sources: nn.Module) -> None:
        target.eps = sources[0].eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(target, name).copy_(torch.cat([getattr(s, name) for s in sources]))

    with torch.no_grad():
        stem = ours.patch_embed
        for number, stage in enumerate(theirs.patch_embed.stages):
            suffix = str(number) if number else ""
            stage.conv_bn.block[0].weight.copy_(getattr(stem, f"proj_conv{suffix}").weight)
            norm(stage.conv_bn.block[1], getattr(stem, f"proj_bn{suffix}"))
        position = theirs.patch_embed.positional_encoding.conv_bn.block
        position[0].weight.copy_(stem.rpe_conv.weight)
        norm(position[1], stem.rpe_bn)
        for block, other in zip(ours.block, theirs.blocks, strict=True):
            a, b = block.attn, other.attn
            linear(b.qkv_conv_bn[0], a.q_linear, a.k_linear, a.v_linear)
            norm(b.qkv_conv_bn[1], a.q_bn, a.k_bn, a.v_bn)
            linear(b.proj_conv_bn[0], a.proj_linear)
            norm(b.proj_conv_bn[1], a.proj_bn)
            b.attn_lif.v_threshold = a.attn_lif.v_threshold
            for name in ("fc1", "fc2"):
                linear(getattr(other.mlp, name)[0], getattr(block.mlp, f"{name}_linear"))
                norm(getattr(other.mlp, name)[1], getattr(block.mlp, f"{name}_bn"))
        theirs.head.weight.copy_(ours.head.weight)
        theirs.head.bias.copy_(ours.head.bias)
