"""Linear layers and neurons as a graph of NIR, the neuromorphic exchange format, and back.

NIR's neurons are differential equations, here stepped by Euler with a timestep ``dt``, as
SpikingJelly does: a LIF of ``tau`` timesteps has the time constant ``tau * dt`` and the resistance
1, or ``tau`` where the input does not decay (``decay_input=False``), and leaks to ``v_reset``; an
IF has the resistance ``1 / dt``. What is of training only (surrogate, ``detach_reset``) and the
membrane are not in a graph. NIR's neurons fire above the threshold and ours at it too: where a
membrane meets its threshold exactly, other simulators may differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .checks import InvalidType, InvalidValue, check_integer, check_number, require
from .nn.folding import fold
from .nn.neurons import IF, LIF, PLIF, Neuron
from .nn.spike_linear import SpikeLinear

__all__ = ["from_nir", "to_nir"]

DT = 1e-4  # seconds a timestep, as SpikingJelly and others take it
CLOSE = 1e-6  # relative: other frameworks write float32


def to_nir(module: nn.Module, *, features: int | None = None, dt: float = DT) -> Any:
    """A graph of NIR that computes what ``module`` does in inference.

    Parameters
    ----------
    module : nn.Module
        LIF, IF, PLIF, SpikeLinear, ``nn.Linear``, or ``nn.Sequential`` of them. The BatchNorm of a
        SpikeLinear is folded into its weights, which are rounded once. A PLIF becomes a LIF of its
        present time constant: it multiplies by ``1 / tau`` where a LIF divides by ``tau``, which
        may round otherwise.
    features : int, optional
        Neurons of a module that has no linear layer and so does not say it.
    dt : float
        Seconds a timestep takes.

    Returns
    -------
    nir.NIRGraph
        Input, a node for each layer and each neuron, output.

    Raises
    ------
    InvalidType, InvalidValue
        What NIR cannot express, with the reason: neurons with soft reset (``v_reset=None``),
        attention, halting, merging, BatchNorm alone, layers of other kinds.
    MissingDependency
        If ``nir`` is not installed.
    """
    op = "to_nir"
    check_number(op, "dt", dt, above=0)
    require("nir", "nir", op)
    import nir

    layers = list(_flat(op, module, "module"))
    if not layers:
        raise InvalidValue(f"{op}: module must hold a layer or a neuron, got none")
    width = _width(op, layers, features)
    nodes = []
    for name, layer in layers:
        if isinstance(layer, Neuron):
            nodes.append(_neuron_node(op, name, layer, width, dt))
            continue
        linear, bn = (layer.linear, layer.bn) if isinstance(layer, SpikeLinear) else (layer, None)
        if linear.in_features != width:
            raise InvalidValue(
                f"{op}: {name} must take the {width} features before it, got {linear.in_features}"
            )
        nodes.append(_linear_node(op, name, linear, bn))
        width = linear.out_features
        if isinstance(layer, SpikeLinear):
            nodes.append(_neuron_node(op, f"{name}.neuron", layer.neuron, width, dt))
    return nir.NIRGraph.from_list(*nodes)


def from_nir(
    graph: Any,
    *,
    dt: float = DT,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    detach_reset: bool = False,
) -> nn.Sequential:
    """Modules for a graph of NIR that is a chain of linear maps and LIF or IF neurons.

    Parameters
    ----------
    graph : nir.NIRGraph
        As :func:`to_nir` or another framework makes it; ``nir.read`` reads a file.
    dt : float
        Seconds a timestep takes, the one that the graph was made with.
    surrogate, alpha, detach_reset
        Of every neuron, for training; see :func:`atsnn.functional.neuron`.

    Returns
    -------
    nn.Sequential
        Of ``nn.Linear``, ``LIF`` and ``IF``, over ``[T, ..., features]``, in the dtype of the
        graph's weights. A graph of :func:`to_nir` gives the settings and weights that it was made
        of, the shortest decimal among the values of ``tau`` that rounding cannot tell apart.

    Raises
    ------
    InvalidType, InvalidValue
        If ``graph`` is no such graph; the message names the node.
    MissingDependency
        If ``nir`` is not installed.
    """
    op = "from_nir"
    check_number(op, "dt", dt, above=0)
    require("nir", "nir", op)
    import nir

    if not isinstance(graph, nir.NIRGraph):
        raise InvalidType(f"{op}: graph must be a nir.NIRGraph, got {type(graph).__name__}")
    training: dict[str, Any] = {
        "surrogate": surrogate,
        "alpha": alpha,
        "detach_reset": detach_reset,
    }
    modules: list[nn.Module] = []
    for name, node in _chain(op, graph):
        if isinstance(node, nir.Affine | nir.Linear):
            modules.append(_linear(op, name, node))
        elif isinstance(node, nir.LIF):
            modules.append(LIF(**_lif_settings(op, name, node, dt), **training))
        elif isinstance(node, nir.IF):
            modules.append(IF(**_if_settings(op, name, node, dt), **training))
        else:
            raise InvalidValue(
                f"{op}: node {name!r} must be one of Affine, Linear, LIF, IF, "
                f"got {type(node).__name__}"
            )
    return nn.Sequential(*modules)


# -- to ------------------------------------------------------------------------------------------


def _flat(op: str, module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Layers and neurons of nested Sequentials, in their order, by name."""
    if type(module) is nn.Sequential:
        for key, child in module.named_children():
            yield from _flat(op, child, f"{name}.{key}")
    elif isinstance(module, LIF | IF | PLIF | SpikeLinear) or type(module) is nn.Linear:
        yield name, module
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise InvalidValue(
            f"{op}: {name} must not be a BatchNorm, for which NIR has no node; "
            "SpikeLinear.of(linear, bn, neuron) folds it"
        )
    elif isinstance(module, nn.Module):
        raise InvalidValue(
            f"{op}: {name} must be LIF, IF, PLIF, SpikeLinear, nn.Linear or nn.Sequential of them, "
            "as NIR has no nodes for attention, halting, merging or others, "
            f"got {type(module).__name__}"
        )
    else:
        raise InvalidType(f"{op}: {name} must be an nn.Module, got {type(module).__name__}")


