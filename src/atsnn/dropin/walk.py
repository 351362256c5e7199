"""Which modules of a model the kernels can compute, and the change of their classes."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from ..checks import InvalidType
from ..ops import native_serves
from .chain import refusal
from .layers import EventConv1d, EventConv2d, EventLinear, EventSequential

PLAIN = (EventLinear, EventConv1d, EventConv2d, EventSequential)


@dataclass(frozen=True)
class Change:
    """What became of a module.

    Attributes
    ----------
    name : str
        Its path in the model, ``""`` for the model itself.
    kind : str
        What it was.
    now : str, optional
        What it is; ``None``: it was left alone.
    reason : str
        How it is computed, or why it was left alone.
    """

    name: str
    kind: str
    now: str | None
    reason: str


@dataclass
class Report:
    """What :func:`accelerate` did.

    Attributes
    ----------
    model : nn.Module
        The model given, or its copy.
    changes : list of Change
        Of every module that was replaced, or that looks as if it should be and was left alone.
    """

    model: nn.Module
    changes: list[Change] = field(default_factory=list)

    @property
    def replaced(self) -> list[Change]:
        return [c for c in self.changes if c.now is not None]

    @property
    def left(self) -> list[Change]:
        return [c for c in self.changes if c.now is None]

    def __str__(self) -> str:
        lines = [f"accelerated {len(self.replaced)} modules, left {len(self.left)} alone"]
        for title, changes in (("replaced", self.replaced), ("left alone", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for c in changes:
                groups.setdefault((c.kind, c.reason), []).append(c.name or "(the model)")
            for (kind, reason), names in groups.items():
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                lines.append(f"  {title}: {len(names)} {kind} ({shown}): {reason}")
        return "\n".join(lines)


def accelerate(model: nn.Module, *, inplace: bool = True) -> Report:
    """Let atsnn's kernels compute the modules of a spiking model that they know.

    Each such module becomes, in its place, an object of a class derived from its own: it keeps its
    parameters, membrane, hooks, name and ``state_dict`` keys, and ``isinstance`` holds as before.
    What is not known is left alone, and the report says so. Nothing is trained or converted;
    :func:`restore` undoes it.

    On CPU tensors, in float32:

    - SpikingJelly's ``LIFNode``, ``IFNode`` and ``ParametricLIFNode``, multi-step and single-step,
      in training and evaluation: the same spikes and membranes bit for bit;
    - in evaluation, where no gradient is needed (call it under ``torch.no_grad()``): linear layers
      and convolutions whose input is spikes add the weights of what fired; chains of layer,
      BatchNorm and neurons in ``nn.Sequential`` and SpikingJelly's containers, its
      ``SpikingSelfAttention``, ``SpikeDrivenSelfAttention`` and the blocks around them run as one
      kernel each, on bits. The same numbers but for the rounding of sums; exact where the sums
      are. Under autocast, ``torch.compile``, hooks and dispatch modes (which may count or watch
      operations) the modules run as they were.

    Parameters
    ----------
    model : nn.Module
        Any module. With SpikingJelly 2.0.0 installed its modules are known too.
    inplace : bool
        Whether to change the model itself; otherwise a deep copy is.

    Returns
    -------
    Report
        What was replaced and what was not, and why; ``report.model`` is the model. Print it.

    Raises
    ------
    InvalidType
        If ``model`` is no ``nn.Module``.

    Examples
    --------
    >>> report = accelerate(nn.Sequential(nn.Linear(8, 8)))
    >>> len(report.replaced)
    2
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(
            f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    model = model if inplace else copy.deepcopy(model)
    report = Report(model)
    known, expected, missing = swaps()
    if missing is not None:
        report.changes.append(Change("", "SpikingJelly", None, missing))
    for name, module in model.named_modules():
        change = consider(name, module, known, expected)
        if change is not None:
            report.changes.append(change)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Give every module of an accelerated model its own class back."""
    for module in model.modules():
        # Of the class itself: one made of it since, as a parametrization is, stays.
        original = vars(type(module)).get("replaces")
        if original is not None:
            module.__class__ = original
            for name in [n for n in module.__dict__ if n.startswith("_atsnn_")]:
                del module.__dict__[name]
    return model


def swaps() -> tuple[dict[type, type], tuple[type, ...], str | None]:
    """The class that stands for each known one, kinds that are expected to be known, and why
    SpikingJelly's are not among them."""
    found: list[type] = list(PLAIN)
    expected: tuple[type, ...] = ()
    missing = None
    if "spikingjelly.activation_based.neuron" in sys.modules:
        try:
            from . import jelly

            found += jelly.SWAPS
            expected = jelly.EXPECTED
        except (ImportError, AttributeError) as error:
            missing = f"its modules are known as of version 2.0.0, and here: {error}"
    known = {event.replaces: event for event in found}  # type: ignore[attr-defined]
    return known, expected, missing


def consider(
    name: str, module: nn.Module, known: dict[type, type], expected: tuple[type, ...]
) -> Change | None:
    """Change the class of a module that is known; ``None`` if there is nothing to say of it."""
    kind = type(module)
    event = known.get(kind)
    if event is not None:
        reason = objection(module, event)
        if reason is None:
            module.__class__ = event
            return Change(name, kind.__name__, event.__name__, event.how)  # type: ignore[attr-defined]
        return Change(name, kind.__name__, None, reason)
    if kind in known.values():
        return None  # by an earlier call
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Sequential  # whose subclasses are many
    for parent in known:
        if isinstance(module, parent) and not issubclass(parent, layers):
            reason = f"a subclass of {parent.__name__}, which may compute something else"
            return Change(name, kind.__name__, None, reason)
    if isinstance(module, expected):
        return Change(name, kind.__name__, None, "there is no kernel for it")
    return None


def objection(module: nn.Module, event: type) -> str | None:
    """Why a module of a known class cannot be computed by the kernels."""
    if not native_serves(torch.device("cpu")):
        return "the native kernels are not available (see atsnn.available_backends())"
    if "forward" in module.__dict__:
        return "its forward was replaced by another"
    if issubclass(event, nn.Linear | nn.Conv1d | nn.Conv2d):
        return refusal(module)
    if hasattr(event, "kernel_settings"):
        settings = event.kernel_settings(module)
        return settings if isinstance(settings, str) else None
    return None
