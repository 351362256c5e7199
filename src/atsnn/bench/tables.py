"""The tables of ``atsnn bench``, for the terminal and for the page."""

from __future__ import annotations

from typing import Any

import torch

from ..cost import Parts
from ..sheets import Sheet, milliseconds, number_of, percent, quantity
from .growth import MEMORY, OPERATOR, PARTS
from .overheads import OWN_PIECES, SHARES

__all__ = ["accuracy_sheet", "bench_sheets", "growth_sheets", "machine_line", "overhead_sheets"]

NOISY = 0.3  # spread of a timing, over its median, that the reader is warned of
SHORT = {"accumulators": "accum.", "matching": "match", "merging": "merge"}
COST_PARTS = tuple(part for part, _ in Parts())


def machine_line(m: dict[str, Any]) -> str:
    return (
        f"{m['processor']}, {number_of(m['cores'], 'core')}, {number_of(m['threads'], 'thread')}, "
        f"{m['instruction_set']}, torch {m['torch']}, atsnn {m['atsnn']}"
    )


def accuracy_sheet(rows: dict[str, dict[str, Any]], data: str | None = None) -> Sheet:
    """Accuracy and executed cells, a model a row; ``data`` is named where nothing above does."""
    pixels = any(row.get("mean_iou") is not None for row in rows.values())
    columns = ["model", "score", "accuracy", *["mean IoU"] * pixels, "images", "cells executed"]
    on = "" if data is None else f" on {data}"
    sheet = Sheet(f"Accuracy{' of pixels' * pixels}{on}", columns)
    for name, row in rows.items():
        iou = [percent(row["mean_iou"], 2)] if pixels else []
        sheet.add(name, row.get("score") or "-", percent(row["accuracy"], 2), *iou,
                  str(row["images"]), percent(row["cells"]))  # fmt: skip
    return sheet


def bench_sheets(result: dict[str, Any]) -> list[Sheet]:
    """Everything ``atsnn bench`` prints but its head."""
    sheets = [accuracy_sheet(result["accuracy"])] if result["accuracy"] else []
    images = result["cost_images"]
    if len(result["patterns"]) == 1:
        (cost,) = result["patterns"].values()
        sheets += [_cells_sheet(cost, images), _cost_sheet(cost, images)]
    else:
        sheets.append(_patterns_sheet(result["patterns"], images))
    sheets[-1].note = result["energy_assumptions"]
    batches = dict.fromkeys(row["batch"] for row in result["latency"])
    sheets += [_latency_sheet(result, batch) for batch in batches]
    sheets[-1].note = f"{_noise(result)} {_legend(result)}"
    clocked = dict.fromkeys(row["batch"] for row in result["breakdown"])
    sheets += [_breakdown_sheet(result["breakdown"], batch) for batch in clocked]
    return sheets


def _cells_sheet(cost: dict[str, Any], images: int) -> Sheet:
    cells = torch.tensor(cost["cells"], dtype=torch.float64)
    share = cells / torch.tensor(cost["dense"]["cells"], dtype=torch.float64)
    steps = share.shape[1]
    sheet = Sheet(
        f"Share of cells executed, over {number_of(images, 'image')}",
        ["block", *(f"t = {t + 1}" for t in range(steps)), "all t"],
    )
    for number, row in enumerate(share, 1):
        sheet.add(str(number), *map(percent, row.tolist()), percent(float(row.mean())))
    sheet.rule()
    sheet.add("all", *map(percent, share.mean(0).tolist()), percent(float(share.mean())))
    return sheet


def _saved(now: float, dense: float) -> str:
    return "-" if dense == 0 else percent(1 - now / dense)


def _cost_sheet(cost: dict[str, Any], images: int) -> Sheet:
    dense = cost["dense"]
    sheet = Sheet(
        f"Cost an image with halting on, counted over {number_of(images, 'image')}",
        ["part", "FLOPs", "saved", "SOPs", "saved", "energy", "saved"],
    )
    for part in (*COST_PARTS, "total"):
        if part == "total":
            sheet.rule()
        cells = []
        for name in ("flops", "sops", "energy_pj"):
            off, on = dense[name][part] / images, cost[name][part] / images
            text = f"{on / 1e6:.2f} uJ" if name == "energy_pj" else quantity(on)
            cells += [text, _saved(on, off)]
        sheet.add(part, *cells)
    return sheet


