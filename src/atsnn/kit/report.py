"""What a kernel did on all cases, to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..checks import AtsnnError
from ..conformance import CASES, Finding

RESULTS = {"pass": "passed", "fail": "failed", "unsupported": "not supported"}


class ConformanceError(AtsnnError, AssertionError):
    """A kernel that does not compute what the operation is.

    Attributes
    ----------
    report : Report
    """

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Report:
    """What a kernel did on each case.

    Attributes
    ----------
    kernel, op, device : str
        The function that was judged, the operation it is to be, where it ran.
    findings : list of Finding
        One for each case.
    """

    kernel: str
    op: str
    device: str
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; what is not supported is no failure."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        return [f for f in self.findings if f.result == "fail"]

    @property
    def unsupported(self) -> list[Finding]:
        return [f for f in self.findings if f.result == "unsupported"]

    @property
    def counts(self) -> str:
        """How many cases passed, failed and were not supported."""
        found = {kind: sum(f.result == kind for f in self.findings) for kind in RESULTS}
        return ", ".join(f"{n} {RESULTS[kind]}" for kind, n in found.items() if n)

    @property
    def title(self) -> str:
        return f"{self.kernel} as {self.op} on {self.device}, against the reference"

    def __str__(self) -> str:
        """The failures, what is not supported and why, then how many passed."""
        lines = [self.title]
        for case, detail in rows(self.failures):
            lines += [f"  FAIL  {case}", f"        {detail}"]
        for reason, cases in reasons(self.unsupported).items():
            lines += [f"  not supported  {reason}", *[f"        {case}" for case in cases]]
        return "\n".join([*lines, self.counts])


def rows(findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """``(name, detail)`` of cases that did the same.

    Layouts and sizes of one operation share a row, with the detail of the first.
    """
    for (group, columns), same in groupby(findings, lambda f: (f.operation, f.case in CASES)):
        alike = list(same)
        if columns:
            first = f"{alike[0].case}: " if len(alike) > 1 and alike[0].detail else ""
            names = ", ".join(f.case for f in alike)
            yield f"{group}: {names}", first + alike[0].detail
        else:
            yield from ((f"{group}: {f.case}", f.detail) for f in alike)


def reasons(unsupported: Sequence[Finding]) -> dict[str, list[str]]:
    """The cases that are not supported, by why."""
    why = dict.fromkeys(f.detail for f in unsupported)
    return {
        reason: [name for name, _ in rows([f for f in unsupported if f.detail == reason])]
        for reason in why
    }
