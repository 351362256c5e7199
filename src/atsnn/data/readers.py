"""Readers of data sets in the files their authors give out. No code in them is run."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..checks import require
from .split import DataError, Parts, Split, expect_file

__all__ = ["FASHION_MNIST_ROOT", "cifar10", "cifar100", "digits", "fashion_mnist", "mnist",
           "tiny_imagenet"]  # fmt: skip

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "boot")  # fmt: skip
DATA_DIR = "give the folder with --data-dir"


def digits(root: Path | None) -> Parts:
    """scikit-learn's handwritten digits (UCI): 1,797 images of 8x8, a fifth held out."""
    require("sklearn", "train", "the data set 'digits'")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = (found.images / 16.0).astype(np.float32)[:, None]
    labels = found.target.astype(np.int64)
    # The split is fixed whatever the training seed: the test images are never trained on.
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    return Parts(
        *(
            Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]))
            for index in (train, test)
        )
    )


# -- MNIST and its like: IDX files ----------------------------------------------------------------


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """One IDX file of unsigned bytes with ``dims`` dimensions, gzip-compressed or not."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        _, kind, found = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{found}I", raw[4 : 4 + 4 * found])
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * found)
        if kind != 8 or values.size != int(np.prod(shape)) or found != dims:
            raise ValueError(
                f"{values.size} bytes of type {kind} for shape {shape}, not {dims} dimensions"
            )
        return values.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: expected an IDX file of unsigned bytes, got: {error}") from error


def _idx(data: str, folder: Path, hint: str, names: tuple[str, ...] | None = None) -> Parts:
    splits = []
    for prefix in ("train", "t10k"):
        arrays = []
        for what, dims in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)):
            name = f"{prefix}-{what}"
            arrays.append(_read_idx(expect_file(data, folder, (name, f"{name}.gz"), hint), dims))
        images, labels = arrays
        if len(images) != len(labels):
            raise DataError(
                f"{data}: expected a label an image in {folder}, got {len(images)} images and "
                f"{len(labels)} labels for {prefix!r}"
            )
        splits.append(replace(_split(images[:, None], labels), names=names))
    return Parts(*splits)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    # Copied: the arrays may look at bytes that cannot be written to.
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)))


def mnist(root: Path | None) -> Parts:
    """MNIST from its four IDX files."""
    return _idx("mnist", _needed("mnist", root), DATA_DIR)


def fashion_mnist(root: Path | None) -> Parts:
    """Fashion-MNIST from its four IDX files (Debian: ``dataset-fashion-mnist``)."""
    hint = f"{DATA_DIR}; Debian: apt install dataset-fashion-mnist"
    return _idx("fashion-mnist", root or FASHION_MNIST_ROOT, hint, CLOTHES)


# -- CIFAR ----------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR's pickles hold, arrays, bytes and lists; anything else is refused."""

    NAMES = {
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self.NAMES:
            # NumPy 2 knows the old place by its new name only.
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"a reference to {module}.{name}")


def _read_pickled(path: Path, label: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        found = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images = np.asarray(found[b"data"], dtype=np.uint8)
        labels = np.asarray(found[label], dtype=np.int64)
        return images.reshape(len(labels), 3, 32, 32), labels
    except Exception as error:  # unpickling raises whatever the bytes lead it to
        raise DataError(
            f"{path}: expected a batch of CIFAR's Python version, got: "
            f"{type(error).__name__}: {error}"
        ) from error


def _read_binary(path: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """A file of CIFAR's binary version: ``labels`` bytes, the last one the class, and 3,072."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if raw.size == 0 or raw.size % (3072 + labels):
        raise DataError(
            f"{path}: expected records of {3072 + labels} bytes, got {raw.size} bytes in all"
        )
    records = raw.reshape(-1, 3072 + labels)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]


def _cifar(
    name: str, root: Path | None, folders: tuple[str, str], train: tuple[str, ...], test: str,
    label: bytes, labels: int,
) -> Parts:  # fmt: skip
    root = _needed(name, root)
    for folder in (root, *(root / sub for sub in folders)):
        if (folder / train[0]).is_file():
            end, read = "", lambda path: _read_pickled(path, label)
        elif (folder / f"{train[0]}.bin").is_file():
            end, read = ".bin", lambda path: _read_binary(path, labels)
        else:
            continue
        parts = []
        for files in (train, (test,)):
            found = [read(expect_file(name, folder, (f"{f}{end}",), DATA_DIR)) for f in files]
            images, classes = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            parts.append(_split(images, classes))
        return Parts(*parts)
    raise DataError(
        f"{name}: expected the file {train[0]} or {train[0]}.bin in {root} or its folders "
        f"{' or '.join(folders)}, got none ({DATA_DIR})"
    )


def cifar10(root: Path | None) -> Parts:
    """CIFAR-10, its Python or its binary version."""
    return _cifar(
        "cifar10", root, ("cifar-10-batches-py", "cifar-10-batches-bin"),
        tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", b"labels", 1,
    )  # fmt: skip


def cifar100(root: Path | None) -> Parts:
    """CIFAR-100 with its fine labels, its Python or its binary version."""
    return _cifar(
        "cifar100", root, ("cifar-100-python", "cifar-100-binary"),
        ("train",), "test", b"fine_labels", 2,
    )  # fmt: skip


# -- Tiny ImageNet --------------------------------------------------------------------------------


def tiny_imagenet(root: Path | None) -> Parts:
    """Tiny ImageNet (200 classes, 64x64); its validation images, which have labels, are the test.

    Classes are numbered in the order of ``wnids.txt``.
    """
    name = "tiny-imagenet"
    root = _needed(name, root)
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    classes = expect_file(name, root, ("wnids.txt",), DATA_DIR).read_text().split()
    number = {wnid: index for index, wnid in enumerate(classes)}
    train = [
        (path, number[wnid])
        for wnid in classes
        for path in sorted((root / "train" / wnid / "images").glob("*.JPEG"))
    ]
    annotations = expect_file(name, root / "val", ("val_annotations.txt",), DATA_DIR)
    test = []
    for line in annotations.read_text().splitlines():
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number:
            raise DataError(
                f"{annotations}: expected lines of a file, a tab and a class of wnids.txt, "
                f"got {line!r}"
            )
        test.append((root / "val" / "images" / file, number[wnid]))
    for part, found in (("train", train), ("val", test)):
        if not found:
            raise DataError(f"{name}: expected images in {root / part}, got none")
    return Parts(_read_images(train), _read_images(test))


def _read_images(files: list[tuple[Path, int]]) -> Split:
    require("PIL", "train", "the data set 'tiny-imagenet'")
    from PIL import Image, UnidentifiedImageError

    images = np.empty((len(files), 3, 64, 64), np.uint8)
    for index, (path, _) in enumerate(files):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))  # some are grey
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path}: expected an image, got: {error}") from error
        if pixels.shape != (64, 64, 3):
            raise DataError(f"{path}: expected an image of 64x64, got {pixels.shape[1::-1]}")
        images[index] = pixels.transpose(2, 0, 1)
    return _split(images, np.array([label for _, label in files]))


def _needed(data: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"{data}: expected the folder with its files, got none ({DATA_DIR})")
    return root
