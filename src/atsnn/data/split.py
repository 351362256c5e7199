"""A part of a data set, in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..checks import AtsnnError, check_integer, check_shape

__all__ = ["DataError", "Parts", "Split"]


class DataError(AtsnnError, ValueError):
    """A data set that is missing or not in its format."""


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes
    ----------
    pixels : Tensor
        ``[M, C, H, W]``: uint8 in 0..255, a quarter of the memory, or float32 in ``[0, 1]``.
    labels : Tensor
        ``[M]`` int64, the class of each image.
    maps : Tensor, optional
        ``[M, H, W]`` uint8, the class of each pixel, of data sets that have one.
    names : tuple of str, optional
        What the classes are called, where that is not their number.
    """

    pixels: Tensor
    labels: Tensor
    maps: Tensor | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_shape("Split", "pixels", self.pixels, M=None, C=None, H=None, W=None)
        M, _, H, W = self.pixels.shape
        check_shape("Split", "labels", self.labels, M=M)
        if self.maps is not None:
            check_shape("Split", "maps", self.maps, M=M, H=H, W=W)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | Tensor) -> Split:
        """Some of the images: a slice, or indices ``[K]`` int64."""
        maps = None if self.maps is None else self.maps[index]
        return replace(self, pixels=self.pixels[index], labels=self.labels[index], maps=maps)

    @property
    def images(self) -> Tensor:
        """``[M, C, H, W]`` float32 in ``[0, 1]``."""
        if self.pixels.dtype == torch.uint8:
            return self.pixels.to(torch.float32) / 255.0
        return self.pixels

    def name(self, label: int) -> str:
        """What a class is called: its number, where it has no name."""
        names = self.names or ()
        return names[label] if label < len(names) else str(label)

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1 if len(self) else 0

    @property
    def pixel_classes(self) -> int:
        """One more than the largest label of a pixel."""
        return 0 if self.maps is None or not len(self) else int(self.maps.max()) + 1

    def held_out(self, count: int, seed: int = 0) -> tuple[Split, Split]:
        """The split without ``count`` images, and those: the same ones for the same ``seed``."""
        check_integer("held_out", "count", count, at_least=1, at_most=len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[count:].sort().values], self[order[:count].sort().values]

    def resized(self, image_size: int) -> Split:
        """Images ``image_size`` high and wide (bilinear); maps by the nearest pixel."""
        if self.pixels.shape[-2:] == (image_size, image_size):
            return self
        size = (image_size, image_size)
        # By parts: resizing computes in float32, four times the bytes.
        parts = [
            nnf.interpolate(
                self[start : start + 4096].images, size, mode="bilinear", align_corners=False,
                antialias=True,
            ).clamp(0, 1)
            for start in range(0, len(self), 4096)
        ]  # fmt: skip
        pixels = (
            torch.cat(parts) if parts else self.images.new_empty(0, self.pixels.shape[1], *size)
        )
        maps = self.maps
        if maps is not None:
            maps = nnf.interpolate(maps[:, None].float(), size, mode="nearest")[:, 0].to(maps.dtype)
        return replace(self, pixels=pixels, maps=maps)


class Parts(NamedTuple):
    """The splits of a data set as it lies on disk."""

    train: Split
    test: Split


def expect_file(data: str, folder: Path, names: tuple[str, ...], hint: str) -> Path:
    """The first of ``names`` that is a file in ``folder``."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{data}: expected the file {' or '.join(names)} in {folder}, got none ({hint})"
    )
