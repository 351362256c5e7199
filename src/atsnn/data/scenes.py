"""Scenes composed of real images: objects at random places and scales among clutter.

The tasks follow cluttered MNIST (Mnih et al., arXiv 1406.6247): what is to be recognised fills a
small part of the canvas, the rest is background and pieces of other objects. Here they are made of
Fashion-MNIST or of handwritten digits, with a label for every pixel too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..checks import check_integer
from .split import Parts, Split

__all__ = ["CLUTTERED", "SCENES", "Recipe", "compose"]

INK = 0.15  # an object's pixel is one that is brighter than this


@dataclass(frozen=True)
class Recipe:
    """What stands in a scene.

    Attributes
    ----------
    objects : tuple of int
        The fewest and the most objects.
    scale : tuple of float
        The smallest and the largest height of an object, as a share of the canvas.
    pieces : tuple of int
        The fewest and the most distractors: square pieces of other objects.
    piece : tuple of float
        Their height as a share of the canvas.
    background : float
        The brightest background: a smooth random pattern.
    noise : float
        Standard deviation of the noise of the pixels.
    train, test : int
        Scenes of each part, composed of images of that part of the data set alone.
    seed : int
    """

    objects: tuple[int, int] = (1, 1)
    scale: tuple[float, float] = (0.3, 0.5)
    pieces: tuple[int, int] = (4, 8)
    piece: tuple[float, float] = (0.1, 0.16)
    background: float = 0.3
    noise: float = 0.03
    train: int = 20_000
    test: int = 5_000
    seed: int = 0


CLUTTERED = Recipe()
SCENES = Recipe(objects=(2, 4), scale=(0.2, 0.45))


def compose(
    recipe: Recipe, read: Callable[[Path | None], Parts], root: Path | None, image_size: int
) -> Parts:
    """Scenes of the images that ``read`` gives.

    A scene's label is the class of the object with most pixels in sight, the first of them on a
    tie. Its map holds 0 where the background or a distractor is and ``class + 1`` where an object
    is; later objects cover earlier ones.
    """
    check_integer("compose", "image_size", image_size, at_least=32)
    source = read(root)
    return Parts(
        _scenes(source.train, recipe.train, recipe, image_size, 2 * recipe.seed),
        _scenes(source.test, recipe.test, recipe, image_size, 2 * recipe.seed + 1),
    )


def _scenes(source: Split, count: int, recipe: Recipe, size: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = source.images[:, 0]
    pixels = torch.empty(count, 1, size, size, dtype=torch.uint8)
    maps = torch.zeros(count, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        canvas = _background(recipe, size, generator)
        for _ in range(_between(recipe.pieces, generator)):
            _paste_piece(canvas, _any_of(images, generator), recipe, generator)
        seen, found = maps[index], list[int]()
        for _ in range(_between(recipe.objects, generator)):
            chosen = int(torch.randint(len(source), (), generator=generator))
            label = int(source.labels[chosen])
            # Which object each pixel is of: classes may repeat in a scene.
            _paste(canvas, seen, images[chosen], len(found) + 1, recipe, generator)
            found.append(label)
        area = seen.flatten().long().bincount(minlength=len(found) + 1)[1:]
        labels[index] = found[int(area.argmax())]
        seen.copy_(torch.tensor([0] + [label + 1 for label in found])[seen.long()])
        canvas += recipe.noise * torch.randn((size, size), generator=generator)
        pixels[index, 0] = (canvas.clamp(0, 1) * 255).round().to(torch.uint8)
    return Split(pixels, labels, maps, source.names)


def _background(recipe: Recipe, size: int, generator: torch.Generator) -> Tensor:
    coarse = torch.rand((1, 1, 6, 6), generator=generator) * recipe.background
    smooth = nnf.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return smooth[0, 0]


def _paste(
    canvas: Tensor, seen: Tensor, image: Tensor, number: int, recipe: Recipe,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """An object of a random size at a random place; ``seen`` becomes ``number`` where it is."""
    side = _length(recipe.scale, len(canvas), generator)
    scaled = nnf.interpolate(
        image[None, None], (side, side), mode="bilinear", align_corners=False, antialias=True
    )[0, 0]
    y, x = torch.randint(len(canvas) - side + 1, (2,), generator=generator).tolist()
    ink = scaled > INK
    canvas[y : y + side, x : x + side][ink] = scaled[ink]
    seen[y : y + side, x : x + side][ink] = number


def _paste_piece(canvas: Tensor, image: Tensor, recipe: Recipe, generator: torch.Generator) -> None:
    """A square piece of another object, as bright as it is there."""
    side = _length(recipe.piece, len(canvas), generator)
    scaled = nnf.interpolate(
        image[None, None], (3 * side, 3 * side), mode="bilinear", align_corners=False,
        antialias=True,
    )[0, 0]  # fmt: skip
    sy, sx = torch.randint(2 * side + 1, (2,), generator=generator).tolist()
    y, x = torch.randint(len(canvas) - side + 1, (2,), generator=generator).tolist()
    piece = scaled[sy : sy + side, sx : sx + side]
    ink = piece > INK
    canvas[y : y + side, x : x + side][ink] = piece[ink]


def _any_of(images: Tensor, generator: torch.Generator) -> Tensor:
    return images[int(torch.randint(len(images), (), generator=generator))]


def _between(bounds: tuple[int, int], generator: torch.Generator) -> int:
    return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))


def _length(shares: tuple[float, float], size: int, generator: torch.Generator) -> int:
    low, high = (round(share * size) for share in shares)
    return _between((low, high), generator)
