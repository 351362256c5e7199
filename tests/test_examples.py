"""The examples of the documentation, as somebody would paste them: each on its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/engine.md", "docs/benchmarking.md")


def examples():
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert blocks, f"{page} has no example"
        for number, code in enumerate(blocks):
            if ".cuda()" not in code:
                yield pytest.param(code, id=f"{page}-{number}")


@pytest.mark.parametrize("code", list(examples()))
def test_an_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "spikingjelly" in code:
        pytest.importorskip("spikingjelly")
    exec(compile(code, "<example>", "exec"), {})
