"""A kernel on one case: called as the operation is, and compared with the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..cases import Arguments, Numbers, Outputs, backward
from ..checks import BackendError, InvalidType, InvalidValue, MissingDependency
from ..conformance import GRADIENT_TOLERANCE, Finding, difference, raised
from ..layout import TokenLayout
from ..reference import MergePlan
from .case import Case
from .inputs import Given, poisoned_memory, tensors_of, to_device

Kernel = Callable[..., Any]

# What each operation gives, in order.
RESULTS: dict[str, tuple[str, ...]] = {
    "neuron": ("spikes", "membrane"),
    "spiking_attention": ("output",),
    "spike_driven_attention": ("output", "state"),
    "match_tokens": ("target", "merged"),
    "merge_tokens": ("merged rows",),
    "unmerge_tokens": ("rows",),
    "take_rows": ("rows",),
    "halt": ("weights", "last", "accumulators", "active_steps"),
    "halting_scores": ("scores",),
    "readout": ("readout",),
    "firing_counts": ("counts",),
    "spike_linear_lif": ("spikes", "membrane"),
    "pack_spikes": ("words",),
    "unpack_spikes": ("spikes",),
}
# Of these the first dimension is time, or rows that lie at a time.
TIMED = {
    "neuron", "spiking_attention", "spike_driven_attention", "merge_tokens", "unmerge_tokens",
    "halt", "spike_linear_lif",
}  # fmt: skip


# Settings that results do not depend on.
OF_GRADIENTS = {"detach_reset", "surrogate", "alpha"}


class Unsupported(Exception):
    """The kernel cannot be asked this."""


class Fault(Exception):
    """The kernel is wrong, and how."""


def check_kernel(op: str, fn: Kernel) -> None:
    """Check that ``fn`` can be called with what every case of ``op`` gives."""
    if not callable(fn):
        raise InvalidType(f"check: fn must be a function, got {type(fn).__name__}")
    needed = [
        name for name, p in inspect.signature(getattr(F, op)).parameters.items()
        if p.default is p.empty
    ]  # fmt: skip
    parameters = _parameters(fn)
    missing = [name for name in needed if parameters is not None and name not in parameters]
    if missing:
        raise InvalidValue(
            f"check: fn must have the parameters of atsnn.functional.{op} that have no default, "
            f"{', '.join(needed)}; got a function without {', '.join(missing)}"
        )


def _parameters(fn: Kernel) -> set[str] | None:
    """The names ``fn`` can be given; ``None``: any, or nobody knows."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def arguments_for(fn: Kernel, op: str, wanted: Arguments, gradient: bool) -> Arguments:
    """What to call ``fn`` with: what the case wants, defaults of the operation written out.

    A parameter that ``fn`` lacks is left out where the case wants the default. So is a default
    of ``None`` that the case does not name: it says that there is nothing to give.
    """
    known = _parameters(fn)
    given = {}
    for name, p in inspect.signature(getattr(F, op)).parameters.items():
        value = wanted.get(name, p.default)
        default = type(value) is type(p.default) and value == p.default
        if name == "backend" or (default and (name not in wanted and value is None)):
            continue
        if known is None and default:
            continue
        if known is None or name in known:
            given[name] = value
        elif not default and (gradient or name not in OF_GRADIENTS):
            raise Unsupported(f"no parameter {name!r}")
    return given


def judge(case: Case, fn: Kernel, device: torch.device) -> Finding:
    """What ``fn`` did on ``case``."""
    verdict, detail = "pass", ""
    try:
        _compare(case, fn, device)
    except (Unsupported, NotImplementedError, BackendError) as error:
        verdict, detail = "unsupported", str(error).split("\n")[0] or "NotImplementedError"
    except Fault as error:
        verdict, detail = "fail", str(error)
    return Finding(case.group, case.label, verdict, detail)


