"""Which rows exist: the cells of one block that are active, in the order they are stored in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .checks import InvalidType, InvalidValue, check_integer, check_shape, check_tensor

__all__ = ["TokenLayout"]


@dataclass(frozen=True, eq=False)
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
    active_steps : Tensor
        ``[B, N]`` int64, the number of timesteps each token is active.
    token : Tensor
        ``[B, N]`` int64, the token at each rank.
    offsets : Tensor
        ``[T * B + 1]`` int64.
    """

    T: int
    B: int
    N: int
    active_steps: Tensor
    token: Tensor
    offsets: Tensor

    @classmethod
    def from_active_steps(cls, n: Tensor, T: int) -> TokenLayout:
        """Build the layout from the number of timesteps each token is active.

        Parameters
        ----------
        n : Tensor
            ``[B, N]`` integer, in ``0 .. T``.
        T : int
            Number of timesteps.
        """
        op = "TokenLayout.from_active_steps"
        check_tensor(op, "n", n)
        check_shape(op, "n", n, B=None, N=None)
        check_integer(op, "T", T, at_least=0)
        if n.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            raise InvalidType(f"{op}: n must be an integer tensor, got {n.dtype}")
        n = n.to(torch.int64)
        if n.numel() and not 0 <= int(n.min()) <= int(n.max()) <= T:
            raise InvalidValue(
                f"{op}: n must lie in 0 .. T = {T}, got values in {int(n.min())} .. {int(n.max())}"
            )
        B, N = n.shape
        token = torch.sort(n, dim=1, descending=True, stable=True).indices
        steps = torch.arange(T, device=n.device).view(T, 1, 1)
        m = (n > steps).sum(2).view(-1)
        offsets = torch.zeros(T * B + 1, dtype=torch.int64, device=n.device)
        torch.cumsum(m, 0, out=offsets[1:])
        return cls(T, B, N, n, token, offsets)

    @property
    def num_rows(self) -> int:
        """Number of active cells."""
        return int(self.offsets[-1])

    @cached_property
    def index(self) -> Tensor:
        """``[R]`` int64: the position of each row in the flattened ``[T * B * N]`` cells."""
        steps = torch.arange(self.T, device=self.token.device).view(-1, 1, 1)
        ranked = self.active_steps.gather(1, self.token)
        t, b, rank = (ranked > steps).nonzero(as_tuple=True)
        return (t * self.B + b) * self.N + self.token[b, rank]

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
        check_shape(
            "TokenLayout.pack", "x", x.flatten(3) if x.dim() > 3 else x.unsqueeze(-1),
            T=self.T, B=self.B, N=self.N, C=None,
        )  # fmt: skip
        return x.flatten(0, 2).index_select(0, self.index)

    def unpack(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Scatter rows ``[R, ...]`` back into ``[T, B, N, ...]``; other cells hold ``fill``."""
        if rows.dim() < 1 or rows.shape[0] != self.num_rows:
            raise InvalidValue(
                f"TokenLayout.unpack: rows must have {self.num_rows} rows, "
                f"got shape {tuple(rows.shape)}"
            )
        cells = rows.new_full((self.T * self.B * self.N, *rows.shape[1:]), fill)
        cells = cells.index_copy(0, self.index, rows)
        return cells.view(self.T, self.B, self.N, *rows.shape[1:])
