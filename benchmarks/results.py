"""Which command made which numbers of the documents, and how long it takes.

python benchmarks/results.py        what `make results` prints
"""

from __future__ import annotations

import study
from rich.console import Console

from atsnn.sheets import Sheet

# What, the documents whose numbers it makes, and the minutes it took on two cores.
COMMANDS = (
    ("make bench", "README.md", "1"),
    ("make bars", "results/performance.md", "45"),
    ("make bench-{halting,training,growth}", "results/README.md", "in bars"),
    ("make bench-{attention,neuron,dropin}", "results/README.md", "in bars"),
    ("make bench-{linear,model}", "engine.md", "in bars"),
    ("make gpu-report", "gpu.md", "10"),
    ("atsnn train, as the model cards say", "results/README.md", "6 each"),
    ("make study", "results/study.md", "as below"),
)


def main() -> None:
    sheet = Sheet("What makes the numbers", ["command", "numbers in", "minutes"])
    for row in COMMANDS:
        sheet.add(*row)
    Console().print(sheet.rich())
    study.overview()


if __name__ == "__main__":
    main()
