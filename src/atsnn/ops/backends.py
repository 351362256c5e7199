"""Who computes: the native kernels, Triton or the reference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..checks import BackendError, check_choice
from .library import native, native_missing
from .triton import interpreted, triton_missing, triton_refusal

BACKENDS = ("auto", "native", "triton", "reference")

# A plain global, which torch.compile guards on; a context variable it would silently ignore.
_chosen = "auto"


def native_level() -> str | None:
    """Instruction set of the native kernels in use (``"avx512"``, ...), None if not built."""
    return native.level() if native is not None else None


def available_backends() -> dict[str, bool | str]:
    """Each backend, with ``True`` or the reason why it cannot be used here."""
    missing = triton_missing()
    return {
        "native": True if native is not None else native_missing,
        "triton": True if missing is None else missing,
        "reference": True,
    }


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Use ``backend`` for every call inside that does not name one itself, in every thread."""
    global _chosen
    check_choice("use_backend", "backend", backend, BACKENDS)
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


def serving_backend(op: str, backend: str, device: torch.device) -> str:
    """The name of the backend that serves the call, as it should be told to people."""
    operators = resolve_backend(op, backend, device)
    if operators is None:
        return "reference"
    if operators is torch.ops.atsnn:
        return "native"
    return "triton, interpreted" if interpreted else "triton"


def kernels_serve(device: torch.device) -> bool:
    """Whether calls that name no backend are served by kernels, not by the reference, there."""
    if _chosen == "reference":
        return False
    if _chosen == "triton" or device.type == "cuda":
        return triton_refusal(device) is None
    return device.type == "cpu" and native is not None


def native_serves(device: torch.device) -> bool:
    """Whether calls that name no backend are served by the native kernels there."""
    return native is not None and device.type == "cpu" and _chosen in ("auto", "native")


_warned: set[str] = set()


def resolve_backend(op: str, backend: str, device: torch.device) -> Any:
    """The operators that serve the call: a namespace of ``torch.ops``, ``None`` for the reference.

    A backend that was named and cannot serve raises; ``auto`` falls back to the reference and
    warns once why.
    """
    check_choice(op, "backend", backend, BACKENDS)
    if backend == "auto":
        backend = _chosen
    if backend == "reference":
        return None
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        reason = triton_refusal(device)
        operators = torch.ops.atsnn_triton
    else:
        operators = torch.ops.atsnn
        if device.type not in ("cpu", "meta"):
            reason = f"the native kernels run on CPU tensors, got a tensor on {device}"
        else:
            reason = native_missing if native is None else None
    if reason is None:
        return operators
    if backend != "auto":
        raise BackendError(f"{op}: backend {backend!r} cannot serve the call: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"atsnn computes with the reference: {reason}", stacklevel=4)
    return None
