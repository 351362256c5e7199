"""What several files measure on: a network that fires, patterns of halting, the dense peers.

An untrained network is silent, so firing rates are set with BatchNorm constants (atsnn.firing), and
what really fired is printed.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from bars import on_threads
from judge import carry_over
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.model.spikformer import spikformer_cifar10
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import atsnn
from atsnn.bench.subject import NEVER
from atsnn.data import patterns
from atsnn.firing import set_firing_rates
from atsnn.schedule import synthetic_depths
from atsnn.testing import exact_images, exact_model

L, T, N = 4, 4, 64  # blocks, timesteps and tokens of Spikformer-4-384 on images of 32x32
RATES = {"5 % / 15 %": (0.05, 0.15), "10 % / 28 %": (0.10, 0.28)}
SHARES = {"20 %": 0.8, "40 %": 0.6, "60 %": 0.4}  # cells halted: share that runs
SAMPLE = 4  # images on which firing rates are set: more take minutes and change them by a hundredth


def case(B: int, threads: int, *more: str) -> str:
    """What a bar's case is called."""
    return ", ".join((f"batch {B}", on_threads(threads), *more))


@cache
def firing_model(B: int, rates: str = "5 % / 15 %", **changes):
    """Spikformer-4-384 in evaluation mode, of whose own nothing halts, and ``B`` images.

    Both are shared by all who ask for the same: copy what is to be changed.
    """
    torch.manual_seed(0)
    model = atsnn.create_model("spikformer_4_384", num_classes=10, **changes).eval()
    if model.halting is not None:
        with torch.no_grad():
            model.halting.beta.fill_(NEVER)  # scores are computed all the same
    images = patterns(B, 3, 32)
    set_firing_rates(model, images[:SAMPLE], *RATES[rates])
    return model, images


def halting_depths(B: int) -> dict[str, torch.Tensor]:
    """Depths ``[T, B, N]`` at which tokens stop, by the share of cells that halt."""
    found = {"none": torch.full((T, B, N), L)}
    return found | {k: synthetic_depths(L, T, B, N, share) for k, share in SHARES.items()}


# -- the dense peers ------------------------------------------------------------------------------

FUSE = {nn.Conv1d: fuse_conv_bn_eval, nn.Conv2d: fuse_conv_bn_eval, nn.Linear: fuse_linear_bn_eval}


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy in which every BatchNorm is folded into the layer before it."""
    model = copy.deepcopy(model)
    for container in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i in reversed(range(1, len(container))):
            if isinstance(container[i], nn.modules.batchnorm._BatchNorm):
                container[i - 1] = FUSE[type(container[i - 1])](container[i - 1], container[i])
                del container[i]
    left = [name for name, m in model.named_modules() if "BatchNorm" in type(m).__name__]
    assert not left, f"BatchNorms that no layer stands before: {left}"
    return model


class Peers:
    """SpikingJelly's Spikformer for CIFAR-10, and PyTorch dense: the same with BatchNorms folded.

    Each eager and compiled. The compiled ones keep the weights and thresholds of an exact model,
    for which all are known to give the same numbers, as their time does not depend on them.
    """

    def __init__(self) -> None:
        self.exact = exact_model(atsnn.SpikformerConfig(pool="before_lif", bias=False))
        self.networks = {}
        self.carry(self.exact)
        self.functions = {name: self._run(name) for name in self.networks}
        for name, network in [*self.networks.items()]:
            self.networks[f"{name} compiled"] = own = copy.deepcopy(network)
            # A size that changes would make PyTorch compile for any size, which is slower.
            compiled = torch.compile(own, dynamic=False)
            self.functions[f"{name} compiled"] = self._run(f"{name} compiled", compiled)

    def carry(self, model: atsnn.ATSpikformer) -> None:
        """Give the eager ones the weights of ``model``."""
        network = spikformer_cifar10(T=T).eval()
        carry_over(model, network)
        self.networks |= {"SJ": network, "folded": fold_batch_norms(network)}

    def _run(self, name, compiled=None):
        def run(x):
            network = self.networks[name]
            functional.reset_net(network)
            return (network if compiled is None else compiled)(x)

        return run

    def check(self, B: int) -> None:
        """All of them, the modules and the engine give the same numbers on the exact model.

        The compiled ones are compiled here, for this batch and the number of threads at hand.
        """
        torch._dynamo.reset()  # past a number of versions PyTorch runs a network eagerly
        x = exact_images(self.exact.config, B)
        self.carry(self.exact)
        want = self.exact(x)
        assert torch.equal(atsnn.freeze(self.exact)(x), want)
        for function in self.functions.values():
            torch.testing.assert_close(function(x).mean(0), want, rtol=1e-5, atol=1e-5)
