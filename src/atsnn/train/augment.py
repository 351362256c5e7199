"""Augmentation of training images, and of the maps that go with them."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..data import Split
from .config import TrainConfig

__all__ = ["augmented"]


def augmented(split: Split, config: TrainConfig, generator: torch.Generator) -> Split:
    """Each image shifted, perhaps mirrored, perhaps with a rectangle erased; maps likewise."""
    images, maps = split.images, split.maps
    if config.shift:
        rows, columns = _shifts(images, config.shift, generator)
        images = _shifted(images, config.shift, rows, columns)
        if maps is not None:
            maps = _shifted(maps[:, None], config.shift, rows, columns)[:, 0]
    if config.flip:
        mirrored = torch.rand(len(split), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if maps is not None:
            maps = torch.where(mirrored[:, None, None], maps.flip(-1), maps)
    if config.erase:
        images = _erased(images, config.erase, generator)
    return Split(images, split.labels, maps)


def _shifts(images: Tensor, shift: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows and columns of the padded image each image takes."""
    M, _, H, W = images.shape
    dy, dx = torch.randint(0, 2 * shift + 1, (2, M, 1), generator=generator)
    return dy + torch.arange(H), dx + torch.arange(W)


def _shifted(images: Tensor, shift: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Each image shifted by up to ``shift`` pixels each way, zeros coming in."""
    padded = nnf.pad(images, (shift, shift, shift, shift))
    each = torch.arange(len(images))[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def _erased(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., arXiv 1708.04896): rectangles of 2-25 % of the area, zeroed."""
    M, _, H, W = images.shape
    chosen = torch.rand(M, generator=generator) < share
    area = 0.02 + 0.23 * torch.rand(M, generator=generator)
    aspect = torch.exp((torch.rand(M, generator=generator) - 0.5) * 2)
    height = (H * (area * aspect).sqrt()).clamp(1, H)
    width = (W * (area / aspect).sqrt()).clamp(1, W)
    top = torch.rand(M, generator=generator) * (H - height)
    left = torch.rand(M, generator=generator) * (W - width)
    y, x = torch.arange(H) + 0.5, torch.arange(W) + 0.5
    inside_y = (y >= top[:, None]) & (y < (top + height)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + width)[:, None])
    gone = chosen[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return images.masked_fill(gone[:, None], 0.0)
