"""Model cards: what a checkpoint is, how it was trained, by which command, and its limits."""

from __future__ import annotations

from typing import Any

from .checks import InvalidType
from .nn.config import SpikformerConfig

__all__ = ["model_card"]

PAPER = "https://arxiv.org/abs/2408.12293"

HEAD = """---
library_name: atsnn
pipeline_tag: {pipeline}
tags:
- spiking-neural-network
- vision-transformer
- adaptive-computation
- model_hub_mixin
---
"""

USE = """## Use

```python
import atsnn

model = atsnn.from_pretrained("{name}")
logits = model(images)  # float32 in 0..1, [B, {channels}, {size}, {size}]
fast = atsnn.freeze(model)  # for inference on CPUs
```
"""

USE_OF_RULE = """## Use

```python
import atsnn
from atsnn.checkpoint import load_trained
from atsnn.schedule import policy_scores, undirected

model = load_trained("{name}")  # under its rule; atsnn.from_pretrained loads the weights alone
logits = model(images)  # float32 in 0..1, [B, {channels}, {size}, {size}]
fast = atsnn.freeze(undirected(model))  # for inference on CPUs; it is given what the rule gives
logits = fast(images, scores=policy_scores(model, images))
```
"""

LIMITS = """## Limits

Trained on one small data set, for research into adaptive computation; not for decisions about
people. Images of other kinds, sizes or grey values are classified all the same, and wrongly. Energy
figures that the package prints are estimates for neuromorphic hardware, not measurements.
"""


def model_card(
    config: SpikformerConfig, extra: dict[str, Any] | None = None, name: str = "FOLDER"
) -> str:
    """The card of a checkpoint as Markdown, with the metadata that the hub reads.

    Parameters
    ----------
    config : SpikformerConfig
    extra : dict, optional
        What is known of its training: ``data``, ``command``, ``seed``, ``epochs``, ``init`` and
        the ``init_command`` that made it, measured accuracies and shares of cells.
    name : str
        What to load it by.
    """
    if extra is not None and not isinstance(extra, dict):
        raise InvalidType(f"model_card: extra must be a dict, got {type(extra).__name__}")
    known = extra or {}
    c = config
    pixels = c.task == "pixels"
    halting = {
        "rectangle": "Its tokens halt over blocks and timesteps (rectangle accumulator).",
        "depth": "Its tokens halt over blocks, at each timestep (depth accumulator).",
        "sequential": "Its tokens halt once for all later blocks and timesteps.",
        None: "Every block runs for every token at every timestep.",
    }[c.halting]
    if "policy" in known:
        halting = f"Its tokens halt by a rule, `{known['policy']}`, not by learned scores."
    if c.merging:
        halting += " Similar tokens merge."
    what = "each pixel of an image" if pixels else "images"
    lines = [
        HEAD.format(pipeline="image-segmentation" if pixels else "image-classification"),
        f"# A spiking vision transformer for {known.get('data', 'images')}",
        "",
        f"Classifies {what} ({c.num_classes} classes): {c.depth} blocks, {c.embed_dim} channels, "
        f"{c.grid**2} tokens, {c.T} timesteps. {halting} A reimplementation of the AT-SNN idea "
        f"([paper]({PAPER})); no number of the paper is claimed as reproduced.",
        "",
        *_training(known),
        (USE_OF_RULE if "policy" in known else USE).format(
            name=name, channels=c.in_channels, size=c.image_size,
        ),
        LIMITS,
    ]  # fmt: skip
    return "\n".join(lines)


def _training(known: dict[str, Any]) -> list[str]:
    labels = {
        "data": "data", "seed": "seed", "epochs": "epochs", "init": "began with the weights of",
        "validation_accuracy": "accuracy, validation", "validation_cells": "cells, validation",
        "validation_mean_iou": "mean IoU, validation", "test_accuracy": "accuracy, test",
        "test_cells": "cells executed, test", "test_mean_iou": "mean IoU, test",
    }  # fmt: skip
    rows = [
        f"| {label} | {_shown(key, known[key])} |" for key, label in labels.items() if key in known
    ]
    if not rows:
        return []
    found = ["## Training", "", "| | |", "|---|---|", *rows, ""]
    commands = [
        f"    {known[name]}{end}"
        for name, end in (("init_command", f" --out {known.get('init')}"), ("command", ""))
        if name in known
    ]
    if commands:
        found += [f"Command{'s' * (len(commands) - 1)}:", "", *commands, ""]
    return found


def _shown(key: str, value: Any) -> str:
    if key.endswith(("accuracy", "cells", "iou")):
        return f"{100 * value:.2f} %"
    return str(value)
