"""SpikingJelly 2.0 as the outside judge: its neuron, behind our signature, and its Spikformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.model.spikformer import Spikformer
from torch import Tensor

import atsnn
from atsnn.reference import SURROGATE_CLASSES

SURROGATES = {name: getattr(surrogate, theirs) for name, theirs in SURROGATE_CLASSES.items()}


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
    """Our weights and settings into a model of SpikingJelly's that is there already."""
    source = atsnn.convert.to_spikingjelly(ours)
    theirs.load_state_dict(source.state_dict())
    for path, module in source.named_modules():
        for name in {"eps", "v_threshold"} & vars(module).keys():
            setattr(theirs.get_submodule(path), name, getattr(module, name))


def assert_same_state(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Names in their order, dtypes and every bit."""
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        # As bytes: 0 and -0 are equal numbers.
        a, b = (t.reshape(-1).view(torch.uint8) for t in (got[name], tensor))
        assert got[name].shape == tensor.shape and torch.equal(a, b), name
