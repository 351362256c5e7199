"""Integer work on layouts: ranks of tokens, cells of rows, rows from one layout to another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import InvalidValue, check_device, check_dtype, check_integer, check_shape
from ..layout import MOST_TIMESTEPS
from .launch import EXACT
from .ranking import BLOCK, before, clamp, elements
from .rows import Runs, run_of, token_at

RUNS = 128  # runs whose ends a program counts


@triton.jit(do_not_specialize=["T", "N"])
def tokens_kernel(active_steps, token, T, N, BLOCK_K: tl.constexpr):
    """The token at each rank."""
    _, base, k = elements(N, BLOCK_K)
    steps = active_steps + base
    n = clamp(tl.load(steps + k, mask=k < N, other=0), 0, T)
    rank = before(steps, n, k[:, None], N, 0, T, True)
    tl.store(token + base + rank, k.to(tl.int64), mask=k < N)


@triton.jit(do_not_specialize=["T", "B", "N"])
def ends_kernel(
    active_steps, offsets, sums, T, B, N, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Ends of runs, counted from the first run of the program; ``sums`` has all its rows."""
    pid = tl.program_id(0)
    run = tl.cast(pid, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = run < tl.cast(T, tl.int64) * B
    t = run // B
    base = run % B * N
    count = tl.zeros((BLOCK_R,), tl.int64)
    for start in range(0, N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = inside[:, None] & (k < N)[None, :]
        n = tl.load(active_steps + base[:, None] + k[None, :], mask=here, other=0)
        count += tl.sum((n > t[:, None]).to(tl.int64), 1)
    tl.store(offsets + 1 + run, tl.cumsum(count, 0), mask=inside)
    tl.store(sums + pid, tl.sum(count, 0))
    if pid == 0:
        tl.store(offsets, 0)


@triton.jit(do_not_specialize=["runs"])
def carry_kernel(offsets, sums, runs, BLOCK_R: tl.constexpr):
    """Adds the rows of all programs before to the ends that a program of ``ends_kernel`` made."""
    block = tl.program_id(0) + 1
    lane = tl.arange(0, BLOCK_R)
    carried = tl.zeros((BLOCK_R,), tl.int64)
    for start in range(0, block, BLOCK_R):
        carried += tl.load(sums + start + lane, mask=start + lane < block, other=0)
    run = tl.cast(block, tl.int64) * BLOCK_R + lane
    end = tl.load(offsets + 1 + run, mask=run < runs, other=0)
    tl.store(offsets + 1 + run, end + tl.sum(carried, 0), mask=run < runs)


@triton.jit(do_not_specialize=["N"])
def ranks_kernel(token, rank, N, BLOCK_R: tl.constexpr):
    """The rank of each token, the inverse of ``token``."""
    b, base, r = elements(N, BLOCK_R)
    k = token_at(token, b, r, N)
    tl.store(rank + base + k, r, mask=k >= 0)


@triton.jit
def run_of_program(N, BLOCK_R: tl.constexpr):
    """The run of a program and its ranks in it."""
    run, _, r = elements(N, BLOCK_R)
    return run, r


@triton.jit
def place_in(rank, offsets, t, b, k, T, B, N, rows):
    """First row of the run ``(t, b)`` and the ranks of tokens ``k``; -1 where not active in it.

    ``rank`` and ``offsets`` are ``None`` where tokens are dense.
    """
    start, count = run_of(offsets, t, b, T, B, N, rows)
    inside = (k >= 0) & (k < N)
    if rank is None:
        r = tl.cast(k, tl.int64)
    else:
        at = rank + tl.cast(b, tl.int64) * N + k
        r = tl.load(at, mask=inside, other=-1).to(tl.int64)
    return start, tl.where(inside & (r >= 0) & (r < count), r, -1)


@triton.jit(do_not_specialize=["T", "B", "N", "rows"])
def cells_kernel(token, offsets, cells, T, B, N, rows, BLOCK_R: tl.constexpr):
    run, r = run_of_program(N, BLOCK_R)
    start, count = run_of(offsets, run // B, run % B, T, B, N, rows)
    k = token_at(token, run % B, r, N)
    cell = tl.where(k >= 0, tl.cast(run, tl.int64) * N + k, -1)
    tl.store(cells + start + r, cell, mask=r < count)


@triton.jit(do_not_specialize=["T", "B", "N", "rows", "to_rows"])
def moved_kernel(
    rank, offsets, to_token, to_offsets, moved, T, B, N, rows, to_rows, BLOCK_R: tl.constexpr
):  # fmt: skip
    run, r = run_of_program(N, BLOCK_R)
    t, b = run // B, run % B
    to_start, count = run_of(to_offsets, t, b, T, B, N, to_rows)
    start, old = place_in(
        rank, offsets, t, b, token_at(to_token, b, r, N), T, B, N, rows
    )  # fmt: skip
    tl.store(moved + to_start + r, tl.where(old >= 0, start + old, -1), mask=r < count)


def token_layout(active_steps: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The operator: ``token [B, N]`` and ``offsets [T * B + 1]``; steps are clamped to 0 .. T."""
    op = "token_layout"
    check_shape(op, "active_steps", active_steps, B=None, N=None)
    check_dtype(op, "active_steps", active_steps, (torch.int64,))
    check_integer(op, "T", T, at_least=0, at_most=MOST_TIMESTEPS)
    B, N = active_steps.shape
    steps = active_steps.contiguous()
    token, offsets = steps.new_empty((B, N)), steps.new_empty(T * B + 1)
    if B * N:
        tokens_kernel[(B * triton.cdiv(N, BLOCK),)](steps, token, T, N, BLOCK_K=BLOCK, **EXACT)
    programs = triton.cdiv(T * B, RUNS)
    if not programs:
        return token, offsets.zero_()
    sums = steps.new_empty(programs)
    ends_kernel[(programs,)](steps, offsets, sums, T, B, N, BLOCK_R=RUNS, BLOCK_K=16, **EXACT)
    if programs > 1:
        carry_kernel[(programs - 1,)](offsets, sums, T * B, BLOCK_R=RUNS, **EXACT)
    return token, offsets


def token_ranks(token: Tensor | None) -> Tensor | None:
    """Rank of each token, ``[B, N]`` int32; -1 where no rank has it. ``None`` for dense tokens."""
    if token is None:
        return None
    B, N = token.shape
    rank = torch.full((B, N), -1, dtype=torch.int32, device=token.device)
    if B * N:
        ranks_kernel[(B * triton.cdiv(N, BLOCK),)](token, rank, N, BLOCK_R=BLOCK, **EXACT)
    return rank


def runs_of_result(op: str, token: Tensor, offsets: Tensor, rows: int | None) -> Runs:
    """The runs of a result that has so many rows, or, which waits for the device, all it needs."""
    runs = Runs.of_layout(op, token, offsets, 0)
    if rows is None:
        rows = int(offsets[-1])
    most = runs.T * runs.B * runs.N
    if not 0 <= rows <= most:
        raise InvalidValue(f"{op}: rows must lie in 0 .. {most} for this layout, got {rows}")
    return runs._replace(rows=rows)


def check_same_cells(op: str, runs: Runs, to: Runs) -> None:
    """Check that two layouts have the same T, B, N and lie on one device."""
    if runs[:3] != to[:3]:
        raise InvalidValue(
            f"{op}: both layouts must have (T, B, N) = {runs[:3]}, got {to[:3]}"
        )  # fmt: skip
    if runs.token is not None and to.token is not None:
        check_device(op, "the second layout's token", to.token, "the first's", runs.token)


def layout_cells(token: Tensor, offsets: Tensor, rows: int | None = None) -> Tensor:
    """The operator: ``[R]``, where each row lies among the flattened cells; -1 past the end."""
    runs = runs_of_result("layout_cells", token, offsets, rows)
    T, B, N = runs[:3]
    cells = torch.full((runs.rows,), -1, dtype=torch.int64, device=token.device)
    if runs.rows:
        cells_kernel[(T * B * triton.cdiv(N, BLOCK),)](
            runs.token, runs.offsets, cells, T, B, N, runs.rows, BLOCK_R=BLOCK, **EXACT
        )
    return cells


def moved_rows(
    token: Tensor, offsets: Tensor, to_token: Tensor, to_offsets: Tensor, rows: int | None = None
) -> Tensor:
    """The operator: ``[R']``, the row of the first layout that each row of the second is.

    -1 past the end of the second, and for cells that are not active in the first.
    """
    op = "moved_rows"
    runs = Runs.of_layout(op, token, offsets, 0)
    to = runs_of_result(op, to_token, to_offsets, rows)
    check_same_cells(op, runs, to)
    T, B, N = runs[:3]
    moved = torch.full((to.rows,), -1, dtype=torch.int64, device=to_token.device)
    if to.rows:
        moved_kernel[(T * B * triton.cdiv(N, BLOCK),)](
            token_ranks(runs.token), runs.offsets, to.token, to.offsets, moved,
            T, B, N, T * B * N, to.rows, BLOCK_R=BLOCK, **EXACT,
        )  # fmt: skip
    return moved
