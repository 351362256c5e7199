"""The study's pictures: accuracy against the share of cells, every point with its method's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from atsnn.bench.plots import COLOURS, HEIGHT, WIDTH, Plot
from atsnn.sweep.output import Summary

KINDS = ("plain", "halting", "static", "merging", "other")
MARKS = dict(zip(KINDS, "D^sov", strict=True))

# In points (1/72 inch). What axes and titles leave of a picture, about: the layout is made when it
# is drawn, and names only have to know whether they would lie upon each other.
ACROSS, UP = 72 * WIDTH - 45, 72 * HEIGHT - 60
SIZE, LINE, CHARACTER = 6, 7.2, 3.4  # of a name: its font, its height, a character's width
GAP = 5  # from a point's middle to its name


def kind_of(label: str) -> str:
    """What a method is drawn as."""
    for kind in ("halting", "static", "merging"):
        if label.startswith(kind):
            return kind
    return "plain" if label == "plain" else "other"


def picture(title: str, measure: str, found: Sequence[Summary], value: str) -> Plot:
    """One point a method, with the standard deviation over its seeds.

    Parameters
    ----------
    title : str
    measure : str
        What is drawn, in words.
    found : sequence of Summary
    value : str
        The rows' field that holds it.
    """

    def draw(axes: Any) -> None:
        for s in found:
            spread = s.spread(value)
            axes.errorbar(
                *_point(s, value), yerr=None if spread is None else 100 * spread, capsize=2,
                elinewidth=0.8, marker=MARKS[kind_of(s.label)], color=_colour(s), markersize=5,
                linestyle="none",
            )  # fmt: skip
        axes.set_xlabel("share of cells executed, %")
        axes.set_ylabel(f"{measure}, %")
        axes.grid(alpha=0.25)
        axes.set_xlim(0, 1.05 * max([100.0, *(_point(s, value)[0] for s in found)]))
        axes.margins(y=0.15)
        axes.set_ylim(axes.get_ylim())  # now, as names go where points are
        _name(axes, found, value)

    return Plot(title, draw, f"{title}: {measure} against share of cells executed.")


def _point(s: Summary, value: str) -> tuple[float, float]:
    return 100 * (s.mean("cells") or 0), 100 * (s.mean(value) or 0)


def _colour(s: Summary) -> str:
    return COLOURS[KINDS.index(kind_of(s.label))]


Box = tuple[float, float, float, float]  # left, right, below, above, in points


def _name(axes: Any, found: Sequence[Summary], value: str) -> None:
    """Write every method's name beside its point, moved up or down where it would hide another."""
    to_axes = axes.transData + axes.transAxes.inverted()
    at = []
    for s in found:
        x, y = to_axes.transform(_point(s, value))
        at.append((float(x) * ACROSS, float(y) * UP, s))
    taken: list[Box] = [(x - 3, x + 3, y - 3, y + 3) for x, y, _ in at]
    for x, y, s in sorted(at, key=lambda one: one[:2]):
        dx, dy, box = next(
            place for place in _places(x, y, CHARACTER * len(s.label))
            if not any(_overlap(place[2], other) for other in taken)
        )  # fmt: skip
        taken.append(box)
        axes.annotate(
            s.label, (x / ACROSS, y / UP), (dx, dy), "axes fraction", "offset points",
            ha="left" if dx > 0 else "right", va="center", fontsize=SIZE, color=_colour(s),
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": _colour(s), "shrinkB": 3}
            if abs(dy) > LINE else None,
        )  # fmt: skip


def _places(x: float, y: float, width: float) -> Iterator[tuple[float, float, Box]]:
    """Where the name of a point may stand, the nearest first: an offset, and what it covers."""
    for step in count():
        for dy in dict.fromkeys((step * LINE / 2, -step * LINE / 2)):
            for side in (1, -1):
                dx = side * (GAP if abs(dy) <= LINE else GAP + 4)
                near, far = x + dx, x + dx + side * width
                left, right = min(near, far), max(near, far)
                inside = left >= 0 and right <= ACROSS and LINE <= y + dy + LINE <= UP
                if inside or step > 2 * UP / LINE:  # nowhere inside: then anywhere
                    yield dx, dy, (left, right, y + dy - LINE / 2, y + dy + LINE / 2)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
