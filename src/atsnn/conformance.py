"""Whether a backend computes what the reference does, on the cases of :mod:`.cases`.

The comparison itself, :func:`difference`, judges others' kernels too: :mod:`atsnn.kit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import OPERATIONS, Inputs, Numbers, Operation, Outputs, gradients, ragged
from .checks import BackendError, InvalidValue, check_choice
from .layout import TokenLayout
from .ops import BACKENDS, resolve_backend

__all__ = ["CASES", "LEGEND", "Finding", "check_backend"]

GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Case:
    """A layout, channels a head, a storage type, and whether gradients are compared too."""

    layout: tuple[str, int, int, int]
    channels: int = 8
    dtype: torch.dtype = torch.float32
    backward: bool = True

    def make_layout(self) -> TokenLayout:
        kind, T, B, N = self.layout
        if kind == "ragged":
            return ragged(7, T, B, N)
        steps = {"all": T, "none": 0}[kind]
        return TokenLayout.from_active_steps(torch.full((B, N), steps), T)


# What a table's columns are called; small, so that an interpreter can run them.
CASES = {
    "ragged": Case(("ragged", 4, 2, 6)),
    # One channel: tokens of equal direction, whose order decides which of them merge.
    "all": Case(("all", 2, 2, 9), 1),
    "none": Case(("none", 2, 2, 5)),
    "one": Case(("all", 3, 1, 1)),
    "empty": Case(("all", 2, 0, 3)),
    "N70": Case(("ragged", 2, 1, 70), 20),
    "C150": Case(("ragged", 2, 1, 5), 150),
    "T17": Case(("ragged", 17, 1, 3)),
    "f64": Case(("ragged", 3, 2, 5), dtype=torch.float64),
    "f16": Case(("ragged", 3, 2, 5), dtype=torch.float16, backward=False),
    "bf16": Case(("ragged", 3, 2, 5), dtype=torch.bfloat16, backward=False),
}

LEGEND = (
    "layouts: ragged, all or none active, one token, empty; N70: 70 tokens; C150: 150 channels a "
    "head; T17: 17 timesteps; f64, f16, bf16: storage"
)


@dataclass(frozen=True)
class Finding:
    """What one operation did on one case.

    Attributes
    ----------
    operation, case : str
    result : {"pass", "fail", "unsupported"}
    detail : str
        Where it first differs, or why it is not supported.
    """

    operation: str
    case: str
    result: str
    detail: str = ""


def check_backend(
    backend: str = "auto", device: str = "cpu", operations: list[str] | None = None
) -> Iterator[Finding]:
    """Compare ``backend`` on ``device`` with the reference, operation by operation.

    Results must be the same bits, dense and packed; gradients may differ by a relative 1e-5
    (1e-12 in float64).

    Parameters
    ----------
    backend : {"auto", "native", "triton", "reference"}
    device : str
        A PyTorch device, such as ``"cuda"``.
    operations : list of str, optional
        Names of :data:`atsnn.cases.OPERATIONS`; by default all.

    Yields
    ------
    Finding
        One for each operation and case.
    """
    op = "check"
    check_choice(op, "backend", backend, BACKENDS)
    for name in operations or ():
        check_choice(op, "operation", name, OPERATIONS)
    where = device_here(op, device)
    resolve_backend(op, backend, where)  # a backend that cannot run at all says so once
    for name in operations or OPERATIONS:
        for label, case in CASES.items():
            yield Finding(name, label, *_judge(OPERATIONS[name], case, backend, where))


def device_here(op: str, device: str) -> torch.device:
    """The device of that name, if it can be used here."""
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidValue(
            f"{op}: device must be one that is here, got {device!r}: {reason}"
        ) from error
    return where


def raised(error: Exception) -> str:
    """What a kernel raised, in one line."""
    return " ".join([f"raised {type(error).__name__}:", *str(error).split("\n")[:1]])


def _judge(operation: Operation, case: Case, backend: str, device: torch.device) -> tuple[str, str]:
    layout = case.make_layout()
    C = operation.channels(case.channels)
    inputs = operation.make(Numbers(11), layout, C, case.dtype)
    there = TokenLayout.from_active_steps(layout.active_steps.to(device), layout.T)
    moved = {name: x.to(device) for name, x in inputs.items()}
    backward = case.backward and bool(operation.leaves)
    want = _run(operation, "dense", "reference", layout, inputs, backward)
    for form in ("packed", "dense"):
        try:
            got = _run(operation, form, backend, there, moved, backward)
        except BackendError as error:
            return "unsupported", f"{form}: {error}"
        except Exception as error:  # whatever a kernel raises is a finding, not the end
            return "fail", f"{form}: {raised(error)}"
        for i, (ours, theirs) in enumerate(zip(got[0], want[0], strict=True)):
            found = difference(ours.cpu(), theirs, None)
            if found:
                return "fail", f"{form}, result {i}{found}"
        for leaf, theirs in want[1].items():
            found = difference(got[1][leaf].cpu(), theirs, GRADIENT_TOLERANCE[case.dtype])
            if found:
                return "fail", f"{form}, gradient of {leaf}{found}"
    return "pass", ""


def _run(
    operation: Operation, form: str, backend: str, layout: TokenLayout, inputs: Inputs,
    backward: bool,
) -> tuple[Outputs, dict[str, Tensor]]:  # fmt: skip
    if backward:
        return gradients(operation, form, backend, layout, inputs, Numbers(12))
    return getattr(operation, form)(backend, layout, **inputs), {}


def difference(
    ours: Tensor,
    theirs: Tensor,
    tolerance: float | None = None,
    where: Callable[[tuple[int, ...]], str] = lambda index: "",
) -> str:
    """Where two tensors first differ, if they do; without a tolerance in any bit.

    ``where`` says in words where an index is.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return (
            f": expected {theirs.dtype} of shape {tuple(theirs.shape)}, "
            f"got {ours.dtype} of shape {tuple(ours.shape)}"
        )
    if not ours.numel():
        return ""
    if tolerance is None:
        same = ours == theirs
    else:
        scale = 1 + float(theirs.abs().max())
        same = torch.isclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)
    if bool(same.all()):
        return ""
    at = tuple((~same).nonzero()[0].tolist())
    differ = int((~same).sum())
    return (
        f" at {list(at)}{where(at)}: expected {_shown(theirs, at)}, got {_shown(ours, at)} "
        f"({differ} of {same.numel()} differ)"
    )


def _shown(x: Tensor, at: Any) -> str:
    """One element; floats in as few digits as tell them from their neighbours."""
    value = x[at].item()
    return f"{value:.9g}" if x.dtype == torch.float32 else str(value)