def _width(op: str, layers: list[tuple[str, Any]], features: int | None) -> int:
    """Features that go into the first layer."""
    linears = (layer for _, layer in layers if not isinstance(layer, Neuron))
    first = next(linears, None)
    if first is not None:
        return (first.linear if isinstance(first, SpikeLinear) else first).in_features
    if features is None:
        raise InvalidValue(
            f"{op}: features must be given for neurons alone, as NIR has a parameter for each, "
            "got None"
        )
    return check_integer(op, "features", features, at_least=1)


def _linear_node(op: str, name: str, linear: nn.Linear, bn: nn.BatchNorm1d | None) -> Any:
    import nir

    weight, bias = linear.weight, linear.bias
    if bn is not None:
        if bn.training or bn.running_mean is None:
            raise InvalidValue(
                f"{op}: {name}.bn must be in evaluation mode and have running statistics, "
                "as it is folded into the weights"
            )
        weight, bias = (t.to(linear.weight.dtype) for t in fold(linear, bn))  # type: ignore[assignment]
    values = weight.detach().cpu().numpy().copy()
    if bias is None:
        return nir.Linear(weight=values)
    return nir.Affine(weight=values, bias=bias.detach().cpu().numpy().copy())


def _neuron_node(op: str, name: str, neuron: Any, width: int, dt: float) -> Any:
    import nir

    if neuron.v_reset is None:
        raise InvalidValue(
            f"{op}: {name} must reset to a value, as NIR's neurons do, got soft reset, v_reset=None"
        )

    def each(value: float) -> np.ndarray:
        return np.full((width,), float(value))

    shared = {"v_threshold": each(neuron.v_threshold), "v_reset": each(neuron.v_reset)}
    if isinstance(neuron, IF):
        return nir.IF(r=each(1 / dt), **shared)
    tau = 1 / float(neuron.w.detach().sigmoid()) if isinstance(neuron, PLIF) else neuron.tau
    return nir.LIF(
        tau=each(tau * dt), r=each(1.0 if neuron.decay_input else tau),
        v_leak=each(neuron.v_reset), **shared,
    )  # fmt: skip


# -- from ----------------------------------------------------------------------------------------


