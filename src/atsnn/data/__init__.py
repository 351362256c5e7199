"""Data sets: images, labels and, of scenes, the class of every pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..checks import InvalidValue, check_choice, check_integer
from . import readers
from .scenes import CLUTTERED, SCENES, Recipe, compose
from .split import DataError, Parts, Split

__all__ = ["DATASETS", "DataError", "DataSet", "Parts", "Split", "load", "patterns"]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is read.

    Attributes
    ----------
    read : callable
        Its parts, from the folder its files lie in, or ``None``.
    channels, classes : int
    recipe : Recipe, optional
        Of scenes, how they are composed of what ``read`` gives. The class of a pixel is 0 for the
        background and that of the object there plus one.
    """

    read: Callable[[Path | None], Parts]
    channels: int = 1
    classes: int = 10
    recipe: Recipe | None = None

    def load(self, root: Path | None, image_size: int) -> Parts:
        if self.recipe is not None:
            return _composed(self, root, image_size)
        return Parts(*(split.resized(image_size) for split in self.read(root)))


@lru_cache(maxsize=1)  # it takes half a minute: runs that follow each other do it once
def _composed(data: DataSet, root: Path | None, image_size: int) -> Parts:
    assert data.recipe is not None
    return compose(data.recipe, data.read, root, image_size)


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(readers.digits),
    "fashion-mnist": DataSet(readers.fashion_mnist),
    "mnist": DataSet(readers.mnist),
    "cifar10": DataSet(readers.cifar10, 3),
    "cifar100": DataSet(readers.cifar100, 3, 100),
    "tiny-imagenet": DataSet(readers.tiny_imagenet, 3, 200),
    "cluttered-digits": DataSet(readers.digits, recipe=CLUTTERED),
    "cluttered-fashion": DataSet(readers.fashion_mnist, recipe=CLUTTERED),
    "scenes-digits": DataSet(readers.digits, recipe=SCENES),
    "scenes-fashion": DataSet(readers.fashion_mnist, recipe=SCENES),
}


def load(name: str, image_size: int, root: str | Path | None = None) -> dict[str, Split]:
    """A data set by name.

    Parameters
    ----------
    name : str
        One of ``DATASETS``.
    image_size : int
        Height and width of the images returned. Images are resized to it (bilinear); scenes are
        composed on a canvas of this size.
    root : path, optional
        Where the files of the data set lie, if it has files.

    Returns
    -------
    dict of str to Split
        ``"train"`` and ``"test"``.

    Raises
    ------
    DataError
        If files are missing or damaged.
    """
    check_choice("load", "data", name, DATASETS)
    check_integer("load", "image_size", image_size, at_least=1)
    if root is not None and not Path(root).is_dir():
        raise InvalidValue(f"load: the data folder must be a directory, got {root}")
    return DATASETS[name].load(None if root is None else Path(root), image_size)._asdict()


def patterns(count: int, channels: int, image_size: int, seed: int = 0) -> Tensor:
    """Images of nothing, for measuring speed: smooth patterns under noise.

    Pixels resemble their neighbours, as those of a photograph do, so that spikes come in patches.

    Parameters
    ----------
    count, channels, image_size : int
        Images, their channels, their height and width.
    seed : int

    Returns
    -------
    Tensor
        ``[count, channels, image_size, image_size]`` float32 in 0..1; the first images do not
        depend on how many there are.
    """
    for name, value in (("count", count), ("channels", channels), ("image_size", image_size)):
        check_integer("patterns", name, value, at_least=1)
    found = torch.empty(count, channels, image_size, image_size)
    for number in range(count):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        coarse = torch.rand((1, channels, 8, 8), generator=generator)
        smooth = nnf.interpolate(coarse, image_size, mode="bilinear")[0]
        noise = torch.rand((channels, image_size, image_size), generator=generator)
        found[number] = 0.7 * smooth + 0.3 * noise
    return found
