"""One call of one operation that a kernel is judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..cases import OPERATIONS, Arguments, Numbers, Operation
from ..conformance import CASES
from ..conformance import Case as Column

DEFAULT = "contiguous"


@dataclass(frozen=True)
class Case:
    """One call of an operation, and what is compared of it: results or gradients.

    Attributes
    ----------
    op : str
        A function of :mod:`atsnn.functional`.
    group, label : str
        What it is about; together its name.
    make : callable
        Gives the arguments of the call by name, tensors on the CPU.
    leaves : tuple of str
        The arguments whose gradients are compared. Without any the results are.
    memory : {"contiguous", "every second", "last first"}
        How the tensors lie in memory; see :mod:`.inputs`.
    """

    op: str
    group: str
    label: str
    make: Callable[[], Arguments]
    leaves: tuple[str, ...] = ()
    memory: str = DEFAULT

    @property
    def name(self) -> str:
        return f"{self.group}: {self.label}"


def named(op: str, group: str | None = None) -> Callable[..., Case]:
    """Make cases of ``op`` from a label and the arguments of the call."""

    def case(
        label: str, make: Callable[[], Arguments], leaves: str = "", memory: str = DEFAULT,
        **settings: Any,
    ) -> Case:  # fmt: skip
        return Case(
            op, group or op, label, lambda: make() | settings, tuple(leaves.split()), memory
        )

    return case


def table(op: str) -> list[Case]:
    """The rows of :data:`atsnn.cases.OPERATIONS` that call ``op``, in every layout and size."""
    found = []
    for row, operation in OPERATIONS.items():
        if operation.function != op:
            continue
        for form in operation.forms:
            for label, column in CASES.items():
                make = partial(_arguments, operation, form, column)
                found.append(Case(op, f"{row}, {form}", label, make))
            if not operation.leaves:
                continue
            for label, column in CASES.items():
                if column.backward:
                    make = partial(_arguments, operation, form, column)
                    found.append(
                        Case(op, f"{row}, {form}, gradient", label, make, operation.leaves)
                    )
    return found


def _arguments(operation: Operation, form: str, column: Column) -> Arguments:
    layout = column.make_layout()
    C = operation.channels(column.channels)
    inputs = operation.make(Numbers(11), layout, C, column.dtype)
    return operation.arguments(layout, form == "packed", **inputs)
