"""What a kernel did on all cases, to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..checks import AtsnnError
from ..conformance import CASES, Finding

MARKS = {"pass": "pass", "fail": "FAIL", "unsupported": "not supported"}


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
        found = {kind: sum(f.result == kind for f in self.findings) for kind in MARKS}
        words = {"pass": "passed", "fail": "failed", "unsupported": "not supported"}
        return ", ".join(f"{n} {words[kind]}" for kind, n in found.items() if n or kind == "pass")

    @property
    def title(self) -> str:
        return f"{self.kernel} as {self.op} on {self.device}, against the reference"

    def __str__(self) -> str:
        """The failures and what is not supported, then how many passed."""
        lines = [self.title]
        for case, mark, detail in rows([f for f in self.findings if f.result != "pass"]):
            lines += [f"  {mark}  {case}", *[f"        {detail}"] * bool(detail)]
        return "\n".join([*lines, self.counts])


def rows(findings: Sequence[Finding]) -> Iterator[tuple[str, str, str]]:
    """``(case, mark, detail)``; neighbours of one group that did the same share a row."""

    def alike(f: Finding) -> tuple[str, ...]:
        return f.operation, f.result, f.detail

    for (group, result, detail), same in groupby(findings, alike):
        cases = [f.case for f in same]
        # A named case that passed keeps its row: its name says what was shown.
        apart = result == "pass" and not set(cases) <= set(CASES)
        for label in cases if apart else [", ".join(cases)]:
            yield f"{group}: {label}", MARKS[result], detail
