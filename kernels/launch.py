"""What launchers share: arithmetic types, block sizes, the views that kernels read strides of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Each operation is rounded once: no contraction to fused multiply-add.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """Arithmetic is float32 whatever the storage type; float64 is kept for gradient checks."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_block(C: int, most: int) -> int:
    """Channels a program takes: a power of two, the largest that leaves few of its lanes idle."""
    largest = min(most, max(16, triton.next_power_of_2(C)))
    sizes = [largest >> k for k in range(largest.bit_length() - 4)]
    covered = {size: triton.cdiv(C, size) * size for size in sizes}
    return next((size for size in sizes if covered[size] * 8 <= C * 9), min(sizes, key=covered.get))


def program_elements(x: Tensor) -> int:
    """Elements a program moves, so that its threads move 128 bits each on every target."""
    return 4096 // x.element_size()


def row_block(N: int, elements: int, channels: int) -> int:
    """Rows beside that many channels, for about ``elements`` a program."""
    return max(1, min(triton.next_power_of_2(max(N, 1)), elements // channels))


def planes(
    shape: Sequence[int], tensors: Sequence[Tensor], last: bool = False
) -> tuple[int, int, list[Tensor]]:
    """Rows and columns into which the dimensions of ``shape`` fold, in all the tensors.

    ``tensors`` end in these dimensions; ``last`` makes the last one the columns. Folding copies
    nothing; tensors whose strides do not fold into two dimensions are copied.
    """
    for cut in range(max(len(shape) - 1, 0) if last else 0, len(shape)):
        rows, columns = _product(shape[:cut]), _product(shape[cut:])
        folded = [_fold(x, len(shape), rows, columns) for x in tensors]
        if all(view is not None for view in folded):
            return rows, columns, folded
    columns = shape[-1] if last and shape else _product(shape)
    rows = _product(shape) // columns if columns else 0
    lead = [x.shape[: x.dim() - len(shape)] for x in tensors]
    return rows, columns, [
        x.contiguous().view(*head, rows, columns) for x, head in zip(tensors, lead, strict=True)
    ]  # fmt: skip


def _product(sizes: Sequence[int]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def _fold(x: Tensor, dims: int, rows: int, columns: int) -> Tensor | None:
    try:
        return x.view(*x.shape[: x.dim() - dims], rows, columns)
    except RuntimeError:
        return None
