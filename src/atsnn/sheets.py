"""Tables as data: made once, printed in a terminal or written as HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Sheet", "milliseconds", "number_of", "percent", "quantity"]


@dataclass
class Sheet:
    """A table with a title; the first column is what the row is about.

    Attributes
    ----------
    title : str
    columns : list of str
    rows : list
        Of lists of str, as long as ``columns``; ``None`` draws a rule.
    note : str
        What stands below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str] | None] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"Sheet: expected {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(list(cells))

    def rule(self) -> None:
        self.rows.append(None)

    def rich(self) -> Table:
        """For a terminal; a title or note in brackets is no markup."""
        from rich import box
        from rich.markup import escape as plain
        from rich.table import Table

        table = Table(title=plain(self.title), title_justify="left", title_style="bold",
                      box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*map(plain, row))
        return table

    def html(self) -> str:
        """A figure of the title, a ``<table>`` and the note."""
        head = "".join(f"<th scope=col>{escape(c)}</th>" for c in self.columns)
        body, ruled = [], False
        for row in self.rows:
            if row is None:
                ruled = True
                continue
            first, *others = (escape(cell) for cell in row)
            cells = f"<th scope=row>{first}</th>" + "".join(f"<td>{c}</td>" for c in others)
            body.append(f"<tr{' class=rule' if ruled else ''}>{cells}</tr>")
            ruled = False
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        # Scrolls by itself where it is wider than the page.
        return (
            f"<figure><figcaption>{escape(self.title)}</figcaption>"
            f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
            f"{note}</figure>"
        )


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def quantity(value: float) -> str:
    """With a unit prefix: ``37.75 M``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def number_of(count: int, thing: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} {thing}{'s' * (count != 1)}"


def milliseconds(seconds: float) -> str:
    """Three digits and more: ``0.123 ms``, ``12.3 ms``, ``1230 ms``."""
    ms = 1e3 * seconds
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.2f} ms" if ms < 100 else f"{ms:.0f} ms"
