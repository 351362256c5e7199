"""Write the tables, the pictures and the JSON of docs/results/study.md from the study's rows.

python benchmarks/study_page.py
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import study
import torch
from scipy import stats
from study_parts import PARTS, Part
from study_picture import kind_of, legend, picture

from atsnn import ATSpikformer, SpikformerConfig, cost
from atsnn.bench.plots import Plot, save
from atsnn.sheets import percent
from atsnn.sweep.output import Summary, summaries, with_spread

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "results" / "study.md"
README = DOCS.parent / "README.md"
FIGURES = DOCS / "results" / "study.json"
PLAIN = "plain"
LEAST = 3  # seeds of what the README shows, and of which anything is concluded
NOT_YET = "*(not run yet)*"
SPIKED = ("sops", "energy_uj")


@dataclass(frozen=True)
class Difference:
    """Of a method's accuracies to those of another on the same seeds.

    Attributes
    ----------
    mean, error : float
        Over the seeds, and the standard error of that mean.
    seeds : int
    """

    mean: float
    error: float
    seeds: int

    @property
    def bound(self) -> float:
        """How far the two-sided 95 % interval (Student's t over the seeds) reaches from it."""
        return self._quantile(0.975) * self.error

    @property
    def least(self) -> float:
        """The one-sided lower 95 % bound."""
        return self.mean - self._quantile(0.95) * self.error

    def _quantile(self, share: float) -> float:
        return float(stats.t.ppf(share, self.seeds - 1))

    def __str__(self) -> str:
        """``-0.12 ± 0.20``, in points of accuracy."""
        if self.seeds < 2:
            return f"{100 * self.mean:+.2f}"
        return f"{100 * self.mean:+.2f} ± {100 * self.bound:.2f}"

    @property
    def told(self) -> str:
        """What the interval says of the sign; of too few seeds nothing."""
        if self.seeds < LEAST:
            return ""
        if abs(self.mean) <= self.bound:
            return "no difference beyond the noise"
        return f"{'better' if self.mean > 0 else 'worse'} beyond the noise"


def difference(ours: Summary, theirs: Summary, name: str = "accuracy") -> Difference | None:
    """Paired by seed; ``None`` where there is no seed that both have."""
    other = {row["seed"]: row[name] for row in theirs.rows}
    pairs = [row[name] - other[row["seed"]] for row in ours.rows if row["seed"] in other]
    if not pairs:
        return None
    mean, n = statistics.fmean(pairs), len(pairs)
    if n < 2:
        return Difference(mean, math.inf, n)
    return Difference(mean, statistics.stdev(pairs) / math.sqrt(n), n)


def rows_of(name: str, part: Part) -> list[dict[str, Any]]:
    """All rows of a part, methods in its order."""
    found = [row for seed in range(max(part.seeds, part.more)) for row in study.read(name, seed)]
    order = list(part.methods)
    plain = [row for row in found if row["label"] == PLAIN]
    full = {
        "cells": float(part.network.depth * part.network.T),
        "steps": float(part.network.T),
        "flops": flops_of(part.network),
        **{key: statistics.fmean(row[key] for row in plain) for key in SPIKED if plain},
    }
    kept = [_to_plain(row, full) for row in found if row["label"] in order]
    return sorted(kept, key=lambda row: order.index(row["label"]))


@cache
def flops_of(network: SpikformerConfig) -> float:
    """FLOPs of an image in which nothing halts; they are those of any image and any weights."""
    images = torch.zeros(1, network.in_channels, network.image_size, network.image_size)
    return cost(ATSpikformer(network), images).flops.total


def _to_plain(row: Mapping[str, Any], full: Mapping[str, float]) -> dict[str, Any]:
    """A row with its shares those of the plain network, whatever its own depth, T and weights.

    A network of two timesteps is what a schedule is that runs no block at the third and fourth.
    FLOPs follow from the configuration; what spikes cost is a mean over the plain network's
    seeds, as a method may have seeds that it has not. A share of the row's own weights with
    nothing halted would flatter a method that fires more: it would have more to save.
    """
    flops = {"flops_share": row["flops"] / full["flops"]}
    spiked = {f"{key.split('_')[0]}_share": row[key] / full[key] if key in full else None
              for key in SPIKED}  # fmt: skip
    sides = (len(row["cells_by_block"]), len(row["cells_by_timestep"]))
    part, steps = math.prod(sides) / full["cells"], sides[1] / full["steps"]
    found = {**row, "cells": part * row["cells"], **flops, **spiked}
    if "detail" in row:
        found["detail"] = _detail_of_full(row["detail"], part, steps)
    return found


def _detail_of_full(detail: Mapping[str, Any], cells: float, steps: float) -> dict[str, Any]:
    """Shares of the full network's cells, blocks averaged over its timesteps."""
    return {
        **detail,
        "confidence": [{**one, "cells": cells * one["cells"]} for one in detail["confidence"]],
        **{
            key: None if detail[key] is None else steps * detail[key]
            for key in ("blocks_on_ink", "blocks_on_background")
        },
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a method, as Markdown."""
    found = summaries(rows)
    plain = next((s for s in found if s.label == PLAIN), None)
    value = _value(rows)
    timed = any(s.mean("latency_ms.1") is not None for s in found)
    head = ["method", "seeds", NAMES[value], "to plain", "cells", "FLOPs", "SOPs", "energy"]
    head += ["ms at batch 1", "ms an image at 16"] * timed
    lines = _head(head)
    for s in found:
        to = None if plain is None or s is plain else difference(s, plain, value)
        cells = [s.label, str(len(s.rows)), with_spread(s, value), _paired(to, s)]
        cells += [percent(s.mean(k)) for k in ("cells", "flops_share", "sops_share")]
        cells.append(percent(s.mean("energy_share")))
        if timed:
            cells += [_number(s.mean(f"latency_ms.{size}")) for size in study.TIMED]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paired(to: Difference | None, ours: Summary) -> str:
    """A difference, and of how many seeds where it is not all of them."""
    if to is None:
        return ""
    return str(to) if to.seeds == len(ours.rows) else f"{to} (seeds: {to.seeds})"


def _head(columns: Sequence[str], left: int = 1) -> list[str]:
    """The first two lines of a table in Markdown, all but ``left`` columns to the right."""
    rule = "|---" * left + "|---:" * (len(columns) - left) + "|"
    return ["| " + " | ".join(columns) + " |", rule]


NAMES = {"accuracy": "test accuracy", "mean_iou": "mean IoU"}


def _value(rows: Sequence[Mapping[str, Any]]) -> str:
    return "mean_iou" if any(row.get("mean_iou") is not None for row in rows) else "accuracy"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def headline(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The plain network, halting and what it has to beat, for the README.

    Of the tasks with most seeds, which are those that answer the question.
    """
    head = ["task", "method", "seeds", "accuracy", "to plain", "cells", "FLOPs", "ms an image"]
    lines = _head(head, left=2)
    for name, rows in parts.items():
        if not PARTS[name]().headline:
            continue
        value = _value(rows)
        compared = {label for pair in PARTS[name]().pairs for label in pair}
        found = {s.label: s for s in summaries(rows) if s.label in compared}
        title = PARTS[name]().title
        shown = [
            label for label, s in found.items()
            if len(s.rows) >= LEAST and kind_of(label) in ("halting", "static")
        ]  # fmt: skip
        for label in [PLAIN] * (PLAIN in found and bool(shown)) + shown:
            s = found[label]
            to = difference(s, found[PLAIN], value) if PLAIN in found and label != PLAIN else None
            cells = [title, label, str(len(s.rows)), with_spread(s, value), _paired(to, s)]
            cells += [percent(s.mean(key)) for key in ("cells", "flops_share")]
            cells.append(_number(s.mean(f"latency_ms.{max(study.TIMED)}")))
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    return "\n".join(lines)


def pictures(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Plot]:
    """One of each task, then what numbers in them stand for."""
    found = {PARTS[name]().title: summaries(rows) for name, rows in parts.items()}
    values = [_value(rows) for rows in parts.values()]
    drawn = [
        picture(title, NAMES[value], methods, value)
        for (title, methods), value in zip(found.items(), values, strict=True)
    ]
    keys = [legend(title, methods) for title, methods in found.items()]
    return drawn + [one for one in keys if one is not None]


def verdicts(part: Part, rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each pair that answers the question."""
    found, value = {s.label: s for s in summaries(rows)}, _value(rows)
    lines = []
    for ours, theirs in part.pairs:
        if ours not in found or theirs not in found:
            continue
        gap = difference(found[ours], found[theirs], value)
        if gap is None:
            continue
        shares = [percent(found[label].mean("cells")) for label in (ours, theirs)]
        lines.append(
            f"- {ours} at {shares[0]} of the cells against {theirs} at {shares[1]}: "
            f"**{gap}** points of {NAMES[value]} (seeds: {gap.seeds})"
            + (f", {gap.told}" if gap.told else "")
            + (f"; one-sided lower 95 % bound {100 * gap.least:+.2f}" if gap.told else "")
        )
    return "\n".join(lines) if lines else NOT_YET


def choices(part: Part, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the validation images said of the candidates, for seed 0."""
    value = _value(rows)
    lines = _head(["candidate", "validation " + NAMES[value].removeprefix("test "), "cells"])
    candidates = [
        f"| {row['label']} | {percent(row[f'validation_{value}'], 2)} | "
        f"{percent(row['cells'])} |"  # a schedule's share is the same for all images
        for row in rows
        if row["seed"] == 0 and row["label"].startswith("static")
    ]
    return "\n".join(lines + candidates) if candidates else NOT_YET


def details(rows: Sequence[Mapping[str, Any]]) -> str:
    """For which images and tokens a halting network spends its cells, and what it loses."""
    head = ["method", "seeds", "least sure fifth", "surest fifth", "objects", "background",
            "right to wrong", "wrong to right"]  # fmt: skip
    lines = _head(head)
    detailed = [row for row in rows if "detail" in row]
    if not detailed:
        return NOT_YET
    for s in summaries(detailed):
        cells = [s.label, str(len(s.rows))]
        for pick, scale, form in DETAILS:
            values = [value for row in s.rows if (value := pick(row["detail"])) is not None]
            cells.append(_spread([scale * value for value in values], form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What the columns show of a row's details, in which unit, and how it is written.
DETAILS: tuple[tuple[Callable[[Any], float | None], int, str], ...] = (
    (lambda d: d["confidence"][0]["cells"], 100, "{} %"),
    (lambda d: d["confidence"][-1]["cells"], 100, "{} %"),
    (lambda d: d["blocks_on_ink"], 1, "{}"),
    (lambda d: d["blocks_on_background"], 1, "{}"),
    (lambda d: d["lost"], 100, "{} %"),
    (lambda d: d["won"], 100, "{} %"),
)


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and of several seeds the standard deviation."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    return form.format(text)


def figures(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a task and method, for machines."""
    return [
        {
            "task": name, "method": s.label, "seeds": sorted(row["seed"] for row in s.rows),
            "accuracy": [row[_value(rows)] for row in sorted(s.rows, key=lambda row: row["seed"])],
            "measure": _value(rows),
            "cells": s.mean("cells"),
            "latency_ms": next(
                (row["latency_ms"] for row in s.rows if "latency_ms" in row), None
            ),
        }
        for name, rows in parts.items() for s in summaries(rows)
    ]  # fmt: skip


def fill(page: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end -->``."""
    text = page.read_text()
    for name, new in texts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, new=new: f"{m[1]}{new}\n{m[2]}", text)
    page.write_text(text)


def main() -> None:
    parts = {name: rows_of(name, make()) for name, make in PARTS.items()}
    parts = {name: rows for name, rows in parts.items() if rows}
    texts = {}
    for name, rows in parts.items():
        part = PARTS[name]()
        texts[f"table {name}"] = table(rows)
        texts[f"verdict {name}"] = verdicts(part, rows)
        texts[f"choices {name}"] = choices(part, rows)
        texts[f"details {name}"] = details(rows)
    fill(PAGE, {f"{kind} {name}": NOT_YET for kind in ("table", "verdict", "choices", "details")
                for name in PARTS} | texts)  # fmt: skip
    fill(README, {"headline": headline(parts)})
    FIGURES.write_text(json.dumps(figures(parts), indent=1) + "\n")
    save(pictures(parts), DOCS / "study.png")


if __name__ == "__main__":
    main()
