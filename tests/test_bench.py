"""``atsnn bench`` but its plainest use: configurations, growth, overheads, pictures, the page."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
import torch

import atsnn
from atsnn import bench, cli
from atsnn.bench import growth, halting, overheads, plots, subject, tables
from atsnn.bench.page import page
from atsnn.checks import InvalidValue
from atsnn.sheets import Sheet, milliseconds, number_of, percent, quantity

SMALL = ["--set", "embed_dim=16", "num_heads=2", "depth=3", "T=2", "image_size=16", "in_channels=1"]
TINY = atsnn.SpikformerConfig(
    image_size=16, in_channels=1, num_classes=3, embed_dim=16, depth=3, num_heads=2, T=2
)


def run(capsys, *arguments):
    code = cli.main(["bench", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def small():
    return subject.of_config("tiny", TINY)


# -- any configuration, any share -----------------------------------------------------------------


def test_a_configuration_at_given_shares(capsys, tmp_path):
    path = tmp_path / "bench.json"
    code, out, err = run(
        capsys, "--config", "spikformer_4_384", *SMALL, "--rates", "0.1", "0.25",
        "--halted", "0.25", "0.5", "--batch", "1", "3", "--rounds", "1",
        "--backends", "engine", "native", "reference", "--json", str(path),
    )  # fmt: skip
    assert code == 0 and err == ""
    found = json.loads(path.read_text())
    assert found["subject"] == {
        "title": "spikformer_4_384, untrained, spikes 10 %, block inputs 25 %",
        "trained": False, "rates": [0.1, 0.25],
    }  # fmt: skip
    assert found["model"]["embed_dim"] == 16 and found["model"]["halting"] == "rectangle"
    assert found["command"].startswith("atsnn bench --config spikformer_4_384 --set embed_dim=16")
    assert list(found["patterns"]) == ["25 %", "50 %"] and found["cost_images"] == 3
    cells = 3 * 2 * 3 * 16  # L T B N
    for share, cost in zip((0.25, 0.5), found["patterns"].values(), strict=True):
        assert sum(map(sum, cost["dense"]["cells"])) == cells
        assert sum(map(sum, cost["cells"])) == pytest.approx((1 - share) * cells, abs=0.03 * cells)
        on, off = cost["flops"], cost["dense"]["flops"]
        assert on["stem"] == off["stem"] and on["mlp"] / off["mlp"] == pytest.approx(
            sum(map(sum, cost["cells"])) / cells
        )
    rows = {(r["batch"], r["halted"], r["backend"]) for r in found["latency"]}
    backends = ("engine", "native", "reference")
    assert rows == {(b, h, k) for b in (1, 3) for h in ("25 %", "50 %") for k in backends}
    for row in found["latency"]:
        for scope in ("blocks", "model"):
            one = row[scope]
            ratio = one["on"]["median_s"] / one["off"]["median_s"]
            assert one["latency_saved"] == pytest.approx(1 - ratio)
            assert one["realized_fraction"] == pytest.approx((1 - ratio) / one["flops_saved"])
        assert row["blocks"]["flops_saved"] > row["model"]["flops_saved"] > 0
    assert [r["halted"] for r in found["breakdown"]] == ["off", "25 %", "50 %"] * 2
    assert "Accuracy" not in out and "pJ" in out and "Latency, batch 3" in out


def test_rates_are_those_that_were_asked_for(small):
    for rates in ((0.05, 0.15), (0.15, 0.3)):
        one = subject.of_config("tiny", TINY, rates)
        trace = atsnn.freeze(one.model.without_halting())(one.images(8), return_trace=True)
        inputs = [
            r for n, r in trace.firing_rates.items() if n.endswith(("attn.input", "mlp.input"))
        ]
        keys = [r for n, r in trace.firing_rates.items() if n.endswith("k_lif")]
        assert sum(inputs) / len(inputs) == pytest.approx(rates[1], rel=0.25)
        assert sum(keys) / len(keys) == pytest.approx(rates[0], rel=0.35)


def test_a_configuration_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY.to_dict()))
    assert subject.read_config(path, {"T": 5}) == TINY.replace(T=5)
    folder = subject.of_config("tiny", TINY).model.save_pretrained(tmp_path / "run")
    assert subject.read_config(folder / "config.json", {}).embed_dim == 16
    path.write_text("{")
    with pytest.raises(InvalidValue, match="expected JSON in"):
        subject.read_config(path, {})


def test_a_checkpoint_at_given_shares(capsys, tmp_path):
    path = tmp_path / "bench.json"
    code, _, _ = run(capsys, "--limit", "4", "--batch", "2", "--rounds", "1", "--halted", "0.5",
                     "--backends", "engine", "--json", str(path))  # fmt: skip
    assert code == 0
    found = json.loads(path.read_text())
    (cost,) = found["patterns"].values()
    assert sum(map(sum, cost["cells"])) == pytest.approx(0.5 * 4 * 4 * 2 * 64, rel=0.05)


def test_a_checkpoint_without_halting_at_given_shares(capsys, tmp_path):
    path = tmp_path / "bench.json"
    code, _, _ = run(capsys, "--checkpoint", "digits-dense", "--limit", "4", "--batch", "2",
                     "--rounds", "2", "--halted", "0.5", "--json", str(path))  # fmt: skip
    assert code == 0
    found = json.loads(path.read_text())
    (cost,) = found["patterns"].values()
    assert sum(map(sum, cost["cells"])) == pytest.approx(0.5 * 4 * 4 * 2 * 64, rel=0.05)
    assert found["accuracy"]["this model"]["cells"] == 1.0, "its own scores halt nothing"
    for row in found["latency"]:
        for scope in ("blocks", "model"):
            assert row[scope]["on"]["rounds"] == found["rounds"] == 2


def test_images_do_not_depend_on_their_number():
    from atsnn.data import patterns

    many = patterns(3, 2, 16)
    assert torch.equal(many[:1], patterns(1, 2, 16)) and not torch.equal(many[0], many[1])
    assert float(many.min()) >= 0 and float(many.max()) <= 1
    beside = (many[..., 1:] - many[..., :-1]).abs().mean()
    assert beside < 0.8 * (many[0] - many[1]).abs().mean(), "pixels resemble their neighbours"


def test_other_merging_shares_the_weights_and_leaves_the_model(small):
    twin = subject.with_changes(small.model, merge_r=2)
    assert len(twin.merge) == 2 and len(small.model.merge) == 0
    assert twin.head.weight is small.model.head.weight
    x = small.images(2)
    with torch.no_grad():
        merged = twin(x, return_trace=True)
        assert (
            merged.active[-1].any(0).sum()
            < small.model(x, return_trace=True).active[-1].any(0).sum()
        )
    plain = small.model.without_halting()
    assert (
        subject.with_changes(plain, halting="depth").halting is not None and plain.halting is None
    )


def test_resized_images_are_more_tokens(small):
    larger = subject.resized(small, 32)
    assert larger.model.config.grid**2 == 64 and larger.images(1).shape == (1, 1, 32, 32)
    assert small.model.config.image_size == 16
    before = small.model.block[0].attn.q_bn.bias
    assert not torch.equal(before, larger.model.block[0].attn.q_bn.bias), "fires as asked there too"


# -- the engine's clock ---------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"merge_r": 2}, {"halting": "sequential"}])
def test_the_pieces_of_blocks_are_the_parts(changes):
    one = subject.of_config("tiny", TINY.replace(**changes))
    trace = atsnn.freeze(one.model).trace(one.images(2))
    blocks = trace.block_seconds
    assert len(blocks) == 3
    of = {k: sum(block[k] for block in blocks) for k in blocks[0]}
    halts = of["scores"] + of["accumulators"] + of["readout"] + of["moves"]
    assert trace.seconds.attention == pytest.approx(of["attention"]) and of["attention"] > 0
    assert trace.seconds.halting == pytest.approx(halts) and of["scores"] > 0 < of["accumulators"]
    assert trace.seconds.merging == pytest.approx(of["matching"] + of["merging"])
    assert (of["merging"] > 0) == (of["matching"] > 0) == bool(changes.get("merge_r"))


# -- overheads ------------------------------------------------------------------------------------


def test_overheads(small):
    found = bench.measure_overheads(small, batches=(1, 2), tokens=(4, 16), rounds=1)
    axes = (
        {"alone": (1, 2)}, {"batch": (1,), "block": (1, 2, 3)}, {"batch": (2,), "tokens": (4, 16)}
    )  # fmt: skip
    want = [(axis, at) for one in axes for axis, values in one.items() for at in values]
    assert [(r["axis"], r["at"]) for r in found["rows"]] == want
    for row in found["rows"]:
        assert row["block_s"] == pytest.approx(sum(row["seconds"].values()))
        for piece, share in row["shares"].items():
            assert share == pytest.approx(row["seconds"][piece] / row["block_s"])
        assert set(row["shares"]) == set(overheads.OWN_PIECES)
    alone = found["rows"][0]["seconds"]
    assert alone["merging"] == alone["matching"] == 0 < alone["moves"]
    whole, *blocks = found["rows"][2:6]
    for piece, seconds in whole["seconds"].items():
        assert seconds == pytest.approx(sum(block["seconds"][piece] for block in blocks))
    assert whole["seconds"]["merging"] > 0, "a model that merges nothing is given merging"
    assert not small.model.config.merging
    assert [(r["batch"], r["backend"]) for r in found["break_even"]] == [
        (b, k) for b in (1, 2) for k in ("engine", "native")
    ]
    for row in found["break_even"]:
        assert row["saved"][0] == pytest.approx(0, abs=0.05) and len(row["times"]) == 4
        assert row["times"][0] == row["nothing_halted"]
    titles = [sheet.title for sheet in tables.overhead_sheets(found)]
    assert len(titles) == 5 and "halting alone" in titles[0]


def test_break_even_is_where_the_line_reaches_one():
    saved = [0.0, 0.2, 0.4, 0.6]
    assert overheads.break_even(saved, [1.09 - 0.9 * s for s in saved]) == pytest.approx(0.1)
    assert overheads.break_even(saved, [0.98 - 0.9 * s for s in saved]) == 0
    assert overheads.break_even(saved, [1.0 + 0.1 * s for s in saved]) is None


# -- growth ---------------------------------------------------------------------------------------


def test_a_power_law_is_found():
    x = [1, 2, 4, 8]
    found = growth.fit(x, [3 * v**1.5 for v in x])
    assert found.exponent == pytest.approx(1.5) and found.scale == pytest.approx(3)
    assert found.r2 == pytest.approx(1)
    assert growth.fit(x, [1, 2.2, 3.7, 8.5]).r2 < 1


def test_growth():
    values = {"tokens": (4, 16, 64), "batch": (1, 2), "active": (0.1, 1.0), "timesteps": (1, 2),
              "channels": (16, 32), "depth": (1, 2)}  # fmt: skip
    found = bench.measure_growth("tiny", TINY, list(values), values=values, rounds=1)
    axes = {axis["axis"]: axis for axis in found["axes"]}
    assert list(axes) == list(values)
    for name, axis in axes.items():
        want = [1 / 3, 1.0] if name == "active" else list(values[name])  # the least share there is
        assert [row["at"] for row in axis["points"]] == want
        for row in axis["points"]:
            s = row["seconds"]
            assert 0 < s["attention"] + s["mlp"] <= s["blocks"] < s["model"]
    # What is counted grows as it must; times are not for tests.
    assert axes["batch"]["fits"]["flops"]["exponent"] == pytest.approx(1)
    assert [row["rows"] for row in axes["depth"]["points"]] == [32, 64]
    assert [row["rows"] for row in axes["timesteps"]["points"]] == [48, 96]
    assert [row["image_size"] for row in axes["tokens"]["points"]] == [8, 16, 32]
    assert axes["channels"]["fits"]["flops"]["exponent"] > 1.3
    active = axes["active"]
    assert active["x"] == [row["rows"] for row in active["points"]], "of the cells that ran"
    assert active["x"][0] / active["x"][1] == pytest.approx(1 / 3, abs=0.05)
    sheets = tables.growth_sheets(found)
    assert len(sheets) == 7 and len(plots.growth_plots(found)) == 6


def test_peak_memory():
    held = growth.peak_memory(lambda: torch.ones(16 << 20).sum())
    if held is None:
        pytest.skip("the system does not tell")
    assert 60 << 20 < held < 100 << 20
    again = growth.peak_memory(lambda: torch.ones(16 << 20).sum())
    assert again > 60 << 20, "what was freed before is counted again"


# -- pictures and page ----------------------------------------------------------------------------


class Outline(HTMLParser):
    """Open tags, checked to be closed in order; text; addresses."""

    VOID = {"meta", "br", "path", "use", "rect", "line"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("kind", [[], ["--overheads"], ["--growth", "batch", "tokens"]])
def test_page_and_pictures(capsys, monkeypatch, tmp_path, kind):
    from PIL import Image

    monkeypatch.setenv("COLUMNS", "80")

    page, png = tmp_path / "new" / "page.html", tmp_path / "new" / "plot.png"
    arguments = ["--config", "spikformer_4_384", *SMALL, "--rounds", "1", *kind]
    arguments += ["--tokens", "4", "16"] if kind else []
    arguments += ["--batch", "1"]
    code, out, err = run(capsys, *arguments, "--html", str(page), "--plot", str(png))
    assert code == 0 and err == ""
    assert "…" not in out and max(map(len, out.splitlines())) <= 80, "nothing is cut off"
    outline = Outline()
    text = page.read_text()
    outline.feed(text)
    assert outline.open == [], "every tag is closed"
    assert not [link for link in outline.links if not link.startswith("#")], "asks for nothing"
    assert "url(http" not in text and "<script" not in text and "@import" not in text
    assert outline.seen.count("svg") >= 2 and outline.seen.count("table") >= 3
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "currentColor" in text and plots.SENTINEL not in text
    words = " ".join(outline.texts)
    assert "atsnn bench --config spikformer_4_384" in words and torch.__version__ in words
    # The page shows the numbers that the terminal shows.
    for number in re.findall(r"\d+\.\d+ ms", out):
        assert number in words
    with Image.open(png) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(10**7)) > 30


def test_svg_is_written(tmp_path, small):
    result = bench.bench(small, halted=[0.3], batches=[1], rounds=1)
    path = tmp_path / "plot.svg"
    plots.save(plots.bench_plots(result), path)
    assert path.read_text().count("<svg") == 1


def test_tables_show_what_was_measured(small):
    result = bench.bench(small, halted=[0.3], batches=[2], rounds=1)
    sheets = {sheet.title.split(",")[0]: sheet for sheet in tables.bench_sheets(result)}
    (cost,) = result["patterns"].values()
    rows = {row[0]: row[1:] for row in sheets["Cost an image with halting on"].rows if row}
    for part in ("stem", "attention", "mlp", "total"):
        on, off = cost["flops"][part], cost["dense"]["flops"][part]
        assert rows[part][:2] == [quantity(on / 2), percent(1 - on / off)]
    assert rows["mlp"][1] != "0.0 %" and rows["stem"][1] == "0.0 %"
    shown = [row for row in sheets["Latency"].rows if row]
    for row, scope in zip(shown, ("blocks", "model") * 2, strict=True):
        one = next(r for r in result["latency"] if r["backend"] == row[0])[scope]
        assert row[1:4] == [scope, *(milliseconds(one[k]["median_s"]) for k in ("off", "on"))]
        assert row[4:6] == [percent(one["latency_saved"]), percent(one["flops_saved"])]
    parts = result["breakdown"]
    assert [row["halted"] for row in parts] == ["off", "30 %"]
    shown = {row[0]: row[1:] for row in sheets["Where the engine's time goes"].rows if row}
    for part in ("stem", "attention", "mlp"):
        off, on = (f"{1e3 * row['seconds'][part]:.2f}" for row in parts)
        assert (shown[part][0], shown[part][2]) == (off, on)


def test_page_takes_no_text_for_markup():
    text = page("a <b>", ["c <d>"], [("e <f>", [], [])], {"g": "<h>"}, "atsnn <i>")
    for letter in "bdfhi":
        assert f"&lt;{letter}&gt;" in text and f"<{letter}>" not in text


def test_sheets():
    assert [number_of(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    machine = dict.fromkeys(("processor", "instruction_set", "torch", "atsnn"), "x")
    assert "x, 4 cores, 1 thread, x" in tables.machine_line(machine | {"cores": 4, "threads": 1})
    sheet = Sheet("a <b> [c]", ["x", "y"], note="n & m")
    sheet.add("[red]1", "<2>")
    sheet.rule()
    sheet.add("3", "4")
    assert "&lt;2&gt;" in sheet.html() and "a &lt;b&gt; [c]" in sheet.html()
    assert "<tr class=rule><th scope=row>3" in sheet.html() and "n &amp; m" in sheet.html()
    from rich.console import Console

    console = Console(width=60, record=True, file=io.StringIO())
    console.print(sheet.rich())
    assert "[red]1" in console.export_text()
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        sheet.add("1")
    assert (percent(0.1234), percent(None)) == ("12.3 %", "-")
    assert (quantity(1234), quantity(5e12), quantity(7)) == ("1.23 k", "5.00 T", "7")
    assert (milliseconds(1e-4), milliseconds(0.0123)) == ("0.100 ms", "12.30 ms")


# -- wrong use ------------------------------------------------------------------------------------

CONFIG = ["--config", "spikformer_4_384"]
WRONG = [
    (["--config", "nothing"], "--config must be one of spikformer_2_384"),
    ([*CONFIG, "--set", "T"], "--set must be name=value, got 'T'"),
    ([*CONFIG, "--set", "colour=red"], "expected names among"),
    ([*CONFIG, "--set", "T=x"], "T must be an integer"),
    (["--set", "T=2"], "--set belongs to an untrained network; expected --config"),
    (["--rates", "0.1", "0.2"], "--rates belongs to an untrained network"),
    ([*CONFIG, *SMALL, "--rates", "0", "0.2"], "--rates (spikes) must be"),
    ([*CONFIG, *SMALL, "--halted", "0.9"], "--halted must lie in 0 .. 1 - 1 / depth = 0.667"),
    ([*CONFIG, *SMALL, "halting=sequential", "--halted", "0.2"], "halts by 'rectangle' or 'depth'"),
    ([*CONFIG, *SMALL, "--backends", "gpu"], "--backends must be one of 'engine'"),
    ([*CONFIG, "--growth", "width"], "--growth must be one of 'tokens'"),
    ([*CONFIG, "--growth", "depth", "--batch", "1", "2"], "--growth takes one --batch, got 2"),
    (["--growth"], "--growth changes a configuration; expected --config"),
    ([*CONFIG, *SMALL, "--overheads", "--halted", "0.1", "0.2"], "takes one share of --halted"),
    ([*CONFIG, *SMALL, "--overheads", "--tokens", "5"], "tokens must be squares, got 5"),
    (["--plot", "x.pdf"], "--plot must end in .png or .svg, got x.pdf"),
    (["--html", "x.txt"], "--html must end in .html or .htm, got x.txt"),
    (["--json", "/proc/no/x.json"], "--json: expected a file that can be written"),
    (["--plot", "/proc/x.png"], "--plot: expected a file that can be written"),
    (["--limit", "0"], "--limit must be a number >= 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_use_is_named(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert message in err and err.startswith("atsnn: ") and "Traceback" not in err and out == ""


def test_wrong_use_leaves_no_folders(capsys, tmp_path):
    (tmp_path / "kept").mkdir()
    for where in ("new/deep/b.json", "kept/b.json"):
        code, _, _ = run(capsys, "--limit", "0", "--json", str(tmp_path / where))
        assert code == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_patterns_name_themselves():
    assert halting.Pattern().name == halting.OWN and halting.Pattern(0.25).name == "25 %"
