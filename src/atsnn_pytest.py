"""The pytest plugin: a test for each case that judges a kernel.

::

    @pytest.mark.atsnn_kernel(op="neuron")
    def test_my_neuron(atsnn_case):
        atsnn_case.check(my_neuron)

Nothing of atsnn is imported until a test asks for ``atsnn_case``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from atsnn.kit import Case

MARK = "atsnn_kernel"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARK}(op='neuron', device='cpu', only=None, gradients=True): the test is run once for "
        "each case of the operation, which it takes as atsnn_case; see atsnn.testing.check",
    )


class KernelCase:
    """One case of the kit, as a test takes it.

    Attributes
    ----------
    case : atsnn.testing.Case
        ``case.name`` says what it shows.
    device : str
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device

    def check(self, kernel: Any) -> None:
        """Fail, with where it differs, if the kernel is wrong; skip if it does not support it."""
        __tracebackhide__ = True
        from atsnn.kit import check_cases

        for finding in check_cases(kernel, [self.case], self.device).unsupported:
            pytest.skip(f"not supported: {finding.detail}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "atsnn_case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker(MARK)
    if marker is None:
        pytest.fail(
            f"expected @pytest.mark.{MARK}(op=...) on a test that takes atsnn_case, got none",
            pytrace=False,
        )
    cases = _cases(*marker.args, **marker.kwargs)
    metafunc.parametrize("atsnn_case", cases, ids=[c.case.name for c in cases])


def _cases(
    op: str = "neuron", device: str = "cpu", only: Any = None, gradients: bool = True
) -> list[KernelCase]:
    from atsnn.checks import AtsnnError
    from atsnn.kit import cases

    try:
        return [KernelCase(case, device) for case in cases(op, only, gradients)]
    except AtsnnError as error:
        pytest.fail(f"@pytest.mark.{MARK}: {error}", pytrace=False)
