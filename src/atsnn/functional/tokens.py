"""Checks of what the operations share: tokens, dense or packed, and their sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    InvalidType,
    InvalidValue,
    check_device,
    check_dtype,
    check_finite,
    check_integer,
    check_like,
    check_shape,
    check_tensor,
    values_visible,
)
from ..layout import TokenLayout


def check_layout(op: str, layout: TokenLayout, x: Tensor) -> None:
    if not isinstance(layout, TokenLayout):
        raise InvalidType(f"{op}: layout must be a TokenLayout, got {type(layout).__name__}")
    check_device(op, "the layout", layout.token, "the tokens", x)


def check_rows(op: str, name: str, x: Tensor, layout: TokenLayout) -> None:
    """Check that ``x [R, C]`` holds the rows of ``layout``."""
    check_layout(op, layout, x)
    check_shape(op, name, x, R=layout.num_rows, C=None)


def check_tokens(op: str, name: str, x: Tensor, layout: TokenLayout | None) -> None:
    """Check dense tokens ``[T, B, N, C]`` or the rows ``[R, C]`` of a layout."""
    check_tensor(op, name, x)
    check_dtype(op, name, x)
    if layout is None:
        check_shape(op, name, x, T=None, B=None, N=None, C=None)
    else:
        check_rows(op, name, x, layout)


def images_of(x: Tensor, layout: TokenLayout | None) -> tuple[int, int]:
    """``(B, N)`` of dense tokens or of rows."""
    return (x.shape[1], x.shape[2]) if layout is None else (layout.B, layout.N)


def check_qkv(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    sizes: Tensor | None,
    layout: TokenLayout | None,
) -> Tensor | None:
    """Check what attention is given; the sizes in float32."""
    check_tokens(op, "q", q, layout)
    for name, other in (("k", k), ("v", v)):
        check_like(op, name, check_tensor(op, name, other), "q", q)
    check_integer(op, "num_heads", num_heads, at_least=1)
    if q.shape[-1] % num_heads:
        raise InvalidValue(
            f"{op}: num_heads must divide the {q.shape[-1]} channels, got {num_heads}"
        )
    return None if sizes is None else check_sizes(op, sizes, *images_of(q, layout), q)


def check_sizes(op: str, sizes: Tensor, B: int, N: int, like: Tensor) -> Tensor:
    """Checked sizes ``[B, N]``, in float32."""
    check_shape(op, "sizes", check_tensor(op, "sizes", sizes), B=B, N=N)
    check_device(op, "sizes", sizes, "the tokens", like)
    check_finite(op, "sizes", sizes)
    if values_visible(sizes) and bool((sizes < 0).any()):
        raise InvalidValue(f"{op}: sizes must be at least 0, got {float(sizes.min())}")
    return sizes.to(torch.float32)
