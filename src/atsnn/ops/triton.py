"""Triton's kernels behind the operators: whether they can run, and their registration.

The kernels are in :mod:`atsnn.kernels`, which imports triton and is imported on the first call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checks import BackendError
from .library import LIBRARY, OPERATORS, TRITON_LIBRARY, WITHOUT_KERNEL

OLDEST = (3, 6)  # the oldest that passes "atsnn check": earlier ones have no float64 products
INTERPRETER = "TRITON_INTERPRET"
# Triton's interpreter runs the kernels, on tensors of any device. Triton asks once, and so do we.
interpreted = os.environ.get(INTERPRETER, "").lower() in ("1", "true", "yes", "on", "y")


def _version() -> str:
    """Of the distribution that brings triton, whose name is not the same everywhere."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get("triton")
        return importlib.metadata.version(names[0]) if names else "0.0, from no package"


def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'atsnn[triton]'"
    version = _version()
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return f"triton {wanted} or newer is needed, got {version}"
    return None


# Why the kernels cannot be imported, if they cannot.
package_missing = _why_missing()


def triton_missing() -> str | None:
    """Why Triton cannot be used on any tensor here, if it cannot."""
    missing = package_missing
    if missing is None and not interpreted and not torch.cuda.is_available():
        return (
            f"no CUDA device ({INTERPRETER}=1, set before Python starts, runs the kernels on the "
            "CPU, slowly)"
        )
    return missing


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton cannot be used on tensors on ``device``, if it cannot."""
    missing = triton_missing()
    if missing is not None or interpreted or device.type in ("cuda", "meta"):
        return missing
    return f"Triton's kernels run on CUDA tensors, got a tensor on {device}"


def _launcher(name: str) -> Callable[..., Any]:
    @torch.no_grad()
    def launch(*arguments: Any) -> Any:
        try:
            kernels = importlib.import_module("atsnn.kernels")
        except ImportError as error:
            raise BackendError(f"{name}: Triton's kernels do not load: {error}") from error
        with _device_of(arguments):
            return getattr(kernels, name)(*arguments)

    return launch


def _device_of(arguments: Sequence[Any]) -> contextlib.AbstractContextManager[object]:
    """Makes the tensors' GPU the current one: Triton launches there, whatever the tensors say."""
    device = next((x.device for x in arguments if isinstance(x, torch.Tensor)), None)
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.device(device)


for _name in set(OPERATORS).difference(WITHOUT_KERNEL):
    torch.library.impl(TRITON_LIBRARY, _name, "CompositeExplicitAutograd")(_launcher(_name))
    if package_missing is None:
        torch.library.impl(LIBRARY, _name, "CUDA")(_launcher(_name))
