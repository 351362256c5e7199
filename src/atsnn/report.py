"""What people see: tables in the terminal and pictures of where tokens halt."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import require
from .conformance import CASES, LEGEND, Finding
from .data import Split
from .kit.report import Report, reasons, rows
from .nn.model import ATSpikformer
from .sheets import Sheet

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

__all__ = ["check_tables", "depth_map", "kernel_tables"]


def check_tables(findings: list[Finding]) -> list[RenderableType]:
    """One row an operation, one column a case; below it what failed or was not supported."""
    from rich.markup import escape

    marks = {"pass": "ok", "fail": "[bold red]FAIL[/]", "unsupported": "-"}
    cases = list(dict.fromkeys(f.case for f in findings))
    table = Sheet("Same bits as the reference; gradients to 1e-5", ["operation", *cases]).rich()
    # So that it fits 80 columns.
    table.box, table.padding = None, (0, 1, 0, 0)
    table.columns[0].no_wrap = True
    rows: dict[str, dict[str, str]] = {}
    for f in findings:
        rows.setdefault(f.operation, {})[f.case] = marks[f.result]
    for operation, row in rows.items():
        table.add_row(operation, *(row.get(case, "") for case in cases))
    counts = {kind: sum(f.result == kind for f in findings) for kind in marks}
    lines = [f"{kind} {count}" for kind, count in counts.items() if count]
    details = [
        f"{f.result}: {f.operation}, {f.case}: {escape(f.detail)}"
        for f in findings
        if f.result != "pass"
    ]
    return [table, LEGEND, ", ".join(lines), *details]


def kernel_tables(report: Report) -> list[RenderableType]:
    """What :func:`atsnn.testing.check` found: every case, where it failed, what it lacks and why.

    Details stand below the case, so that they are whole in 80 columns.
    """
    from rich.markup import escape
    from rich.padding import Padding

    out: list[RenderableType] = []
    runs = [f for f in report.findings if f.result != "unsupported"]
    for result, alike in groupby(runs, lambda f: f.result):
        for case, detail in rows(list(alike)):
            mark = "pass" if result == "pass" else "[bold red]FAIL[/]"
            out.append(_hanging(mark, escape(case)))
            if detail:
                out.append(Padding(escape(detail), (0, 0, 0, 8), expand=False))
    for reason, cases in reasons(report.unsupported).items():
        out.append(f"\n[bold]not supported[/]: {escape(reason)}")
        out += [Padding(escape(case), (0, 0, 0, 8), expand=False) for case in cases]
    used = {f.case for f in report.findings}
    return [*out, "", *[LEGEND] * bool(used & set(CASES)), report.counts]


def _hanging(mark: str, text: str) -> Table:
    """A mark and a text that wraps beside it."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(width=4)
    table.add_column()
    table.add_row(mark, text)
    return table


def print_all(console: Console, parts: list[RenderableType]) -> None:
    for part in parts:
        console.print(part)


def _token_map(axes: Any, values: Tensor, top: int, colours: str) -> None:
    """A heat map of small integers; the numbers stand in the cells while they can be read."""
    axes.imshow(values.numpy(), cmap=colours, vmin=0, vmax=top)
    if len(values) > 8:
        return
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            ink = "white" if value < 0.6 * top else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=5, color=ink)


def _verdict(split: Split, index: int, predicted: Tensor) -> tuple[str, bool]:
    """What is right of an image, and whether it is wrong on the whole."""
    if predicted.dim() == 0:
        label, guess = int(split.labels[index]), int(predicted)
        return f"label {label}\ngot {guess}", label != guess
    if split.maps is None:
        return "", False
    return f"{100 * float((predicted == split.maps[index]).double().mean()):.0f} %\nright", False


def depth_map(
    model: ATSpikformer, split: Split, path: str | Path, count: int = 6, start: int = 0
) -> Path:
    """Draw images with, for each token, the blocks and timesteps it was computed for.

    A row an image: the image, and where pixels are classified the classes found; for each
    timestep the number of blocks each token ran (its depth); for each block the number of
    timesteps each token ran.

    Parameters
    ----------
    model : ATSpikformer
    split : Split
        Images and labels.
    path : path
        The PNG to write.
    count, start : int
        How many images, and the first.
    """
    require("matplotlib", "train", "drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    c = model.config
    images = split.images[start : start + count]
    with torch.no_grad():
        trace = model.eval()(images, return_trace=True)
    predicted = trace.logits.argmax(1)
    # A merged token counts where the token that holds it was computed.
    ran = trace.active.gather(3, trace.source.expand(trace.active.shape)).float()
    pixels = c.task == "pixels"
    before = 1 + pixels  # columns of pictures
    side, columns, rows = c.grid, before + c.T + c.depth, len(images)
    by_time, by_block = ran.sum(0), ran.sum(1)  # [T, B, N], [L, B, N]
    figure = Figure(figsize=(1.25 * columns + 1.3, 1.3 * rows + 1.1), dpi=120)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, columns + 1, left=0.09, right=0.93, top=1 - 0.75 / (1.3 * rows + 1.1), bottom=0.03,
        wspace=0.08, hspace=0.12, width_ratios=[1] * (before + c.T) + [0.18] + [1] * c.depth,
    )  # fmt: skip
    shown = []
    for b in range(rows):
        axes = figure.add_subplot(grid[b, 0])
        picture = images[b].movedim(0, -1).squeeze(-1)
        axes.imshow(picture.numpy(), cmap="gray" if picture.dim() == 2 else None, vmin=0, vmax=1)
        text, wrong = _verdict(split, start + b, predicted[b])
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8,
                        color="#b00020" if wrong else "black")  # fmt: skip
        shown.append(axes)
        if pixels:
            axes = figure.add_subplot(grid[b, 1])
            axes.imshow(predicted[b].numpy(), cmap="tab20", vmin=0, vmax=19)
            if b == 0:
                axes.set_title("classes", fontsize=8)
            shown.append(axes)
        if b == 0:
            axes.set_title("image", fontsize=8)
        maps = [(by_time[t, b], c.depth, f"t = {t + 1}", "viridis", before + t) for t in range(c.T)]
        maps += [
            (by_block[block, b], c.T, f"block {block + 1}", "magma", before + 1 + c.T + block)
            for block in range(c.depth)
        ]
        for values, top, title, colours, column in maps:
            axes = figure.add_subplot(grid[b, column])
            _token_map(axes, values.view(side, side), top, colours)
            if b == 0:
                axes.set_title(title, fontsize=8)
            shown.append(axes)
    for axes in shown:
        axes.set_xticks([])
        axes.set_yticks([])
    above = 1 - 0.3 / (1.3 * rows + 1.1)
    left, middle = 0.09 + 0.84 * before / columns, 0.09 + 0.84 * (before + c.T) / columns
    figure.text(left, above, f"blocks computed at timestep t (of {c.depth})", fontsize=9)
    figure.text(middle + 0.015, above, f"timesteps computed in a block (of {c.T})", fontsize=9)
    share = float(ran.mean())
    figure.text(0.01, above, f"{100 * share:.0f} % of cells", fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
