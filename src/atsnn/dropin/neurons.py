"""What the event-driven layers need to know of a neuron module, ours or SpikingJelly's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn.neurons import IF, LIF, PLIF, Neuron


class Settings(NamedTuple):
    """Settings of a neuron, in the order of the operators."""

    kind: str
    tau: float
    inv_tau: float | None
    v_threshold: float
    v_reset: float | None
    decay_input: bool


def is_neuron(module: nn.Module) -> bool:
    """Whether kernels know the neuron: ours, or SpikingJelly's after its class was changed."""
    return type(module) in (IF, LIF, PLIF) or hasattr(type(module), "kernel_settings")


def settings_of(neuron: Any) -> Settings | None:
    """The settings of a neuron as they are now; ``None`` if no kernel computes it."""
    if not isinstance(neuron, Neuron):
        named = neuron.kernel_settings()
    else:
        named = {
            "kind": neuron.kind, "v_threshold": neuron.v_threshold, "v_reset": neuron.v_reset,
            **neuron._settings(),
        }  # fmt: skip
    if isinstance(named, str):
        return None
    inv_tau = named.get("inv_tau")
    return Settings(
        named["kind"], named.get("tau", 1.0), None if inv_tau is None else float(inv_tau),
        named["v_threshold"], named["v_reset"], named.get("decay_input", True),
    )  # fmt: skip


def may_be_fused(neuron: Any) -> bool:
    """Whether nothing but spikes and the final membrane is wanted of a call of the neuron."""
    v = neuron.v
    wants_gradient = isinstance(v, Tensor) and v.requires_grad and torch.is_grad_enabled()
    records = getattr(neuron, "store_v_seq", False)
    return not (wants_gradient or records) and settings_of(neuron) is not None


def known_settings(neuron: Any) -> Settings:
    """The settings of a neuron that is known to have a kernel."""
    settings = settings_of(neuron)
    assert settings is not None
    return settings


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def membrane(neuron: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The membrane a neuron goes on from, of the shape of one timestep; ``None``: at rest."""
    v = neuron.v
    if isinstance(v, Tensor):
        return v.detach().to("cpu", torch.float32) if tuple(v.shape) == shape else None
    rest = neuron.v_reset or 0.0
    return None if v is None or v == rest else torch.full(shape, float(v))


def run(neuron: Any, x: Tensor) -> Tensor:
    """Spikes of ``x [T, ...]``; the neuron keeps its membrane, whatever its step mode."""
    if isinstance(neuron, Neuron):
        spikes, neuron.v = neuron.run(x, membrane(neuron, tuple(x.shape[1:])))
        return spikes
    settings = neuron.kernel_settings()
    v = membrane(neuron, tuple(x.shape[1:]))
    spikes, neuron.v = F.neuron(x, v, **settings)
    return spikes
