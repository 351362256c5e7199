"""Modules one after the other, with the chains among them as one kernel each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops.events import HALVING, Window
from .chain import Chain, refusal
from .conditions import at_rest, events_serve, unwatched
from .neurons import is_neuron
from .spikes import OPS, Spikes, dense

NORMS = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}


@dataclass(frozen=True)
class Item:
    """A module of a sequence; ``folded``: it is given timesteps and images as one dimension."""

    module: Any
    folded: bool

    def multi(self, network: bool) -> bool:
        """Whether it is given all timesteps at once."""
        mode = getattr(self.module, "step_mode", None)
        if self.folded or (mode is None and isinstance(self.module, nn.Linear)):
            return network
        return mode == "m"

    def __call__(self, x: Tensor) -> Tensor:
        if not self.folded:
            return self.module(x)
        lead = x.shape[:2]
        return self.module(x.flatten(0, 1)).unflatten(0, lead)


# Containers that do nothing but call what they contain, in order: how to look into each.
Open = Callable[[nn.Module, bool], Iterator[Item]]
CONTAINERS: dict[type, Open] = {}
# What stands for the layers and BatchNorms of PyTorch: a class of ours or SpikingJelly's.
LAYERS: dict[type, type] = {t: t for t in NORMS}
BATCH_NORMS: dict[type, type] = {t: t for t in (nn.BatchNorm1d, nn.BatchNorm2d)}
POOLS: set[type] = {nn.MaxPool2d}
IDLE: set[type] = {nn.Identity, nn.Dropout, nn.Dropout2d}  # do nothing in evaluation mode


def items(module: nn.Module, folded: bool = False) -> Iterator[Item]:
    """The modules that a container calls one after the other; those inside are looked into."""
    opened = CONTAINERS.get(type(module))
    if opened is None or not unwatched(module):
        yield Item(module, folded)
    else:
        yield from opened(module, folded)


def children(module: nn.Module) -> list[nn.Module]:
    """As a container calls them: ``module.children()`` leaves out one that comes again."""
    return [child for child in module._modules.values() if child is not None]


def open_sequential(module: nn.Module, folded: bool) -> Iterator[Item]:
    for child in children(module):
        yield from items(child, folded)


CONTAINERS[nn.Sequential] = open_sequential
# Containers that give their children timesteps and images as one dimension.
FOLDING: set[type] = set()


def folds(module: nn.Module) -> bool:
    return type(module) in FOLDING


def pool_window(pool: nn.MaxPool2d) -> Window | None:
    """The window of a max-pooling that spikes as bits can be given to."""
    if pool.return_indices or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
        return None
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride,
                                                            pool.padding)]  # fmt: skip
    return (*pairs[0], *pairs[1], *pairs[2])


class Sequence:
    """The items of a container as chains, poolings of spikes, and modules as they are.

    Values on the way have timesteps first, one where the network runs step by step.
    """

    def __init__(self, found: list[Item], multi: bool) -> None:
        self.multi = multi
        self.steps: list[tuple[Chain | None, list[Item]]] = []
        while found:
            chain, length = longest_chain(found, multi)
            self.steps.append((chain, found[:length]))
            found = found[length:]

    @property
    def chains(self) -> list[Chain]:
        return [chain for chain, _ in self.steps if chain is not None]

    def __call__(self, x: Tensor) -> Tensor:
        value: Tensor | Spikes = x if self.multi else x.unsqueeze(0)
        for chain, members in self.steps:
            value = self._step(chain, members, value)
        y = dense(value)
        return y if self.multi else y.squeeze(0)

    def _step(self, chain: Chain | None, members: list[Item], x: Tensor | Spikes) -> Any:
        if chain is not None:
            if isinstance(x, Spikes) and isinstance(chain.layer, nn.Linear):
                x = x.dense()
            if (isinstance(x, Spikes) or events_serve(x)) and chain.ready(x):
                y = chain.sums(x) if chain.neuron is None else chain(x)
                if y is not None:
                    return y
        for item in members:
            if type(item.module) in IDLE and at_rest((item.module,)):
                continue
            if isinstance(x, Spikes) and type(item.module) in POOLS and at_rest((item.module,)):
                window = pool_window(item.module)
                if window is not None:
                    bits, count = OPS.pool_spikes(x.bits, window)
                    x = Spikes(bits, x.channels, count)
                    continue
            x = self._call(item, dense(x))
        return x

    def _call(self, item: Item, x: Tensor) -> Tensor:
        if self.multi or item.folded:
            return item(x)
        return item(x.squeeze(0)).unsqueeze(0)


def longest_chain(found: list[Item], multi: bool) -> tuple[Chain | None, int]:
    """The chain that the items begin with, if any, and how many items that is."""
    layer = found[0].module
    kind = LAYERS.get(type(layer))
    if kind is None or refusal(layer) is not None or found[0].multi(multi) != multi:
        return None, 1
    at, bn, pool, neuron = 1, None, None, None

    def following(test: Callable[[Any], bool]) -> Any:
        if at < len(found) and found[at].multi(multi) == multi and test(found[at].module):
            return found[at].module
        return None

    bn = following(lambda m: _normalises(m, layer, kind))
    at += bn is not None
    pool = following(lambda m: kind is nn.Conv2d and _halves(m))
    at += pool is not None
    neuron = following(is_neuron)
    at += neuron is not None
    if neuron is None:
        at, pool = at - (pool is not None), None
        if bn is None:
            return None, 1  # which looks for itself
    return Chain(layer, bn, pool, neuron), at


def _normalises(module: Any, layer: Any, kind: type) -> bool:
    outputs = layer.out_features if kind is nn.Linear else layer.out_channels
    return (
        BATCH_NORMS.get(type(module)) is NORMS[kind]
        and module.running_mean is not None
        and module.num_features == outputs
    )


def _halves(module: Any) -> bool:
    return type(module) in POOLS and pool_window(module) == HALVING


def fits(layer: Any, bn: Any, neuron: Any) -> bool:
    """Whether modules are such as a chain is made of, in a network that runs all timesteps."""
    kind = LAYERS.get(type(layer))
    if kind is None or refusal(layer) is not None or not _normalises(bn, layer, kind):
        return False
    return neuron is None or (is_neuron(neuron) and neuron.step_mode == "m")


def kept_chains(owner: nn.Module, *groups: tuple[Any, Any, Any]) -> tuple[Chain, ...]:
    """The chains of ``(layer, bn, neuron)`` of a module, kept in it while these are the same.

    None at all where one of them does not fit.
    """
    found = owner.__dict__.get("_atsnn_chains")
    if found is None or any(
        one is not other
        for group, before in zip(groups, found[0], strict=True)
        for one, other in zip(group, before, strict=True)
    ):
        chains = tuple(Chain(layer, bn, None, neuron) for layer, bn, neuron in groups)
        found = groups, chains if all(fits(*group) for group in groups) else ()
        owner.__dict__["_atsnn_chains"] = found
    return found[1]


class Plan:
    """The :class:`Sequence` of a container, made again when its modules change."""

    def __init__(self) -> None:
        self._found: list[tuple[Any, Any]] = []
        self._sequence: Sequence | None = None

    def of(self, module: nn.Module) -> Sequence | None:
        """The sequence, if there is a chain in it to run as one."""
        members = [item for child in children(module) for item in items(child)]
        if folds(module):
            members = [Item(item.module, True) for item in members]
        found = [(item.module, getattr(item.module, "step_mode", None)) for item in members]
        if len(found) != len(self._found) or any(
            one is not other or mode != was
            for (one, mode), (other, was) in zip(found, self._found, strict=True)
        ):
            self._found = found
            self._sequence = self._make(members)
        return self._sequence

    def _make(self, members: list[Item]) -> Sequence | None:
        modes = {item.module.step_mode for item in members if is_neuron(item.module)}
        if len(modes) > 1:
            return None
        sequence = Sequence(members, modes == {"m"} or any(item.folded for item in members))
        return sequence if sequence.chains else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_found": [], "_sequence": None}
