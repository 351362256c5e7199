"""A sweep as one table and one picture: accuracy against what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.plots import COLOURS, Plot, save
from ..sheets import Sheet, percent

__all__ = ["Summary", "draw", "summaries", "table"]


@dataclass(frozen=True)
class Summary:
    """The rows of one label: means over seeds, and standard deviations where there are several."""

    label: str
    rows: tuple[Mapping[str, Any], ...]

    def values(self, name: str) -> list[float]:
        """Of each row; ``latency_ms.16`` is that of batch 16."""
        found = []
        for row in self.rows:
            value: Any = row
            for part in name.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                found.append(float(value))
        return found

    def mean(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.stdev(values) if len(values) > 1 else None


def summaries(rows: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Rows by label, in the order in which labels come."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["label"], []).append(row)
    return [Summary(label, tuple(found)) for label, found in grouped.items()]


def table(result: Mapping[str, Any], title: str = "Sweep") -> Sheet:
    """One line a label."""
    rows = result["rows"]
    sizes = list(dict.fromkeys(size for row in rows for size in row.get("latency_ms", {})))
    dense = any(row.get("mean_iou") is not None for row in rows)
    columns = ["point", "n", "accuracy", *["mean IoU"] * dense, "cells", "FLOPs", "SOPs",
               "energy", *(f"ms/{size}" for size in sizes)]  # fmt: skip
    sheet = Sheet(title, columns)
    for found in summaries(rows):
        cells = [found.label, str(len(found.rows)), with_spread(found, "accuracy")]
        if dense:
            cells.append(with_spread(found, "mean_iou"))
        shares = ("cells", "flops_share", "sops_share", "energy_share")
        cells += [percent(found.mean(name), 0) for name in shares]
        for size in sizes:
            latency = found.mean(f"latency_ms.{size}")
            cells.append("-" if latency is None else f"{latency:.2f}")
        sheet.add(*cells)
    splits = " and ".join(sorted({row["split"] for row in rows}))
    sheet.note = (
        f"Measured on the {splits} images; n: seeds, with several the mean and standard deviation. "
        "cells: share executed. FLOPs, SOPs, energy: of those of the same weights with nothing "
        "halted and nothing merged, the stem included."
    )
    if sizes:
        sheet.note += " ms/B: milliseconds an image in batches of B, medians of turns."
    return sheet


def with_spread(found: Summary, name: str) -> str:
    """``97.21 +- 0.13 %``, without the second part for a single seed."""
    mean, spread = found.mean(name), found.spread(name)
    if mean is None or spread is None:
        return percent(mean, 2)
    return f"{100 * mean:.2f} ± {100 * spread:.2f} %"


AXES = {
    "cells": ("share of cells executed", 100.0),
    "flops": ("FLOPs an image, M", 1e-6),
    "sops": ("SOPs an image, M", 1e-6),
    "energy_uj": ("energy an image, µJ", 1.0),
}


def plots_of(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Accuracy (mean IoU where pixels are classified) against each cost."""
    value = "mean_iou" if any(row.get("mean_iou") is not None for row in rows) else "accuracy"
    axes = dict(AXES)
    for size in dict.fromkeys(size for row in rows for size in row.get("latency_ms", {})):
        axes[f"latency_ms.{size}"] = (f"ms an image, batch {size}", 1.0)
    found = summaries(rows)
    what = "mean IoU" if value == "mean_iou" else "accuracy"
    return [
        Plot(
            f"{what} against {label}", _drawn(found, value, what, name, label, scale, not number),
            f"Points: {what} against {label}, one a setting; bars are standard deviations.",
        )
        for number, (name, (label, scale)) in enumerate(axes.items())
    ]  # fmt: skip


def _drawn(
    found: Sequence[Summary], value: str, what: str, name: str, label: str, scale: float,
    legend: bool,
) -> Any:  # fmt: skip
    def draw_on(axes: Any) -> None:
        for number, summary in enumerate(found):
            x, y = summary.mean(name), summary.mean(value)
            if x is None or y is None:
                continue
            across, up = summary.spread(name) or 0.0, summary.spread(value) or 0.0
            axes.errorbar(
                x * scale, 100 * y, yerr=100 * up, xerr=across * scale,
                marker=MARKS[number // 6 % 5], color=COLOURS[number % 6], linestyle="none",
                markersize=5, capsize=2, elinewidth=0.8, label=summary.label,
            )  # fmt: skip
        # Bars may reach beyond what there can be; where costs begin, one sees what a share is of.
        axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))
        axes.set_xlabel(f"{label}, %" if name == "cells" else label)
        axes.set_ylabel(f"{what}, %")
        axes.grid(alpha=0.25)
        if legend and len(found) <= 12:
            axes.legend(fontsize=6, frameon=False, loc="best")

    return draw_on


MARKS = "os^Dv"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a sweep to a PNG or SVG."""
    save(plots_of(result["rows"]), path)
