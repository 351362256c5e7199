"""Making a layout and moving rows by it, against boolean masks and indices in PyTorch.

    make bench-layout

The peers keep the active cells in the order of the cells; ours are ordered by rank within an image,
so that each image's rows at a timestep are one run. Same rows, compared in the order of the cells.

    layout     from active steps: token, offsets and the index of rows;  a mask and its nonzero()
    pack       dense to rows;                    x[mask];                index_select
    unpack     rows to dense, zeros elsewhere;   zeros, y[mask] = rows;  index_copy into zeros
    without    the layout without a quarter of the tokens;               the mask and its nonzero()
    take rows  from that layout's predecessor, the index included;       rows[kept], index_select

Limits: a row is read and written once, and nothing is calculated; where all cells are active ours
is a view.
"""

from __future__ import annotations

import pytest
import torch

import atsnn.functional as F
from atsnn import TokenLayout
from atsnn.measure import interleaved

T, C = 4, 384
CASES = [(64, 1), (196, 16)]
SHARES = (1.0, 0.75, 0.5, 0.25)


def active_steps(B, N, share, generator):
    """``[B, N]``: of each image's cells this share, dealt out at random."""
    chosen = torch.rand((B, N * T), generator=generator).argsort(1) < round(share * N * T)
    return chosen.view(B, N, T).sum(2)


def mask_of(n):
    return n > torch.arange(T).view(-1, 1, 1)


def index_of(mask):
    return mask.flatten().nonzero().squeeze(1)


@pytest.mark.parametrize("share", SHARES, ids=[f"{share:.0%}" for share in SHARES])
@pytest.mark.parametrize(("N", "B"), CASES)
def test_layout(benchmark, report, keep, limits, rounds, threads, N, B, share):
    generator = torch.Generator().manual_seed(0)
    n = active_steps(B, N, share, generator)
    x = torch.randn((T, B, N, C), generator=generator)
    gone = torch.rand((B, N), generator=generator) < 0.25
    layout = TokenLayout.from_active_steps(n, T)
    after = layout.without(gone)
    rows, mask, mask_after = layout.pack(x), mask_of(n), mask_of(n) & ~gone
    index, their_rows, cells = index_of(mask), x[mask], x.flatten(0, 2)
    assert layout.num_rows == round(share * N * T) * B

    def zeros():
        return torch.zeros_like(x)

    def put():
        out = zeros()
        out[mask] = their_rows
        return out

    ours = {
        "layout": lambda: TokenLayout.from_active_steps(n, T).index,
        "pack": lambda: layout.pack(x),
        "unpack": lambda: layout.unpack(rows),
        "without": lambda: layout.without(gone).index,
        "take rows": lambda: F.take_rows(rows, layout, after, backend="native"),
    }
    masks = {
        "layout": lambda: index_of(mask_of(n)),
        "pack": lambda: x[mask],
        "unpack": put,
        "without": lambda: index_of(mask & ~gone),
        "take rows": lambda: their_rows[mask_after[mask]],
    }
    indices = {
        "pack": lambda: cells.index_select(0, index),
        "unpack": lambda: zeros().flatten(0, 2).index_copy_(0, index, their_rows).view_as(x),
        "take rows": lambda: their_rows.index_select(0, index_of(mask_after[mask])),
    }
    order, order_after = layout.index.argsort(), after.index.argsort()
    for name, run in ours.items():
        got = run()
        if name != "unpack":  # the rest is in the order of the layout
            got = got[order_after if name in ("without", "take rows") else order]
        for peer in (masks, indices):
            assert name not in peer or torch.equal(got, peer[name]()), name
    work = {
        f"{who}{name}": run
        for who, runs in (("", ours), ("mask ", masks), ("index ", indices))
        for name, run in runs.items()
    }
    with torch.no_grad():
        times = interleaved(work | limits.functions, rounds=rounds)
        benchmark.pedantic(ours["take rows"], rounds=5, warmup_rounds=1)
    made = n.nbytes + layout.token.nbytes + layout.offsets.nbytes
    row, viewed = C * x.element_size(), layout.is_full
    moved = {
        "layout": made + layout.index.nbytes,
        "pack": 0 if viewed else 2 * layout.num_rows * row,
        "unpack": 0 if viewed else layout.num_rows * row + x.nbytes,
        "without": made + after.index.nbytes,
        "take rows": 2 * after.num_rows * row,
    }
    for name in ours:
        used = {k: times[k] for k in (name, f"mask {name}", f"index {name}") if k in times}
        kept = keep(
            used | {key: times[key] for key in limits.functions}, name, moved=moved[name],
            prefix=f"{name} ",
        )  # fmt: skip
        ratios = [f"{t.median / times[name].median:.1f}x" for t in list(used.values())[1:]]
        report(
            {
                "work": name, "tokens": N, "batch": B, "active": f"{share:.0%}",
                "threads": threads, "ours us": f"{1e6 * times[name].median:.1f}",
                "mask": ratios[0], "index": ratios[1] if ratios[1:] else "-",
                "bytes/clone": kept.get("bytes/clone", "-"), "spread": kept["spread"],
            }
        )  # fmt: skip