def _patterns_sheet(patterns: dict[str, dict[str, Any]], images: int) -> Sheet:
    sheet = Sheet(
        f"Saved, counted over {number_of(images, 'image')}",
        ["halted", "cells", "FLOPs", "of blocks", "SOPs", "of blocks", "energy"],
    )
    for name, cost in patterns.items():
        dense = cost["dense"]
        cells = 1 - torch.tensor(cost["cells"]).sum() / torch.tensor(dense["cells"]).sum()
        row = [percent(float(cells))]
        for quantity_ in ("flops", "sops"):
            on, off = cost[quantity_], dense[quantity_]
            row += [_saved(on["total"], off["total"]), _saved(_blocks(on), _blocks(off))]
        sheet.add(name, *row, _saved(cost["energy_pj"]["total"], dense["energy_pj"]["total"]))
    return sheet


def _blocks(parts: dict[str, float]) -> float:
    return parts["total"] - parts["stem"]


def _latency_sheet(result: dict[str, Any], batch: int) -> Sheet:
    several = len(result["patterns"]) > 1
    columns = ["scope", "off", "on", "saved", "FLOPs", "realized"]
    sheet = Sheet(
        f"Latency, batch {batch}", ["backend", *(["halted"] if several else []), *columns]
    )
    rows = [row for row in result["latency"] if row["batch"] == batch]
    before = None
    for row in sorted(rows, key=lambda row: row["backend"]):
        if before not in (None, row["backend"]):
            sheet.rule()
        before = row["backend"]
        for scope in ("blocks", "model"):
            one = row[scope]
            fraction = one["realized_fraction"]
            sheet.add(
                row["backend"], *([row["halted"]] if several else []), scope,
                *(milliseconds(one[k]["median_s"]) for k in ("off", "on")),
                percent(one["latency_saved"]), percent(one["flops_saved"]),
                "-" if fraction is None else f"{fraction:.2f}",
            )  # fmt: skip
    return sheet


def _noise(result: dict[str, Any]) -> str:
    rows = result["latency"]
    timings = [
        row[scope][k] for row in rows for scope in ("blocks", "model") for k in ("off", "on")
    ]
    spread, rounds = max(t["spread"] for t in timings), result["rounds"]
    noise = f"quartile distance up to {100 * spread:.0f} % of the median"
    if rounds < 4:
        noise = "too few rounds to tell the spread"
    elif spread > NOISY:
        noise += ": a noisy run, repeat it before you rely on its times"
    return (
        f"medians of {number_of(rounds, 'interleaved round')}; {noise}. "
        "saved: of the time with halting off. FLOPs: the share of them that is saved. "
        "realized = time saved / FLOPs saved."
    )


def _legend(result: dict[str, Any]) -> str:
    if result["execution"] != "packed":
        return (
            "This run executed the masked form: every cell is computed and the halted ones are "
            "zeroed, so the FLOPs counted as saved were not saved in time, and the realized "
            "fraction of the modules is near zero, or below where masking itself costs time."
        )
    return (
        "off: every cell of the same network runs, nothing halts. on: the packed form, in which "
        "the rows of active cells exist and nothing else. Halting saves nothing in the stem, "
        "except in the engine's with the sequential accumulator. engine: the whole model, frozen "
        "(atsnn.freeze); native: the modules, on C++ kernels."
    )


def _breakdown_sheet(rows: list[dict[str, Any]], batch: int) -> Sheet:
    off, *on = (row for row in rows if row["batch"] == batch)
    names = ["on"] if len(on) == 1 else [row["halted"] for row in on]
    sheet = Sheet(
        f"Where the engine's time goes, batch {batch}",
        ["part", "off", "share", *names, *(["share"] if len(on) == 1 else [])],
        note="In milliseconds, by the engine's own clock. halting: scores, accumulators, readout "
        "and moves of rows.",
    )
    shown = [row["seconds"] for row in (off, *on)]
    totals = [sum(seconds.values()) for seconds in shown]
    for part in COST_PARTS:
        cells = []
        for number, (seconds, total) in enumerate(zip(shown, totals, strict=True)):
            cells.append(f"{1e3 * seconds[part]:.2f}")
            if number == 0 or len(on) == 1:
                cells.append(percent(seconds[part] / total))
        sheet.add(part, *cells)
    sheet.rule()
    sums = [f"{1e3 * total:.2f}" for total in totals]
    sheet.add("all", sums[0], "", *sums[1:], *([""] if len(on) == 1 else []))
    return sheet


