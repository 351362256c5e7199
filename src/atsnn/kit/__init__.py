"""The cases that judge atsnn's own kernels, for anyone's: see ``docs/checking_a_kernel.md``.

Public through :mod:`atsnn.testing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..checks import InvalidType, InvalidValue, check_choice
from ..conformance import Finding, device_here
from . import neuron, tokens
from .case import Case, table
from .judge import RESULTS, Kernel, check_kernel, judge
from .report import ConformanceError, Report

__all__ = [
    "OPS",
    "Case",
    "ConformanceError",
    "Finding",
    "Report",
    "cases",
    "check",
    "check_cases",
    "findings",
    "name_of",
]

OPS = tuple(RESULTS)


def cases(
    op: str = "neuron", only: Sequence[str] | str | None = None, gradients: bool = True
) -> list[Case]:
    """The cases of one operation.

    Parameters
    ----------
    op : str
        A function of :mod:`atsnn.functional`.
    only : str or sequence of str, optional
        Names of cases, or patterns of them such as ``"*gradient*"``. Default: all.
    gradients : bool
        Whether to include the cases that compare gradients.
    """
    check_choice("check", "op", op, OPS)
    found = [*neuron.cases(op), *tokens.cases(op), *table(op)]
    patterns = [only] if isinstance(only, str) else only
    if patterns is not None and not (
        isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
    ):
        raise InvalidType(f"check: only must be a name, a pattern or a list of them, got {only!r}")
    for pattern in patterns or ():
        if not any(_matches(case, pattern) for case in found):
            raise InvalidValue(
                f"check: only must name cases of {op}, such as {found[0].name!r}, or be a pattern "
                f"such as '*gradient*', got {pattern!r}"
            )
    if patterns is not None:
        found = [case for case in found if any(_matches(case, pattern) for pattern in patterns)]
    return [case for case in found if gradients or not case.leaves]


def _matches(case: Case, pattern: str) -> bool:
    return pattern in (case.name, case.label, case.group) or fnmatchcase(case.name, pattern)


def findings(fn: Kernel, chosen: Sequence[Case], device: str = "cpu") -> Iterator[Finding]:
    """What a kernel does on these cases of one operation, as it is found."""
    where = device_here("check", device)
    for op in dict.fromkeys(case.op for case in chosen):
        check_kernel(op, fn)
    for case in chosen:
        yield judge(case, fn, where)


def check(
    fn: Kernel, op: str = "neuron", *, device: str = "cpu", only: Sequence[str] | str | None = None,
    gradients: bool = True, raises: bool = True,
) -> Report:  # fmt: skip
    """Judge a kernel: whether ``fn`` computes what ``atsnn.functional.<op>`` is.

    Parameters
    ----------
    fn : callable
        With the parameters of the operation, by name (``backend`` is never given). It may lack
        some, and may raise ``NotImplementedError``: such cases are *not supported*, which is no
        failure.
    op : str
        The operation: ``neuron``, ``spiking_attention``, ``spike_driven_attention``,
        ``match_tokens``, ``merge_tokens``, ``unmerge_tokens``, ``take_rows``, ``halt``,
        ``halting_scores``, ``readout``, ``firing_counts``, ``spike_linear_lif``,
        ``pack_spikes`` or ``unpack_spikes``.
    device : str
        Where tensors are handed over.
    only : str or sequence of str, optional
        Names of cases or patterns of them. Default: all.
    gradients : bool
        Whether to compare gradients too.
    raises : bool
        Whether a failure raises.

    Returns
    -------
    Report
        ``.ok``, ``.findings``, ``.failures``; its text is the table of what did not pass.

    Raises
    ------
    ConformanceError
        If a case failed and ``raises``: an ``AssertionError`` with that table as its text.

    Notes
    -----
    Results must be the same bits as the reference's, gradients may differ by a relative 1e-5
    (1e-12 in float64). Inputs lie inside larger buffers of NaN and must not be written into;
    ``torch.empty`` gives NaN meanwhile.

    Examples
    --------
    >>> import atsnn.functional as F
    >>> check(F.neuron, only="neuron: fires at the threshold exactly").ok
    True
    """
    __tracebackhide__ = True  # pytest shows the caller, not this
    return check_cases(fn, cases(op, only, gradients), device, raises)


def check_cases(
    fn: Kernel, chosen: Sequence[Case], device: str = "cpu", raises: bool = True
) -> Report:
    """As :func:`check`, on cases of one operation that were chosen before."""
    __tracebackhide__ = True
    op = chosen[0].op if chosen else ""
    report = Report(name_of(fn), op, device, list(findings(fn, chosen, device)))
    if raises and not report.ok:
        raise ConformanceError(report)
    return report


def name_of(fn: Any) -> str:
    """What people call a function."""
    fn = getattr(fn, "func", fn)  # of a partial
    return getattr(fn, "__qualname__", type(fn).__qualname__)
