"""The examples of docs/existing_models.md run, as they stand there."""

import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "existing_models.md"


def blocks(language):
    return [part.split("```")[0] for part in PAGE.read_text().split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("number, name", [(0, "classifier.py"), (1, "halting.py")])
def test_the_examples_run(tmp_path, number, name):
    pytest.importorskip("sklearn")
    code, shown = blocks("python")[number], blocks("text")[number].splitlines()
    assert code.startswith(f"# {name}")
    (tmp_path / name).write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", name], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    # What is printed but for accuracies and times, which depend on the machine.
    assert [words(line) for line in lines] == [words(line) for line in shown]
    accuracies = [float(line.split("accuracy ")[1].split()[0].rstrip(","))
                  for line in lines if "accuracy" in line]  # fmt: skip
    assert len(accuracies) == 2 and min(accuracies) > 0.9


def words(line):
    return [word for word in line.split() if not word[0].isdigit()]
