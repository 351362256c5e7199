"""The cases that judge atsnn's own kernels, for anyone's: see ``docs/checking_a_kernel.md``.

Public through :mod:`atsnn.testing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..checks import InvalidValue, check_choice
from ..conformance import Finding, device_here
from . import neuron, tokens
from .case import Case, table
from .judge import RESULTS, Kernel, check_kernel, judge
from .report import ConformanceError, Report

__all__ = ["OPS", "Case", "ConformanceError", "Finding", "Report", "cases", "check", "findings"]

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
    for pattern in [only] if isinstance(only, str) else only or ():
        if not any(_matches(case, pattern) for case in found):
            raise InvalidValue(
                f"check: only must name cases of {op}, such as {found[0].name!r}, or be a pattern "
                f"such as '*gradient*', got {pattern!r}"
            )
    chosen = [only] if isinstance(only, str) else only
    return [
        case for case in found
        if (chosen is None or any(_matches(case, pattern) for pattern in chosen))
        and (gradients or not case.leaves)
    ]  # fmt: skip


def _matches(case: Case, pattern: str) -> bool:
    return pattern in (case.name, case.label, case.group) or fnmatchcase(case.name, pattern)


def findings(
    fn: Kernel, op: str = "neuron", *, device: str = "cpu", only: Sequence[str] | str | None = None,
    gradients: bool = True,
) -> Iterator[Finding]:  # fmt: skip
    """What :func:`check` reports, case by case as it is found."""
    chosen = cases(op, only, gradients)
    check_kernel(op, fn)
    where = device_here("check", device)
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
    found = list(findings(fn, op, device=device, only=only, gradients=gradients))
    report = Report(name_of(fn), op, device, found)
    if raises and not report.ok:
        raise ConformanceError(report)
    return report


def name_of(fn: Any) -> str:
    """What people call a function."""
    fn = getattr(fn, "func", fn)  # of a partial
    return getattr(fn, "__qualname__", type(fn).__qualname__)