def _chain(op: str, graph: Any) -> Iterator[tuple[str, Any]]:
    """The nodes between the input and the output of a graph that is one chain."""
    import nir

    following: dict[str, list[str]] = {name: [] for name in graph.nodes}
    before = dict.fromkeys(graph.nodes, 0)
    for source, target in graph.edges:
        if source not in following or target not in before:
            raise InvalidValue(f"{op}: edges must join nodes, got {source!r} to {target!r}")
        following[source].append(target)
        before[target] += 1
    starts = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)]
    if len(starts) != 1:
        raise InvalidValue(f"{op}: graph must have one input, got {len(starts)}")
    name, seen = starts[0], 1
    while len(following[name]) == 1 and before[following[name][0]] == 1:
        name, seen = following[name][0], seen + 1
        if isinstance(graph.nodes[name], nir.Output):
            break
        yield name, graph.nodes[name]
    if seen != len(graph.nodes) or not isinstance(graph.nodes[name], nir.Output):
        raise InvalidValue(
            f"{op}: graph must be one chain from its input to its output, without branches and "
            f"recurrence, got one that is not after node {name!r}"
        )


def _linear(op: str, name: str, node: Any) -> nn.Linear:
    weight, bias = np.asarray(node.weight), getattr(node, "bias", None)
    arrays = [weight] if bias is None else [weight, np.asarray(bias)]
    if weight.ndim != 2 or (bias is not None and arrays[1].shape != weight.shape[:1]):
        raise InvalidValue(
            f"{op}: node {name!r} must have weight (outputs, inputs) and bias (outputs,), "
            f"got {' and '.join(str(a.shape) for a in arrays)}"
        )
    for array in arrays:
        if array.dtype not in (np.float32, np.float64) or array.dtype != weight.dtype:
            raise InvalidType(
                f"{op}: node {name!r} must hold float32 or float64, of one dtype, got {array.dtype}"
            )
        if not np.isfinite(array).all():
            raise InvalidValue(f"{op}: node {name!r} must be finite, got NaN or infinite values")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.to(torch.from_numpy(arrays[0]).dtype)
    with torch.no_grad():
        for parameter, array in zip(linear.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))
    return linear


def _one(op: str, name: str, node: Any, parameter: str) -> float:
    """The value that a parameter has for every neuron of the node."""
    values = np.unique(np.asarray(getattr(node, parameter), dtype=np.float64))
    if values.size != 1 or not np.isfinite(values).all():
        raise InvalidValue(
            f"{op}: {parameter} of node {name!r} must be one finite number for all its neurons, "
            f"got {values.size} different ones from {values[:1]}"
        )
    return float(values[0])


def _lif_settings(op: str, name: str, node: Any, dt: float) -> dict[str, Any]:
    constant, r, leak, reset = (
        _one(op, name, node, parameter) for parameter in ("tau", "r", "v_leak", "v_reset")
    )
    tau = _shortest(constant, dt, np.asarray(node.tau).dtype)
    if tau <= 1:
        raise InvalidValue(
            f"{op}: tau of node {name!r} must be above dt = {dt}, got {constant}; is dt the one "
            "that the graph was made with?"
        )
    if not (_close(r, 1.0) or _close(r, tau)):
        raise InvalidValue(
            f"{op}: r of node {name!r} must be 1, or tau / dt = {tau} for inputs that do not "
            f"decay, got {r}"
        )
    if not math.isclose(leak, reset, rel_tol=CLOSE, abs_tol=1e-12):
        raise InvalidValue(
            f"{op}: v_leak of node {name!r} must be its v_reset = {reset}, to which our neurons "
            f"leak, got {leak}"
        )
    return {
        "tau": tau, "decay_input": _close(r, 1.0), "v_reset": reset,
        "v_threshold": _one(op, name, node, "v_threshold"),
    }  # fmt: skip


def _if_settings(op: str, name: str, node: Any, dt: float) -> dict[str, Any]:
    r = _one(op, name, node, "r")
    if not _close(r, 1 / dt):
        raise InvalidValue(f"{op}: r of node {name!r} must be 1 / dt = {1 / dt}, got {r}")
    return {name_: _one(op, name, node, name_) for name_ in ("v_threshold", "v_reset")}


def _close(value: float, wanted: float) -> bool:
    return math.isclose(value, wanted, rel_tol=CLOSE)


def _shortest(constant: float, dt: float, dtype: np.dtype[Any]) -> float:
    """The shortest ``tau`` of which ``tau * dt`` is stored as ``constant``."""
    for digits in range(1, 18):
        tau = float(f"{constant / dt:.{digits}g}")
        if dtype.kind == "f" and float(np.asarray(tau * dt).astype(dtype)) == constant:
            return tau
    return constant / dt
