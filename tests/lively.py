"""SpikingJelly's models, made to fire: an untrained one is silent, and silences prove nothing."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from unittest.mock import patch

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import (
    parametric_lif_net,
    spike_driven_transformer,
    spikformer,
)
from torch import Tensor, nn


def import_vgg() -> ModuleType:
    """SpikingJelly's VGG, whose module wants torchvision for nothing but a download."""
    download = ModuleType("torchvision._internally_replaced_utils")
    download.load_state_dict_from_url = torch.hub.load_state_dict_from_url
    package = ModuleType("torchvision")
    package.__path__ = []
    stand_in = {"torchvision": package, download.__name__: download}
    with patch.dict(sys.modules, stand_in):
        module = importlib.import_module("spikingjelly.activation_based.model.spiking_vgg")
    sys.modules[module.__name__] = module
    return module


spiking_vgg = import_vgg()

LIF = dict(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())
EPS = 2.0**-10


def csnn(channels: int = 16, size: int = 28, spiking=neuron.IFNode, **settings) -> nn.Sequential:
    """The convolutional network of SpikingJelly's tutorial."""
    settings = settings or dict(surrogate_function=surrogate.ATan())
    return nn.Sequential(
        layer.Conv2d(1, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels),
        spiking(**settings), layer.MaxPool2d(2, 2),
        layer.Conv2d(channels, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels),
        spiking(**settings), layer.MaxPool2d(2, 2),
        layer.Flatten(), layer.Linear(channels * (size // 4) ** 2, channels * 16, bias=False),
        spiking(**settings), layer.Linear(channels * 16, 10, bias=False), spiking(**settings),
    )  # fmt: skip


class Attributes(nn.Module):
    """A network as people write it: layers as attributes, its own forward, a residual."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        for i, before in enumerate((2, channels, channels)):
            setattr(self, f"conv{i}", layer.Conv2d(before, channels, 3, padding=1))
            setattr(self, f"bn{i}", layer.BatchNorm2d(channels))
            setattr(self, f"sn{i}", neuron.ParametricLIFNode(decay_input=False, v_reset=None))
        self.fc = layer.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sn0(self.bn0(self.conv0(x)))
        y = self.sn1(self.bn1(self.conv1(x)))
        x = x + self.sn2(self.bn2(self.conv2(y)))
        return self.fc(x.flatten(-2).mean(-1))


def vgg11_bn(**settings) -> nn.Module:
    return spiking_vgg.spiking_vgg11_bn(
        spiking_neuron=neuron.LIFNode, num_classes=10, **(settings or LIF)
    )


def small_vgg(**settings) -> nn.Module:
    """SpikingJelly's VGG, narrow enough for a test."""
    net = spiking_vgg.SpikingVGG(
        [16, "M", 32, 32, "M", 64], True, None, 10, spiking_neuron=neuron.LIFNode,
        **(settings or LIF),
    )  # fmt: skip
    net.avgpool = layer.AdaptiveAvgPool2d((2, 2))
    net.classifier = nn.Sequential(layer.Linear(64 * 4, 32), neuron.LIFNode(**LIF),
                                   layer.Dropout(), layer.Linear(32, 10))  # fmt: skip
    return net


def small_spikformer(dim: int = 64, depths: int = 2) -> nn.Module:
    return spikformer.Spikformer(
        T=4, img_size_h=16, img_size_w=16, patch_size=4, num_classes=7, embed_dims=dim,
        num_heads=2, depths=depths,
    )  # fmt: skip


def small_sdt() -> nn.Module:
    return spike_driven_transformer.SpikeDrivenTransformer(
        T=4, num_classes=7, embed_dims=64, num_heads=2, depths=2, pooling_stat="0011",
    )  # fmt: skip


def sdt_cifar() -> nn.Module:
    return spike_driven_transformer.SpikeDrivenTransformer(
        T=4, num_classes=10, embed_dims=512, num_heads=8, depths=2, pooling_stat="0011"
    )


def plif_net() -> nn.Module:
    return parametric_lif_net.MNISTNet(
        channels=16, spiking_neuron=neuron.ParametricLIFNode,
        surrogate_function=surrogate.ATan(), detach_reset=True,
    )  # fmt: skip


def liven(
    model: nn.Module, x: Tensor, exact: bool = False, seed: int = 0, bias: tuple[int, int] = (0, 6)
) -> dict[str, float]:
    """Set weights, statistics and biases so that every neuron fires on ``x``; returns the rates.

    ``exact``: on a dyadic grid, so that sums are the same bits in any order. ``bias``: of the
    BatchNorms, in eighths of a standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = []

    def grid(tensor: Tensor, low: int, high: int, bits: int) -> None:
        values = torch.randint(low, high + 1, tensor.shape, generator=generator)
        tensor.copy_(values / 2.0**bits)

    def calibrate(bn: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, 1) if getattr(bn, "step_mode", "s") == "m" else inputs[0]
        channels = x.transpose(0, 1).flatten(1)
        power = torch.log2(channels.std(1).clamp(2.0**-6, 2.0**6)).round()
        step = 2.0 ** (power - 3)
        bn.running_mean.copy_((channels.mean(1) / step).round() * step)
        bn.running_var.copy_(4.0**power - bn.eps)

    def scale(module: nn.Module, inputs: object, y: Tensor) -> Tensor:
        power = 2.0 ** float(torch.log2(y.std().clamp(2.0**-10, 2.0**10)).round())
        module.weight.div_(power)
        if module.bias is not None:
            module.bias.div_(power)
        return y / power

    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                if exact:
                    grid(module.weight, -2, 2, 3)
                    if module.bias is not None:
                        grid(module.bias, -2, 2, 3)
                hooks.append(module.register_forward_hook(scale))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                grid(module.bias, *bias, 3)
                if "attn.q" in name or "attn.k" in name or "attn.v" in name:
                    module.bias.add_(0.625)  # or hardly anything would meet in the attention
                module.eps = EPS
                hooks.append(module.register_forward_pre_hook(calibrate))
        training = model.training
        model.eval()
        model(x)
        for hook in hooks:
            hook.remove()
        functional.reset_net(model)
        rates = firing_rates(model, x)
        model.train(training)
    return rates


def firing_rates(model: nn.Module, x: Tensor) -> dict[str, float]:
    rates: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, neuron.BaseNode):

            def hook(m: nn.Module, i: object, s: Tensor, name: str = name) -> None:
                rates[name] = float(s.mean())

            hooks.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    functional.reset_net(model)
    return rates
