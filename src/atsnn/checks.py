"""Errors and argument checks: every message says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = [
    "AtsnnError",
    "BackendError",
    "CheckpointError",
    "InvalidType",
    "InvalidValue",
    "MissingDependency",
]

STORAGE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class AtsnnError(Exception):
    """Base of every error that atsnn raises on purpose."""


class InvalidValue(AtsnnError, ValueError):
    """A value, shape or range that the call cannot take."""


class InvalidType(AtsnnError, TypeError):
    """A type or dtype that the call cannot take."""


class BackendError(AtsnnError, RuntimeError):
    """A backend that was named and cannot serve the call."""


class CheckpointError(AtsnnError, ValueError):
    """A checkpoint that is missing, damaged, of another version or not ours."""


class MissingDependency(AtsnnError, ImportError):
    """An optional package that the call needs and that is not installed."""


# Where a check may look at values. Elsewhere that would wait for the device, block after block;
# kernels stay inside their tensors whatever the values are.
HOST_DEVICES = {"cpu"}


def values_visible(tensor: Tensor) -> bool:
    """Whether checks may look at values: on the host, and not while a graph is being traced."""
    return not torch.compiler.is_compiling() and tensor.device.type in HOST_DEVICES


# From PyTorch 2.7 on.
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def certain(condition: bool) -> bool:
    """``condition`` on sizes; False where ``torch.export`` has symbols for them and cannot say."""
    if not _exporting():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def shape_of(tensor: Tensor | Sequence[int]) -> str:
    sizes = tensor.shape if isinstance(tensor, Tensor) else tensor
    return "(" + ", ".join(str(int(size)) for size in sizes) + ")"


def check_tensor(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidType(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def check_shape(op: str, name: str, tensor: Tensor, **dims: int | None) -> None:
    """Check ``tensor`` against named dimensions; ``None`` accepts any size."""
    want = list(dims.values())
    if tensor.dim() == len(want) and all(
        size is None or size == got for size, got in zip(want, tensor.shape, strict=True)
    ):
        return
    names = ", ".join(dims)
    sizes = ", ".join("*" if size is None else str(int(size)) for size in want)
    expected = f"({names})" if all(size is None for size in want) else f"({names}) = ({sizes})"
    raise InvalidValue(f"{op}: {name} must have shape {expected}, got {shape_of(tensor)}")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that ``tensor`` has the shape, dtype and device of ``other``."""
    if tensor.shape != other.shape:
        raise InvalidValue(
            f"{op}: {name} must have the shape of {other_name}, {shape_of(other)}, "
            f"got {shape_of(tensor)}"
        )
    if tensor.dtype != other.dtype:
        raise InvalidType(
            f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}"
        )
    check_device(op, name, tensor, other_name, other)


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise InvalidValue(
            f"{op}: {name} must be on the device of {other_name}, {other.device}, "
            f"got {tensor.device}"
        )


def check_dtype(
    op: str, name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = STORAGE_DTYPES
) -> None:
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InvalidType(f"{op}: {name} must be one of {names}, got {tensor.dtype}")


def check_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    # A tuple: a value that cannot be hashed is a wrong value, not an error of its own.
    if value not in tuple(choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise InvalidValue(f"{op}: {name} must be one of {listed}, got {value!r}")


def check_number(
    op: str,
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Check a finite real number and its range."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(f"{op}: {name} must be a number, got {value!r}")
    wanted = []
    if above is not None:
        wanted.append((value > above, f"> {above}"))
    if at_least is not None:
        wanted.append((value >= at_least, f">= {at_least}"))
    if below is not None:
        wanted.append((value < below, f"< {below}"))
    if at_most is not None:
        wanted.append((value <= at_most, f"<= {at_most}"))
    if not math.isfinite(value) or not all(good for good, _ in wanted):
        ranges = " and ".join(text for _, text in wanted) or "finite"
        raise InvalidValue(f"{op}: {name} must be a number {ranges}, got {value!r}")
    return value


def check_integer(
    op: str, name: str, value: object, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{op}: {name} must be an integer, got {value!r}")
    check_number(op, name, value, at_least=at_least, at_most=at_most)
    return value


def check_finite(op: str, name: str, tensor: Tensor) -> None:
    """Check that every element is finite, where values are visible."""
    if not values_visible(tensor) or not tensor.is_floating_point():
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InvalidValue(
            f"{op}: {name} must be finite, got {bad} NaN or infinite values of {tensor.numel()}"
        )


def require(package: str, extra: str, what: str) -> None:
    """Check that the optional ``package`` can be imported, or name the extra that brings it."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"{what} needs {package}, which is not installed: pip install 'atsnn[{extra}]'"
        )
