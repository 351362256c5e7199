"""One self-contained HTML page: tables, plots, the machine. It opens from disk."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..sheets import Sheet
from .plots import Plot, svg

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --dim: #59636e; --line: #d5dae0; --paper: #fff;
  --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --dim: #9aa4af; --line: #3a424b; --paper: #14181c; --card: #1c2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(.8rem, 4vw, 3rem) 4rem; max-width: 76rem;
  color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.dim, .note { color: var(--dim); font-size: .85rem; }
ul { padding-left: 1.1rem; }
code { overflow-wrap: anywhere; }
figure { margin: 0 0 1.4rem; }
figcaption { text-align: left; font-weight: 600; padding-bottom: .35rem; }
.plots { display: grid; gap: 1rem; margin-bottom: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.plots figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .7rem; }
.plots svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1px solid var(--dim); font-weight: 600; }
tbody th { font-weight: 400; }
tr.rule > * { border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0;
  font-size: .85rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(
    title: str,
    lines: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Sheet], Sequence[Plot]]],
    machine: dict[str, Any],
    command: str,
) -> str:
    """The page.

    Parameters
    ----------
    title : str
    lines : sequence of str
        What stands first: what was checked before anything was timed.
    sections : sequence
        Heading, tables and plots of each.
    machine : dict
        Of :func:`atsnn.measure.machine`.
    command : str
        What was typed.
    """
    parts = [
        "<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p class=dim><code>{escape(command)}</code></p>",
        "<ul class=dim>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>",
    ]  # fmt: skip
    for heading, sheets, plots in sections:
        parts.append(f"<section><h2>{escape(heading)}</h2>")
        if plots:
            parts += ["<div class=plots>", *map(_picture, plots), "</div>"]
        parts += [sheet.html() for sheet in sheets]
        parts.append("</section>")
    parts.append("<section><h2>Machine</h2><dl>")
    for name, value in machine.items():
        shown = "-" if value is None else str(value)
        parts.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(shown)}</dd>")
    parts.append("</dl></section></body></html>")
    return "\n".join(parts) + "\n"


def _picture(plot: Plot) -> str:
    drawn = svg(plot).replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)
    return f"<figure><figcaption>{escape(plot.title)}</figcaption>{drawn}</figure>"
