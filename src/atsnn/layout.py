"""Which rows exist: the cells of one block that are active, in the order they are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .checks import (
    InvalidType,
    InvalidValue,
    certain,
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_tensor,
    shape_of,
    values_visible,
)

__all__ = ["TokenLayout"]

MOST_TIMESTEPS = 1 << 20  # the twin of most_timesteps in csrc/bindings/layout.cpp


@dataclass(frozen=True, eq=False, repr=False)
class TokenLayout:
    """The rows of one block's active cells.

    A token that is active for ``n`` timesteps is active at timesteps ``0 .. n - 1``. Rows are
    ordered by timestep, then image, then rank, where the tokens of an image are ranked by ``n``,
    descending, ties by token index::

        m[t, b]      = number of tokens of image b active at timestep t
        offsets      = exclusive cumulative sum of m over (t, b)
        row(t, b, r) = offsets[t * B + b] + r          for r < m[t, b]
        token[b, r]  = original index of the token of rank r

    So each ``(t, b)`` is one contiguous run of rows, and a token keeps its rank through time.

    Attributes
    ----------
    T, B, N : int
        Timesteps, images, tokens per image.
    num_rows : int
        Number of active cells.
    active_steps : Tensor
        ``[B, N]`` int64, the number of timesteps each token is active.
    token : Tensor
        ``[B, N]`` int64, the token at each rank.
    offsets : Tensor
        ``[T * B + 1]`` int64.
    padded : bool
        Whether rows are as many as there could ever be, ``num_rows = T * B * N``, of which those
        past ``offsets[-1]`` mean nothing. Then nobody need know how many are active, which on a
        GPU is known only after waiting for it.

    Raises
    ------
    InvalidValue
        If ``token`` and ``offsets`` are not what ``active_steps`` gives.
    """

    T: int
    B: int
    N: int
    num_rows: int
    active_steps: Tensor
    token: Tensor
    offsets: Tensor
    padded: bool = False

    def __post_init__(self) -> None:
        op = "TokenLayout"
        token, offsets = rank_tokens(op, self.active_steps, self.T)
        for name, value, want in (("token", self.token, token), ("offsets", self.offsets, offsets)):
            check_tensor(op, name, value)
            check_dtype(op, name, value, (torch.int64,))
            check_device(op, name, value, "active_steps", self.active_steps)
            if not torch.equal(value, want):
                raise InvalidValue(
                    f"{op}: {name} must be what the active steps give, {_short(want)}, "
                    f"got {_short(value)}"
                )
        B, N = self.active_steps.shape
        parts = (B, N, self.T * B * N if self.padded else int(offsets[-1]))
        for name, found, size in zip(
            ("B", "N", "num_rows"), (self.B, self.N, self.num_rows), parts, strict=True
        ):
            if found != size:
                raise InvalidValue(
                    f"{op}: {name} must be {size} for these active steps, got {found}"
                )

    @classmethod
    def _trusted(
        cls, T: int, n: Tensor, token: Tensor, offsets: Tensor, rows: int | None, padded: bool
    ) -> TokenLayout:
        """Without the checks, of parts that were just computed; ``rows``: if they are known."""
        layout = object.__new__(cls)
        # Not int(): torch.export makes a symbol of an item.
        rows = cast(int, offsets[-1].item()) if rows is None else rows
        for name, value in (
            ("T", T), ("B", n.shape[0]), ("N", n.shape[1]), ("num_rows", rows),
            ("active_steps", n), ("token", token), ("offsets", offsets), ("padded", padded),
        ):  # fmt: skip
            object.__setattr__(layout, name, value)
        return layout

    @classmethod
    def from_active_steps(cls, n: Tensor, T: int) -> TokenLayout:
        """Build the layout from the number of timesteps each token is active.

        Parameters
        ----------
        n : Tensor
            ``[B, N]`` integer, in ``0 .. T``.
        T : int
            Number of timesteps.

        Notes
        -----
        One stable counting sort an image: ``O(B * (N + T))``.
        """
        op = "TokenLayout.from_active_steps"
        token, offsets = rank_tokens(op, n, T)
        return cls._trusted(T, n.to(torch.int64), token, offsets, None, False)

    @classmethod
    def full(
        cls, T: int, B: int, N: int, device: torch.device | None = None, padded: bool = False
    ) -> TokenLayout:
        """The layout in which every cell is active."""
        op = "TokenLayout.full"
        n = torch.full((B, N), T, dtype=torch.int64, device=device)
        return cls._trusted(T, n, *rank_tokens(op, n, T), T * B * N, padded)

    def following(self, n: Tensor) -> TokenLayout:
        """The layout of the next block, of the active steps that halting found.

        It is not checked again. How many rows it has is asked of the device, once, unless this
        layout is padded: then so is the next.
        """
        token, offsets = torch.ops.atsnn.token_layout(n, self.T)
        rows = self.num_rows if self.padded else None
        return self._trusted(self.T, n, token, offsets, rows, self.padded)

    @classmethod
    def from_parts(cls, token: Tensor, offsets: Tensor) -> TokenLayout:
        """The layout that has this ``token [B, N]`` and ``offsets [T * B + 1]``."""
        op = "TokenLayout.from_parts"
        check_shape(op, "token", check_tensor(op, "token", token), B=None, N=None)
        check_shape(op, "offsets", check_tensor(op, "offsets", offsets), size=None)
        for name, value in (("token", token), ("offsets", offsets)):
            check_dtype(op, name, value, (torch.int64,))
        B, N = token.shape
        if not len(offsets) or (len(offsets) - 1) % max(B, 1) or (B == 0 and len(offsets) > 1):
            raise InvalidValue(
                f"{op}: offsets must have T * B + 1 entries with B = {B}, got {len(offsets)}"
            )
        T = (len(offsets) - 1) // max(B, 1)
        m = offsets.diff().view(T, B, 1)
        ranked = (m > torch.arange(N, device=token.device)).sum(0)
        in_range = bool(((token >= 0) & (token < N)).all())
        n = torch.zeros_like(ranked).scatter_(1, token if in_range else ranked * 0, ranked)
        return cls(T, B, N, int(offsets[-1]), n, token, offsets)

    def __repr__(self) -> str:
        return f"TokenLayout(T={self.T}, B={self.B}, N={self.N}, num_rows={self.num_rows})"

    @property
    def is_full(self) -> bool:
        """Whether every cell is active; then rows are the cells in their order."""
        return not self.padded and certain(self.num_rows == self.T * self.B * self.N)

    @cached_property
    def index(self) -> Tensor:
        """``[R]`` int64: the position of each row in the flattened ``[T * B * N]`` cells."""
        return torch.ops.atsnn.layout_cells(self.token, self.offsets, self.num_rows)

    @cached_property
    def mask(self) -> Tensor:
        """``[T, B, N]`` bool: the active cells."""
        steps = torch.arange(self.T, device=self.token.device).view(-1, 1, 1)
        return self.active_steps > steps

    def factor(self, dtype: torch.dtype) -> Tensor:
        """``[T, B, N, 1]``: one in active cells, zero elsewhere."""
        if dtype not in self._factors:
            self._factors[dtype] = self.mask.unsqueeze(-1).to(dtype)
        return self._factors[dtype]

    @cached_property
    def _factors(self) -> dict[torch.dtype, Tensor]:
        return {}

    def pack(self, x: Tensor) -> Tensor:
        """Gather ``[T, B, N, ...]`` into rows ``[R, ...]``."""
        if tuple(x.shape[:3]) != (self.T, self.B, self.N):
            raise InvalidValue(
                f"TokenLayout.pack: x must have shape (T, B, N, ...) = ({self.T}, {self.B}, "
                f"{self.N}, ...), got {shape_of(x)}"
            )
        rows = x.flatten(0, 2)
        if self.padded:
            return rows.index_select(0, self.index.clamp(min=0))
        return rows if self.is_full else rows.index_select(0, self.index)

    def unpack(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Scatter rows ``[R, ...]`` back into ``[T, B, N, ...]``; other cells hold ``fill``."""
        if rows.dim() < 1 or rows.shape[0] != self.num_rows:
            raise InvalidValue(
                f"TokenLayout.unpack: rows must have {self.num_rows} rows, "
                f"got shape {tuple(rows.shape)}"
            )
        shape = (self.T, self.B, self.N, *rows.shape[1:])
        if self.is_full:
            return rows.view(shape)
        # Rows that mean nothing go to a cell too many.
        count = self.T * self.B * self.N
        cells = rows.new_full((count + self.padded, *rows.shape[1:]), fill)
        index = self.index % (count + 1) if self.padded else self.index
        return cells.index_copy_(0, index, rows)[:count].view(shape)

    def without(self, tokens: Tensor) -> TokenLayout:
        """The layout in which these tokens, ``[B, N]`` bool, are not active."""
        op = "TokenLayout.without"
        check_shape(op, "tokens", check_tensor(op, "tokens", tokens), B=self.B, N=self.N)
        check_dtype(op, "tokens", tokens, (torch.bool,))
        return TokenLayout.from_active_steps(self.active_steps.masked_fill(tokens, 0), self.T)

    def row_values(self, values: Tensor) -> Tensor:
        """``[R]``: the value of each row's token, of ``values [B, N]``."""
        op = "TokenLayout.row_values"
        check_shape(op, "values", check_tensor(op, "values", values), B=self.B, N=self.N)
        return values.flatten().index_select(0, self.index % (self.B * self.N))

    def rows_in(self, other: TokenLayout, *, op: str = "TokenLayout.rows_in") -> Tensor:
        """``[R]`` int64: the row of ``other`` that each row of this layout is.

        Every cell of this layout must be active in ``other``; ``op`` is named in errors.
        """
        if not torch.compiler.is_compiling():
            shape, there = (self.T, self.B, self.N), (other.T, other.B, other.N)
            if shape != there:
                raise InvalidValue(f"{op}: both layouts must have (T, B, N) = {there}, got {shape}")
            visible = values_visible(self.token)
            if visible and bool((self.active_steps > other.active_steps).any()):
                raise InvalidValue(
                    f"{op}: every cell of the new layout must be active in the old one"
                )
        return torch.ops.atsnn.moved_rows(
            other.token, other.offsets, self.token, self.offsets, self.num_rows
        )


