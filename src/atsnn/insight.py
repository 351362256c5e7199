"""Where halting happens, for which images, and what goes wrong because of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import InvalidValue, check_integer
from .data import Split
from .nn.model import ATSpikformer, evaluating
from .sheets import Sheet, percent
from .train.evaluation import target_of

__all__ = ["Insight", "draw_classes", "insight", "insight_sheets"]

INK = 0.15  # a token of which no pixel is brighter shows background
QUANTILES = 5


@dataclass(frozen=True)
class Insight:
    """What a model did with every image of a split.

    Attributes
    ----------
    classes : Tensor
        ``[M]`` int64, the image's class.
    labels, predicted, without : Tensor
        ``[M]`` int64: the class, the one found, and the one found by the same weights with nothing
        halted and nothing merged. With ``task="pixels"`` ``[M, H, W]``: those of every pixel.
    confidence : Tensor
        ``[M]`` float32, probability of the class found with nothing halted, averaged over pixels if
        it is theirs: how easy the image is, whatever halting does to it.
    cells : Tensor
        ``[M]`` float32, share of cells executed.
    blocks : Tensor
        ``[M, N]`` float32, blocks run for each token, averaged over the timesteps.
    ink : Tensor
        ``[M, N]`` bool, whether there is anything in the token's patch; of data sets that say it of
        every pixel, whether an object is.
    depth : int
        Blocks of the network.
    names : tuple of str
        What the classes are called.
    labelled : bool
        Whether the data set said where objects are.
    """

    classes: Tensor
    labels: Tensor
    predicted: Tensor
    without: Tensor
    confidence: Tensor
    cells: Tensor
    blocks: Tensor
    ink: Tensor
    depth: int
    names: tuple[str, ...]
    labelled: bool = False

    @property
    def right(self) -> Tensor:
        return self.predicted == self.labels

    @property
    def asked(self) -> str:
        """What has a class."""
        return "images" if self.labels.dim() == 1 else "pixels"

    @property
    def lost(self) -> float:
        """Share of images, or of pixels, that halting and merging turn from right to wrong."""
        return float((~self.right & (self.without == self.labels)).double().mean())

    @property
    def won(self) -> float:
        """Share of images, or of pixels, that they turn from wrong to right."""
        return float((self.right & (self.without != self.labels)).double().mean())


@torch.no_grad()
def insight(model: ATSpikformer, split: Split, batch_size: int = 128) -> Insight:
    """Run a model on a split, with its halting and without."""
    if not len(split):
        raise InvalidValue("insight: expected at least one image, got none")
    c = model.config
    labels = target_of(split, c.task)
    parts: list[tuple[Tensor, ...]] = []
    with evaluating(model):
        plain = model.without_halting().eval()
        for start in range(0, len(split), batch_size):
            images = split[start : start + batch_size].images
            trace = model(images, return_trace=True, firing_rates=False)
            sure, without = plain(images).softmax(1).max(1)
            if split.maps is not None:
                here = split.maps[start : start + batch_size].unsqueeze(1) > 0
            else:
                here = images.amax(1, keepdim=True) > INK
            patches = torch.nn.functional.max_pool2d(here.float(), c.patch)
            parts.append(
                (
                    trace.logits.argmax(1), without, sure.view(len(images), -1).mean(1),
                    trace.active.float().mean((0, 1, 3)), trace.depth.float().mean(0),
                    patches.flatten(1) > 0,
                )
            )  # fmt: skip
    predicted, without, sure, cells, blocks, ink = map(torch.cat, zip(*parts, strict=True))
    return Insight(
        classes=split.labels, labels=labels, predicted=predicted, without=without,
        confidence=sure, cells=cells, blocks=blocks, ink=ink, depth=c.depth,
        names=tuple(split.name(k) for k in range(split.classes)), labelled=split.maps is not None,
    )  # fmt: skip


def insight_sheets(found: Insight) -> list[Sheet]:
    """By class, by how easy an image is, by what a token shows, and what goes wrong."""
    return [_by_class(found), _by_confidence(found), _by_ink(found)]


def to_dict(found: Insight) -> dict[str, Any]:
    """The numbers of the tables."""
    return {
        "classes": [
            {"class": int(k)} | _group(found, found.classes == k) for k in found.classes.unique()
        ],
        "confidence": [_group(found, chosen) for chosen in _fifths(found)],
        "blocks_on_ink": _mean(found.blocks[found.ink]),
        "blocks_on_background": _mean(found.blocks[~found.ink]),
        "share_of_background": float((~found.ink).double().mean()),
        "lost": found.lost,
        "won": found.won,
    }


def _group(found: Insight, chosen: Tensor) -> dict[str, Any]:
    right = found.right[chosen]
    without = found.without[chosen] == found.labels[chosen]
    return {
        "images": int(chosen.sum()),
        "cells": _mean(found.cells[chosen]),
        "accuracy": _mean(right),
        "accuracy_without": _mean(without),
        "confidence": _mean(found.confidence[chosen]),
    }


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


def _fifths(found: Insight) -> list[Tensor]:
    """The images by confidence, the least sure first, in fifths."""
    order = found.confidence.argsort(stable=True)
    masks = []
    for part in order.tensor_split(min(QUANTILES, len(order))):
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[part] = True
        masks.append(mask)
    return masks


COLUMNS = ["cells", "accuracy", "halting off"]


def _cells(group: dict[str, Any]) -> list[str]:
    return [percent(group["cells"]), percent(group["accuracy"], 2),
            percent(group["accuracy_without"], 2)]  # fmt: skip


def _by_class(found: Insight) -> Sheet:
    sheet = Sheet("By class", ["class", "images", *COLUMNS])
    for group in to_dict(found)["classes"]:
        sheet.add(found.names[group["class"]], str(group["images"]), *_cells(group))
    sheet.note = "halting off: the same weights with nothing halted and nothing merged."
    return sheet


def _by_confidence(found: Insight) -> Sheet:
    sheet = Sheet("By how sure the model is with halting off", ["fifth", "sure", *COLUMNS])
    for number, group in enumerate(to_dict(found)["confidence"], 1):
        sheet.add(f"{number}", percent(group["confidence"]), *_cells(group))
    sheet.note = (
        f"The least sure fifth first. Halting turns {100 * found.lost:.2f} % of the {found.asked} "
        f"from right to wrong and {100 * found.won:.2f} % from wrong to right."
    )
    return sheet


def _by_ink(found: Insight) -> Sheet:
    sheet = Sheet("By what a token shows", ["token", "share", "blocks run"])
    for name, chosen in (("something", found.ink), ("background", ~found.ink)):
        blocks = _mean(found.blocks[chosen])
        share = float(chosen.double().mean())
        sheet.add(name, percent(share), "-" if blocks is None else f"{blocks:.2f}")
    background = "no object's pixel" if found.labelled else f"no pixel brighter than {INK}"
    sheet.note = f"blocks run: averaged over the timesteps; background: {background}."
    return sheet


def draw_classes(found: Insight, split: Split, path: str | Path) -> Path:
    """Draw, for each class, the mean image and the mean number of blocks each token ran.

    Below them the images that keep most and fewest cells, each with the blocks of its own tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = found.classes.unique().tolist()
    check_integer("draw_classes", "classes", len(classes), at_least=1, at_most=64)
    side = round(found.blocks.shape[1] ** 0.5)
    figure = Figure(figsize=(1.15 * len(classes) + 0.9, 7.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(6, len(classes), squeeze=False)
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": found.depth}
    names = ("mean image", "mean blocks", "most cells", "its blocks", "fewest cells", "its blocks")
    for column, k in enumerate(classes):
        chosen = (found.classes == k).nonzero().squeeze(1)
        cells = found.cells[chosen]
        most, fewest = chosen[cells.argmax()], chosen[cells.argmin()]
        shown = found.blocks[chosen].mean(0).view(side, side)
        axes[0, column].imshow(split[chosen].images.mean((0, 1)).numpy(), cmap="gray")
        picture = axes[1, column].imshow(shown.numpy(), **scale)
        for row, index in ((2, most), (4, fewest)):
            axes[row, column].imshow(split[index[None]].images[0].mean(0).numpy(), cmap="gray",
                                     vmin=0, vmax=1)  # fmt: skip
            axes[row, column].set_title(percent(float(found.cells[index]), 0), fontsize=7, pad=2)
            axes[row + 1, column].imshow(found.blocks[index].view(side, side).numpy(), **scale)
        axes[0, column].set_title(
            f"{found.names[k]}\n{percent(float(cells.mean()), 0)} of cells", fontsize=8
        )
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name, fontsize=8)
    for one in axes.flat:
        one.set_xticks([])
        one.set_yticks([])
    bar = figure.colorbar(picture, ax=axes[1, :].tolist(), shrink=0.9, pad=0.01, label="blocks")
    bar.ax.tick_params(labelsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
