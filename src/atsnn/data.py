"""Data sets: images as float32 ``[M, C, H, W]`` in ``[0, 1]`` and labels ``[M]`` int64."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from .checks import AtsnnError, InvalidValue, check_choice, check_integer, require

__all__ = ["DATASETS", "DataError", "Split", "load", "patterns"]


class DataError(AtsnnError, ValueError):
    """A data set that is missing or not in its format."""


@dataclass(frozen=True)
class Split:
    """Images ``[M, C, H, W]`` float32 in ``[0, 1]`` and labels ``[M]`` int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def _digits(root: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits (UCI): 1,797 images of 8x8, a fifth held out."""
    require("sklearn", "train", "the data set 'digits'")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    # The split is fixed whatever the training seed: the test images are never trained on.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return {
        name: (torch.from_numpy(images[index]), torch.from_numpy(labels[index]))
        for name, index in (("train", train), ("test", test))
    }


FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")


def _read_idx(path: Path) -> np.ndarray:
    """One IDX file (the format of MNIST), gzip-compressed or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        _, kind, dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{dims}I", raw[4 : 4 + 4 * dims])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
        if kind != 8 or values.size != int(np.prod(shape)):
            raise ValueError(f"{values.size} bytes of type {kind} for shape {shape}")
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: expected an IDX file of unsigned bytes, got: {error}") from error


def _fashion_mnist(root: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Fashion-MNIST from its four IDX files (Debian: ``dataset-fashion-mnist``)."""
    folder = root or FASHION_MNIST_ROOT
    parts = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files = []
        for what in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            found = [p for end in ("", ".gz") if (p := folder / f"{prefix}-{what}{end}").is_file()]
            if not found:
                raise DataError(
                    f"fashion-mnist: expected the file {prefix}-{what}[.gz] in {folder}, got none "
                    "(give the folder with --data-dir; Debian: apt install dataset-fashion-mnist)"
                )
            files.append(_read_idx(found[0]))
        images = torch.from_numpy(files[0].astype(np.float32) / 255.0)[:, None]
        parts[split] = (images, torch.from_numpy(files[1].astype(np.int64)))
    return parts


DATASETS: dict[str, Callable[[Path | None], dict[str, tuple[Tensor, Tensor]]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
}


def load(name: str, image_size: int, root: str | Path | None = None) -> dict[str, Split]:
    """A data set by name, its images resized to ``image_size`` (bilinear).

    Parameters
    ----------
    name : str
        One of ``DATASETS``.
    image_size : int
        Height and width of the images returned.
    root : path, optional
        Where the files of the data set lie, if it has files.

    Returns
    -------
    dict of str to Split
        ``"train"`` and ``"test"``.
    """
    check_choice("load", "data", name, DATASETS)
    check_integer("load", "image_size", image_size, at_least=1)
    if root is not None and not Path(root).is_dir():
        raise InvalidValue(f"load: the data folder must be a directory, got {root}")
    splits = {}
    for split, (images, labels) in DATASETS[name](None if root is None else Path(root)).items():
        resized = nnf.interpolate(
            images, (image_size, image_size), mode="bilinear", align_corners=False, antialias=True
        )
        splits[split] = Split(resized.clamp(0, 1), labels)
    return splits


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