def _compare(case: Case, fn: Kernel, device: torch.device) -> None:
    wanted = case.make()
    theirs, their_leaves = _reference(case, wanted)
    given, watched = _hand_over(case, arguments_for(fn, case.op, wanted, bool(case.leaves)), device)
    leaves = {g.name: g.tensor for g in watched if g.name in case.leaves}
    names = RESULTS[case.op][: len(theirs)]
    with poisoned_memory():
        ours = _results(names, _attempt(fn, given), theirs, device)
        if case.leaves:
            found = _attempt(partial(_gradients, ours, theirs, leaves), {})
    for argument in watched:
        if fault := argument.changed():
            raise Fault(f"expected a call that only reads its arguments, got one that {fault}")
    main = next(x.shape for x in wanted.values() if isinstance(x, Tensor))
    where = partial(_where, case.op, main, wanted.get("layout"))
    if case.leaves:
        for name, b in backward(theirs, their_leaves, Numbers(12)).items():
            tolerance = GRADIENT_TOLERANCE[b.dtype]
            if fault := difference(found[name].cpu(), b, tolerance, partial(where, b.shape)):
                _gradient_expected(ours, theirs, names)
                raise Fault(f"gradient of {name}{fault}")
        return
    for name, a, b in zip(names, ours, theirs, strict=True):
        if fault := difference(a.detach().cpu(), b.detach(), None, partial(where, b.shape)):
            raise Fault(f"{name}{fault}")


def _reference(case: Case, wanted: Arguments) -> tuple[Outputs, dict[str, Tensor]]:
    """The results to expect, and the leaves they were computed from."""
    reference = partial(getattr(F, case.op), backend="reference")
    arguments = {name: to_device(x, torch.device("cpu")) for name, x in wanted.items()}
    leaves = {name: arguments[name].clone().requires_grad_() for name in case.leaves}
    return _flat(reference(**arguments | leaves)), leaves


def _hand_over(
    case: Case, arguments: Arguments, device: torch.device
) -> tuple[Arguments, list[Given]]:
    """Arguments on the device, tensors in poisoned memory, and what to watch for changes."""
    given: Arguments = {}
    watched = []
    for name, value in arguments.items():
        there = to_device(value, device)
        if isinstance(there, Tensor):
            handed = Given(name, there, case.memory, name in case.leaves)
            watched.append(handed)
            there = handed.tensor
        given[name] = there
        watched += [Given.watching(part, x) for part, x in tensors_of(name, there)]
    return given, watched


def _attempt(fn: Kernel, arguments: Arguments) -> Any:
    """Call somebody's code: whatever it raises is a finding, not the end."""
    try:
        return fn(**arguments)
    except (Fault, Unsupported, NotImplementedError, BackendError, MissingDependency):
        raise
    except Exception as error:
        raise Fault(raised(error)) from error


def _flat(value: Any) -> tuple[Any, ...]:
    if isinstance(value, MergePlan):
        return value.target, value.merged
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _results(names: tuple[str, ...], value: Any, theirs: Outputs, device: torch.device) -> Outputs:
    """The results of a call, if they are what such a call gives."""
    ours = _flat(value)
    listed = ", ".join(names)
    if len(ours) != len(theirs):
        raise Fault(f"expected {len(theirs)} results, {listed}; got {_kinds(value)}")
    for name, a, b in zip(names, ours, theirs, strict=True):
        if not isinstance(a, Tensor):
            raise Fault(f"{name}: expected a torch.Tensor, got {type(a).__name__}")
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Fault(f"{name}{difference(a, b)}")
        if a.device.type != device.type:
            raise Fault(f"{name}: expected a tensor on {device}, got one on {a.device}")
    return ours


def _kinds(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return type(value).__name__
    return f"{len(value)}: ({', '.join(type(x).__name__ for x in value)})"


def _gradients(ours: Outputs, theirs: Outputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the leaves from the results that have them by the reference."""
    sending = [a if b.requires_grad else a.detach() for a, b in zip(ours, theirs, strict=True)]
    return backward(tuple(sending), leaves, Numbers(12))


def _gradient_expected(ours: Outputs, theirs: Outputs, names: tuple[str, ...]) -> None:
    """A gradient that differs is no fault of a kernel that does not offer one."""
    for name, a, b in zip(names, ours, theirs, strict=True):
        if b.requires_grad and not a.requires_grad:
            raise Unsupported(f"no gradient: {name} does not require one")


def _where(
    op: str, main: torch.Size, layout: TokenLayout | None, shape: torch.Size,
    index: tuple[int, ...],
) -> str:  # fmt: skip
    """When and where an element of a result is, if it is one of a timestep."""
    if op not in TIMED or len(shape) != len(main) or shape[0] != main[0]:
        return ""
    if layout is None:
        return f" (timestep {index[0]})"
    cell = int(layout.index[index[0]])
    t, rest = divmod(cell, layout.B * layout.N)
    b, token = divmod(rest, layout.N)
    return f" (timestep {t}, image {b}, token {token})"
