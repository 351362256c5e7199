"""Data sets."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from atsnn import data
from atsnn.checks import InvalidValue


def test_digits_are_split_once_and_for_all():
    splits = data.load("digits", 8)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1437, "test": 360}
    test = splits["test"]
    assert test.images.shape == (360, 1, 8, 8) and test.images.dtype == torch.float32
    assert test.images.min() == 0 and test.images.max() == 1
    assert test.labels.bincount(minlength=10).min() >= 34, "stratified"
    again = data.load("digits", 8)["test"]
    assert torch.equal(again.images, test.images)
    train = {image.numpy().tobytes() for image in splits["train"].images}
    assert not any(image.numpy().tobytes() in train for image in test.images)


def test_images_are_resized():
    images = data.load("digits", 32)["train"].images
    assert images.shape[-2:] == (32, 32) and images.min() >= 0 and images.max() <= 1


def write_idx(path, array, compress):
    raw = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count, compress in (("train", 6, True), ("t10k", 4, False)):
        end = ".gz" if compress else ""
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{end}", images, compress)
        labels = np.arange(count, dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{end}", labels, compress)
    return tmp_path


def test_idx_files(idx_folder):
    splits = data.load("fashion-mnist", 28, idx_folder)
    assert splits["train"].images.shape == (6, 1, 28, 28) and len(splits["test"]) == 4
    assert splits["test"].labels.tolist() == [0, 1, 2, 3]
    raw = np.frombuffer((idx_folder / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
    want = torch.from_numpy(raw.astype(np.float32) / 255).view(4, 1, 28, 28)
    torch.testing.assert_close(splits["test"].images, want)


def test_bad_input_is_refused(idx_folder, tmp_path_factory):
    with pytest.raises(InvalidValue, match="data must be one of 'digits', 'fashion-mnist'"):
        data.load("nist", 28)
    with pytest.raises(InvalidValue, match="must be a directory, got /dev/null/nowhere"):
        data.load("digits", 28, "/dev/null/nowhere")
    with pytest.raises(data.DataError, match=r"expected the file train-images-idx3-ubyte or"):
        data.load("fashion-mnist", 28, tmp_path_factory.mktemp("empty"))
    file = idx_folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="expected an IDX file of unsigned bytes"):
        data.load("fashion-mnist", 28, idx_folder)
    packed = idx_folder / "train-images-idx3-ubyte.gz"
    whole = bytearray(packed.read_bytes())
    whole[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    packed.write_bytes(bytes(whole))
    with pytest.raises(data.DataError, match="expected an IDX file"):
        data.load("fashion-mnist", 28, idx_folder)
    packed.write_bytes(b"not gzip")
    with pytest.raises(data.DataError, match="expected an IDX file"):
        data.load("fashion-mnist", 28, idx_folder)
