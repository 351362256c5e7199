"""What ``compare.py`` takes for noise, and what for a change.

A round of a case gives two numbers: the log ratio of head to the (geometric) mean of the two
processes of base, which is the change, and that of the second of these to the first, the control,
whose true value is known: none. Of either the median over the rounds is taken, and its standard
error from the median absolute deviation, so that single rounds, however bad, count for little. A
case changed if its median exceeds all of

- the least that is worth a name, 3 %;
- ``K`` = 3 of its standard errors. The error is itself estimated, so that of normal noise 0.9 %
  exceeds this in 18 rounds; of 14 cases one in every eighth run, by this bar alone;
- the median of its own control;
- the largest median of a control that exceeds ``K`` of its own errors. Such a one is hardly chance:
  two processes of the same code differed, by where their memory lies or by how the machine treats
  them, and what befell this control can befall any case. A control that is large because its case
  is noisy counts for that case alone; otherwise one noisy case would hide all the others;

and does so in the same direction in two looks, the second in new processes and with twice as many
rounds.

``tests/test_bench_compare.py`` counts on made-up runs of 14 cases, whose processes differ by 1 %
and whose rounds by 3 % and now and then by half: 3 of 200 runs name a case, slower or faster.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

K = 3.0
# Standard error of a median of normal numbers: sqrt(pi / 2) of that of their mean; their standard
# deviation: 1.4826 of the median absolute deviation.
ERROR = math.sqrt(math.pi / 2) * 1.4826


@dataclass
class Times:
    """Seconds of a case in one look, round by round."""

    base: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)

    @property
    def changes(self) -> list[float]:
        """Log ratios of head to base."""
        rounds = zip(self.base, self.again, self.head, strict=True)
        return [math.log(head / math.sqrt(base * again)) for base, again, head in rounds]

    @property
    def controls(self) -> list[float]:
        """Log ratios of base to base."""
        return [math.log(b / a) for a, b in zip(self.base, self.again, strict=True)]


def center(values: Sequence[float]) -> tuple[float, float]:
    """The median and its standard error."""
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return middle, ERROR * deviation / math.sqrt(len(values))


def shared_noise(looks: Iterable[Mapping[str, Times]]) -> float:
    """The largest control of a run that is no chance."""
    controls = [center(times.controls) for look in looks for times in look.values()]
    return max((abs(middle) for middle, error in controls if abs(middle) > K * error), default=0.0)


@dataclass(frozen=True)
class Finding:
    """What was found of a case; change and noise as log ratios.

    ``verdict``: ``slower``, ``faster``, ``same``, or ``new`` where base cannot run it.
    """

    case: str
    verdict: str
    base_s: float | None = None
    head_s: float | None = None
    change: float | None = None
    noise: float | None = None

    def row(self) -> dict[str, Any]:
        """The finding in milliseconds and per cent."""
        return {
            "case": self.case, "verdict": self.verdict,
            "base_ms": None if self.base_s is None else 1e3 * self.base_s,
            "head_ms": None if self.head_s is None else 1e3 * self.head_s,
            "change_percent": None if self.change is None else 100 * math.expm1(self.change),
            "noise_percent": None if self.noise is None else 100 * math.expm1(self.noise),
        }  # fmt: skip


def judge(case: str, times: Times, shared: float, least: float) -> Finding:
    """The verdict of one look on a case; ``shared`` from :func:`shared_noise`."""
    change, error = center(times.changes)
    noise = max(K * error, abs(center(times.controls)[0]), shared)
    changed = abs(change) > max(noise, math.log1p(least))
    verdict = ("slower" if change > 0 else "faster") if changed else "same"
    base, head = (statistics.median(x) for x in (times.base + times.again, times.head))
    return Finding(case, verdict, base, head, change, noise)


def judge_all(looks: Sequence[Mapping[str, Times]], least: float) -> list[Finding]:
    """What the last look at each case says, where no earlier one says otherwise."""
    shared = shared_noise(looks)
    found: dict[str, Finding] = {}
    for look in looks:
        for case, times in look.items():
            now = judge(case, times, shared, least)
            if case in found and found[case].verdict != now.verdict:
                now = replace(now, verdict="same")
            found[case] = now
    return list(found.values())
