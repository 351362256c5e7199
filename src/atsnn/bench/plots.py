"""The pictures of ``atsnn bench``: each drawn alone on the page, together in one file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import require
from .growth import MEMORY, OPERATOR
from .halting import OWN
from .overheads import OWN_PIECES
from .tables import COST_PARTS

__all__ = ["Plot", "bench_plots", "growth_plots", "overhead_plots", "save", "svg"]

# Read on white as on black, and told apart by the colour-blind.
COLOURS = ("#2f7ed8", "#e07b1a", "#2e9e6b", "#c2549d", "#8a6fd1", "#b8860b")
INK = "#222222"  # of axes and text in a file, on white
SENTINEL = "#010203"  # their colour until the page gives them that of its text
WIDTH, HEIGHT = 4.6, 3.3  # inches, so that its text can be read on a phone


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes
    ----------
    title : str
    draw : callable
        Draws on axes of matplotlib.
    alt : str
        What it shows, for those who do not see it.
    """

    title: str
    draw: Callable[[Any], None]
    alt: str


@contextmanager
def _figure(rows: int, columns: int, ink: str) -> Iterator[Any]:
    require("matplotlib", "train", "drawing")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink,
        "ytick.color": ink, "grid.color": ink, "axes.titlecolor": ink, "legend.labelcolor": ink,
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "svg.fonttype": "none", "svg.hashsalt": "atsnn",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def svg(plot: Plot) -> str:
    """``<svg>`` whose text and axes take the colour of the text around it."""
    with _figure(1, 1, SENTINEL) as figure:
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        plot.draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(SENTINEL, "currentColor")


def save(plots: Sequence[Plot], path: Path) -> None:
    """All plots in one PNG or SVG."""
    columns = min(len(plots), 3 if len(plots) > 4 else 2)
    rows = math.ceil(len(plots) / columns)
    with _figure(rows, columns, INK) as figure:
        for number, plot in enumerate(plots, 1):
            axes = figure.add_subplot(rows, columns, number)
            axes.set_title(plot.title, fontsize=10, loc="left")
            plot.draw(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


# -- what halting saves ---------------------------------------------------------------------------


def bench_plots(result: dict[str, Any]) -> list[Plot]:
    plots = [
        Plot(
            "Time saved over FLOPs saved", lambda axes: _realized(axes, result["latency"]),
            "Points: share of time saved against share of FLOPs saved; on the diagonal all of it "
            "is realized.",
        )
    ]  # fmt: skip
    if result["breakdown"]:
        plots.append(
            Plot(
                "The engine's time by part", lambda axes: _breakdown(axes, result["breakdown"]),
                "Bars: time by part, off and on, as a share of the time with halting off.",
            )
        )  # fmt: skip
    name, cost = list(result["patterns"].items())[-1]
    title = "Cells executed" + ("" if len(result["patterns"]) == 1 else f", {name} halted")
    plots.append(
        Plot(title, lambda axes: _cells(axes, cost), "Share of cells executed by block and step.")
    )
    plots.append(
        Plot(
            "Cost by part, on over off", lambda axes: _costs(axes, cost),
            "Bars: FLOPs, synaptic operations and energy left, by part.",
        )
    )  # fmt: skip
    return plots


def _realized(axes: Any, rows: list[dict[str, Any]]) -> None:
    most = 0.05
    shown: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for row in rows:
        for scope in ("blocks", "model"):
            one = row[scope]
            point = (one["flops_saved"], one["latency_saved"], row["batch"])
            shown.setdefault((row["backend"], scope), []).append(point)
            most = max(most, *point[:2])
    axes.plot([0, most * 1.08], [0, most * 1.08], "--", lw=1, color=_ink(axes))
    backends = dict.fromkeys(row["backend"] for row in rows)
    colours = dict(zip(backends, COLOURS, strict=False))
    for (backend, scope), points in shown.items():
        x, y, batches = zip(*points, strict=True)
        full = colours[backend] if scope == "blocks" else "none"
        axes.scatter(x, y, s=[22 + 8 * math.log2(b) for b in batches], facecolors=full,
                     edgecolors=colours[backend], label=f"{backend}, {scope}")  # fmt: skip
    axes.set_xlabel("share of FLOPs saved")
    axes.set_ylabel("share of time saved")
    axes.axhline(0, lw=0.5, color=_ink(axes))
    axes.legend(frameon=False, fontsize=8, title="larger: larger batch", title_fontsize=7)


def _legend_below(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.17),
                columnspacing=1.2, handlelength=1.2)  # fmt: skip


def _ink(axes: Any) -> Any:
    return axes.spines["bottom"].get_edgecolor()


def _breakdown(axes: Any, rows: list[dict[str, Any]]) -> None:
    ends = [0.0] * len(rows)
    off = {row["batch"]: sum(row["seconds"].values()) for row in rows if row["halted"] == "off"}
    labels = [f"batch {row['batch']}, {_short(row['halted'])}" for row in rows]
    for part, colour in zip(COST_PARTS, COLOURS, strict=True):
        values = [row["seconds"][part] / off[row["batch"]] for row in rows]
        if max(values) > 0:
            axes.barh(labels, values, left=ends, color=colour, label=part, height=0.7)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("of the time with halting off")
    _legend_below(axes)


def _short(halted: str) -> str:
    return "on" if halted == OWN else halted


