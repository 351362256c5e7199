"""The study's pictures: accuracy against the share of cells, every point with its method's name.

Where points are too many for their names they have numbers, which a legend explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from atsnn.bench.plots import COLOURS, HEIGHT, WIDTH, Plot
from atsnn.sweep.output import Summary

KINDS = ("plain", "halting", "static", "merging", "other")
MARKS = dict(zip(KINDS, "D^sov", strict=True))

# In points (1/72 inch). What axes and titles leave of a picture, about: the layout is made when it
# is drawn, and names only have to know whether they would lie upon each other.
ACROSS, UP = 72 * WIDTH - 45, 72 * HEIGHT - 60
SIZE, LINE, CHARACTER = 6, 7.2, 3.6  # of a name: its font, its height, a character's width
GAP = 5  # from a point's middle to its name
MOST_NAMED = 12  # points of a picture; more have numbers
FAR = 0.2  # below the best: there a point lies at the edge, with its value, and leaves others room


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

    numbers = _numbers(found)
    best = max(s.mean(value) or 0 for s in found)
    near = [s for s in found if (s.mean(value) or 0) > best - FAR]
    far = [s for s in found if s not in near]

    def draw(axes: Any) -> None:
        for s in near:
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
        low, high = axes.get_ylim()
        axes.set_ylim(low, high)  # now, as names go where points are
        called = {s.label: numbers.get(s.label, s.label) for s in found}
        names = [
            Name(called[s.label], *_point(s, value), 100 * (s.spread(value) or 0), s) for s in near
        ]
        edge = low + 0.04 * (high - low)
        for s in far:
            x, y = _point(s, value)
            axes.plot(x, edge, marker=MARKS[kind_of(s.label)], color=_colour(s), markersize=5,
)  # fmt: skip
            names.append(Name(f"{called[s.label]}: {y:.1f} %", x, edge, 0, s))
        _name(axes, names)

    return Plot(title, draw, f"{title}: {measure} against share of cells executed.")


def legend(title: str, found: Sequence[Summary]) -> Plot | None:
    """What the numbers of a picture stand for; None where its points have names."""
    numbers = _numbers(found)
    if not numbers:
        return None

    def draw(axes: Any) -> None:
        axes.set_axis_off()
        for row, s in enumerate(found):
            up = 1 - (row + 0.5) * min(0.07, 1 / len(found))
            axes.plot(0.08, up, marker=MARKS[kind_of(s.label)], color=_colour(s), markersize=5,
                      transform=axes.transAxes)  # fmt: skip
            for x, text, side in ((0.05, numbers[s.label], "right"), (0.11, s.label, "left")):
                axes.text(x, up, text, ha=side, va="center", fontsize=SIZE + 1, color=_colour(s),
                          transform=axes.transAxes)  # fmt: skip

    return Plot(f"Numbers: {title}", draw, f"The methods of {title}, by number.")


def _numbers(found: Sequence[Summary]) -> dict[str, str]:
    if len(found) <= MOST_NAMED:
        return {}
    return {s.label: str(number) for number, s in enumerate(found, 1)}


def _point(s: Summary, value: str) -> tuple[float, float]:
    return 100 * (s.mean("cells") or 0), 100 * (s.mean(value) or 0)


def _colour(s: Summary) -> str:
    return COLOURS[KINDS.index(kind_of(s.label))]


class Name(NamedTuple):
    """What stands beside a point, at the place of its mark; ``bar``: half its error bar."""

    text: str
    x: float
    y: float
    bar: float
    of: Summary


Box = tuple[float, float, float, float]  # left, right, below, above, in points


def _name(axes: Any, names: Sequence[Name]) -> None:
    """Write the names beside their points, moved up or down where one would hide another."""
    to_axes = axes.transData + axes.transAxes.inverted()

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = to_axes.transform((x, y))
        return float(across) * ACROSS, float(up) * UP

    at = sorted(((*place(name.x, name.y), name) for name in names), key=lambda one: one[:2])
    taken: list[Box] = [(x - 3, x + 3, y - 3, y + 3) for x, y, _ in at]
    for x, _, name in at:
        if name.bar:
            ends = [place(name.x, name.y + side * name.bar)[1] for side in (-1, 1)]
            taken.append((x - 1, x + 1, *ends))
    for x, y, name in at:
        dx, dy, box, line = _best_place(x, y, CHARACTER * len(name.text), taken)
        taken += [box, *line]
        axes.annotate(
            name.text, (x / ACROSS, y / UP), (dx, dy), "axes fraction", "offset points",
            ha="left" if dx > 0 else "right", va="center", fontsize=SIZE, color=_colour(name.of),
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": _colour(name.of), "shrinkB": 3}
            if line else None,
        )  # fmt: skip


class Place(NamedTuple):
    dx: float
    dy: float
    box: Box
    line: list[Box]  # to the point, where the name is not right beside it


def _best_place(x: float, y: float, width: float, taken: Sequence[Box]) -> Place:
    """The nearest place that hides nothing, or at least one whose name hides nothing."""

    def free(boxes: Sequence[Box]) -> bool:
        return not any(_overlap(box, other) for box in boxes for other in taken)

    tried = islice(_places(x, y, width), int(16 * UP / LINE))
    free_of_lines = (place for place in tried if free([place.box, *place.line]))
    return next(free_of_lines, None) or next(
        place for place in _places(x, y, width) if free([place.box])
    )


def _line(x: float, y: float, dx: float, dy: float) -> list[Box]:
    """A line as small boxes, but for what lies at the point itself."""
    steps = max(2, int(max(abs(dx), abs(dy)) / 2))
    points = ((x + dx * i / steps, y + dy * i / steps) for i in range(1, steps))
    return [(a - 0.5, a + 0.5, b - 0.5, b + 0.5) for a, b in points
            if max(abs(a - x), abs(b - y)) > 4]  # fmt: skip


def _places(x: float, y: float, width: float) -> Iterator[Place]:
    """Where the name of a point may stand, the nearest first."""
    for step in count():
        for dy in dict.fromkeys((step * LINE / 2, -step * LINE / 2)):
            for side in (1, -1):
                dx = side * (GAP if abs(dy) <= LINE else GAP + 4)
                near, far = x + dx, x + dx + side * width
                left, right = min(near, far), max(near, far)
                inside = left >= 0 and right <= ACROSS and LINE <= y + dy + LINE <= UP
                if inside or step > 2 * UP / LINE:  # nowhere inside: then anywhere
                    line = _line(x, y, dx, dy) if abs(dy) > LINE else []
                    yield Place(dx, dy, (left, right, y + dy - LINE / 2, y + dy + LINE / 2), line)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