def overhead_sheets(result: dict[str, Any]) -> list[Sheet]:
    """What halting and merging cost, and from where on they pay."""
    sheets = []
    first = result["rows"][0]
    at = f"batch {first['batch']}, {first['tokens']} tokens"
    where = {
        "alone": f"Own cost of halting alone, by batch, {first['tokens']} tokens",
        "block": f"Own cost of halting and merging, by block, {at}",
        "batch": f"Own cost of halting and merging, by batch, {first['tokens']} tokens",
        "tokens": f"Own cost of halting and merging, by tokens, batch {first['batch']}",
    }
    for axis, title in where.items():
        sheet = Sheet(
            title,
            [
                "batch" if axis == "alone" else axis,
                "ms",
                *(SHORT.get(k, k) for k in OWN_PIECES),
                "own",
            ],
        )
        for row in (row for row in result["rows"] if row["axis"] == axis):
            shares = (*(row["shares"][k] for k in OWN_PIECES), row["own"])
            cells = ["-" if v is None else f"{100 * v:.2f}" for v in shares]
            sheet.add(f"{row['at']}", f"{1e3 * row['block_s']:.2f}", *cells)
        sheets.append(sheet)
    sheets[-1].note = (
        f"ms: of the blocks; the others in per cent of it, by the engine's own clock, "
        f"{100 * result['halted']:g} % of the "
        "cells halted by a synthetic pattern"
        + (", tokens merged as configured." if result["merges"]
           else ", one pair of eight tokens merged at each boundary.")
        + " Where tokens merge, moving rows is part of it. "
        "own: all of it, less what the readout costs "
        f"without halting. Medians of {number_of(result['rounds'], 'interleaved round')}."
    )  # fmt: skip
    even = Sheet(
        "From where on halting pays (no merging)",
        ["batch", "backend", "nothing halted", *(f"{100 * share:g} %" for share in SHARES[1:]),
         "break-even"],
        note="Time of the blocks over that with halting off, with that share of the cells halted, "
        "and the share of FLOPs saved from which it is below 1 (line of least squares).",
    )  # fmt: skip
    for row in result["break_even"]:
        times = [f"{t:.3f}" for t in row["times"]]
        share = row["break_even"]
        even.add(str(row["batch"]), row["backend"], *times, *["-"] * (len(SHARES) - len(times)),
                 "never" if share is None else percent(share))  # fmt: skip
    return [*sheets, even]


def growth_sheets(result: dict[str, Any]) -> list[Sheet]:
    """A table an axis, and the exponents."""
    sheets = []
    exponents = Sheet(
        "Fitted exponents: cost = scale * x ^ exponent",
        ["x", *PARTS, "operator", "memory", "FLOPs", "SOPs"],
        note="Least squares of logarithms over all points, and, second, without the smallest. 1 is "
        "linear. memory: peak. operator: atsnn.functional.spiking_attention alone, on floats.",
    )
    for axis in result["axes"]:
        name = axis["axis"]
        sheet = Sheet(
            f"Growth with {_unit(name)}, milliseconds",
            [_unit(name), *PARTS, "peak", "FLOPs", "SOPs"],
        )
        for row in axis["points"]:
            peak = row["peak_memory"]
            shown = percent(row["at"], 0) if name == "active" else f"{row['at']:g}"
            sheet.add(
                shown, *(f"{1e3 * row['seconds'][part]:.2f}" for part in PARTS),
                "-" if peak is None else f"{peak / 2**20:.1f} MiB",
                quantity(row["flops"]), quantity(row["sops"]),
            )  # fmt: skip
        sheets.append(sheet)
        names = (*PARTS, OPERATOR, MEMORY, "flops", "sops")
        for key, label in (("fits", _unit(name)), ("late_fits", "")):
            cells = [axis[key].get(n) for n in names]
            exponents.add(label, *("-" if f is None else f"{f['exponent']:.2f}" for f in cells))
    return [exponents, *sheets]


def _unit(axis: str) -> str:
    return "active cells" if axis == "active" else axis