def _cells(axes: Any, cost: dict[str, Any]) -> None:
    share = torch.tensor(cost["cells"]).double() / torch.tensor(cost["dense"]["cells"]).double()
    L, T = share.shape
    edges = ([i - 0.5 for i in range(n + 1)] for n in (T, L))
    axes.pcolormesh(*edges, share.numpy(), cmap="viridis", vmin=0, vmax=1)
    axes.invert_yaxis()
    if L * T <= 64:
        for block, line in enumerate(share.tolist()):
            for step, value in enumerate(line):
                axes.text(step, block, f"{100 * value:.0f} %", ha="center", va="center",
                          color="white" if value < 0.6 else "black", fontsize=8)  # fmt: skip
    axes.set_xticks(range(T), [str(t + 1) for t in range(T)])
    axes.set_yticks(range(L), [str(block + 1) for block in range(L)])
    axes.set_xlabel("timestep")
    axes.set_ylabel("block")


def _costs(axes: Any, cost: dict[str, Any]) -> None:
    dense = cost["dense"]
    kinds = {"flops": "FLOPs", "sops": "SOPs", "energy_pj": "energy"}
    parts = [p for p in (*COST_PARTS, "total") if any(dense[k][p] for k in kinds)]
    for number, (kind, name) in enumerate(kinds.items()):
        at = [i + (number - 1) * 0.27 for i in range(len(parts))]
        left = [cost[kind][p] / dense[kind][p] if dense[kind][p] else 0 for p in parts]
        axes.bar(at, left, width=0.26, color=COLOURS[number], label=name)
    axes.axhline(1, lw=0.7, ls="--", color=_ink(axes))
    axes.set_xticks(range(len(parts)), parts)
    axes.set_ylabel("left, of halting off")
    _legend_below(axes)


# -- what halting costs ---------------------------------------------------------------------------


def overhead_plots(result: dict[str, Any]) -> list[Plot]:
    plots = []
    titles = {
        "alone": "Own cost of halting alone, by batch", "block": "With merging, by block",
        "batch": "With merging, by batch", "tokens": "With merging, by tokens",
    }  # fmt: skip
    for axis, title in titles.items():
        rows = [row for row in result["rows"] if row["axis"] == axis]
        plots.append(
            Plot(
                title, partial(_own, rows=rows, axis=axis),
                f"Stacked bars: own cost of halting and merging by {axis}, of block time.",
            )
        )  # fmt: skip
    if result["break_even"]:
        plots.append(
            Plot(
                "Time of the blocks over FLOPs saved",
                lambda axes: _break_even(axes, result["break_even"]),
                "Lines: time of the blocks, of halting off, against the share of FLOPs saved.",
            )
        )
    return plots


def _own(axes: Any, rows: list[dict[str, Any]], axis: str) -> None:
    labels, ends = [str(row["at"]) for row in rows], [0.0] * len(rows)
    for piece, colour in zip(OWN_PIECES, COLOURS, strict=True):
        values = [100 * row["shares"][piece] for row in rows]
        axes.bar(labels, values, bottom=ends, color=colour, label=piece, width=0.7)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_xlabel("batch" if axis == "alone" else axis)
    axes.set_ylabel("% of block time")
    _legend_below(axes)


def _break_even(axes: Any, rows: list[dict[str, Any]]) -> None:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    styles = ("-", "--", ":", "-.")
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for row in rows:
        colour = COLOURS[backends.index(row["backend"])]
        style = styles[batches.index(row["batch"]) % len(styles)]
        axes.plot(row["saved"], row["times"], style, marker="o", ms=4, color=colour,
                  label=f"{row['backend']}, batch {row['batch']}")  # fmt: skip
    axes.axhline(1, lw=0.7, color=_ink(axes))
    axes.plot([0, 0.6], [1, 0.4], lw=0.7, ls=(0, (1, 3)), color=_ink(axes))
    axes.set_xlabel("share of the blocks' FLOPs saved")
    axes.set_ylabel("time, of halting off")
    axes.legend(frameon=False, fontsize=7)


# -- how cost grows -------------------------------------------------------------------------------


def growth_plots(result: dict[str, Any]) -> list[Plot]:
    return [
        Plot(
            f"Growth with {'active cells' if axis['axis'] == 'active' else axis['axis']}",
            partial(_growth, axis=axis),
            f"Logarithmic: cost against {axis['axis']}, with the fitted power laws.",
        )
        for axis in result["axes"]
    ]


def _growth(axes: Any, axis: dict[str, Any]) -> None:
    x = axis["x"]
    names = [n for n in ("model", "blocks", "attention", OPERATOR) if n in axis["fits"]]
    for name, colour in zip(names, COLOURS, strict=False):
        fitted = axis["fits"][name]
        ms = [1e3 * row["seconds"][name] for row in axis["points"]]
        label = f"{name}, x^{fitted['exponent']:.2f}"
        axes.plot(x, ms, "o", ms=4, color=colour, label=label)
        axes.plot(x, [1e3 * fitted["scale"] * v ** fitted["exponent"] for v in x], "-", lw=1,
                  color=colour)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    active = axis["axis"] == "active"
    shown = [row["at"] for row in axis["points"]]
    axes.set_xticks(x, [f"{100 * v:.0f} %" if active else f"{v:g}" for v in shown])
    axes.minorticks_off()
    axes.set_xlabel("share of cells active" if active else axis["axis"])
    axes.set_ylabel("ms")
    memory = axis["fits"].get(MEMORY)
    if memory is not None:
        beside = axes.twinx()
        mib = [row["peak_memory"] / 2**20 for row in axis["points"]]
        label = f"{MEMORY}, x^{memory['exponent']:.2f}"
        beside.plot(x, mib, "x", ms=5, color=COLOURS[4], label=label)
        beside.set_yscale("log")
        beside.set_ylabel("MiB")
        beside.spines["right"].set_visible(True)
        lines = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
        labels = [line.get_label() for line in lines]
        axes.legend(lines, labels, frameon=False, fontsize=7)
    else:
        axes.legend(frameon=False, fontsize=7)