def rank_tokens(op: str, n: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """``token`` and ``offsets`` of checked active steps."""
    check_tensor(op, "n", n)
    check_shape(op, "n", n, B=None, N=None)
    check_integer(op, "T", T, at_least=0, at_most=MOST_TIMESTEPS)
    if n.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise InvalidType(f"{op}: n must be an integer tensor, got {n.dtype}")
    if values_visible(n) and n.numel() and not 0 <= int(n.min()) <= int(n.max()) <= T:
        raise InvalidValue(
            f"{op}: n must lie in 0 .. T = {T}, got values in {int(n.min())} .. {int(n.max())}"
        )
    return torch.ops.atsnn.token_layout(n.to(torch.int64), T)


def _short(x: Tensor) -> str:
    values = x.flatten().tolist()
    return str(values) if len(values) <= 12 else f"{str(values[:12])[:-1]}, ...]"


# -- what the operators of the same names compute, in PyTorch -------------------------------------


def token_layout(n: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """``token [B, N]`` and ``offsets [T * B + 1]`` of active steps ``n [B, N]``."""
    token = torch.sort(n, dim=1, descending=True, stable=True).indices
    steps = torch.arange(T, device=n.device).view(T, 1, 1)
    m = (n > steps).sum(2).view(-1)
    offsets = torch.zeros(T * n.shape[0] + 1, dtype=torch.int64, device=n.device)
    torch.cumsum(m, 0, out=offsets[1:])
    return token, offsets


def layout_cells(token: Tensor, offsets: Tensor, rows: int | None = None) -> Tensor:
    """``[R]``: the position of each row in the flattened cells."""
    B, N = token.shape
    m = offsets.diff().view(-1, B, 1) if B else offsets.new_zeros((0, 0, 1))
    t, b, rank = (m > torch.arange(N, device=token.device)).nonzero(as_tuple=True)
    return _with_rows((t * B + b) * N + token[b, rank], rows)


def _with_rows(found: Tensor, rows: int | None) -> Tensor:
    """As many rows as wanted, -1 past the end of what is found."""
    return found if rows is None else nnf.pad(found, (0, rows - len(found)), value=-1)


def moved_rows(
    token: Tensor, offsets: Tensor, to_token: Tensor, to_offsets: Tensor, rows: int | None = None
) -> Tensor:
    """``[R']``: the row of the first layout that each row of the second is."""
    cells, wanted = layout_cells(token, offsets), layout_cells(to_token, to_offsets)
    row = torch.full((int(wanted.max()) + 1 if len(wanted) else 0,), -1, device=token.device)
    inside = cells < len(row)
    row[cells[inside]] = torch.arange(len(cells), device=token.device)[inside]
    found = row[wanted]
    if len(found) and int(found.min()) < 0:
        raise InvalidValue(
            "moved_rows: every cell of the new layout must be active in the old one, "
            f"got one that is not, cell {int(wanted[found < 0][0])}"
        )
    return _with_rows(found, rows)
