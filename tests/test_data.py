"""Data sets."""

from __future__ import annotations

import dataclasses
import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from atsnn import data
from atsnn.checks import InvalidValue
from atsnn.data import readers
from atsnn.data.scenes import CLUTTERED, SCENES, compose


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
    # What is made of it keeps the names.
    part = splits["test"].resized(14)[1:].held_out(1)[0]
    assert part.name(0) == "T-shirt" and part.name(9) == "boot" and part.name(10) == "10"


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


# -- readers of the files of other data sets ------------------------------------------------------


def test_mnist_needs_a_folder_and_reads_the_same_files(idx_folder):
    with pytest.raises(data.DataError, match="mnist: expected the folder with its files, got none"):
        data.load("mnist", 28)
    ours, theirs = data.load("mnist", 28, idx_folder), data.load("fashion-mnist", 28, idx_folder)
    assert torch.equal(ours["train"].images, theirs["train"].images)
    assert ours["train"].name(0) == "0"


def test_as_many_labels_as_images(idx_folder):
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.arange(3, dtype=np.uint8), False)
    with pytest.raises(data.DataError, match="got 4 images and 3 labels for 't10k'"):
        data.load("mnist", 28, idx_folder)
    write_idx(idx_folder / "t10k-labels-idx1-ubyte", np.zeros((4, 1), np.uint8), False)
    with pytest.raises(data.DataError, match="not 1 dimensions"):
        data.load("mnist", 28, idx_folder)


CIFAR = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 1, 10),
    "cifar100": (["train"], "test", b"fine_labels", 2, 100),
}
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py", ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python", ("cifar100", "binary"): "cifar-100-binary",
}  # fmt: skip


def write_cifar(root, name, version):
    """Files in the format of the authors': what images and labels they hold, in order."""
    train, test, label, labels, classes = CIFAR[name]
    folder = root / FOLDERS[name, version]
    folder.mkdir()
    rng = np.random.default_rng(0)
    written = {"train": [], "test": []}
    for file in (*train, test):
        images = rng.integers(0, 256, (3, 3072), dtype=np.uint8)
        found = rng.integers(0, classes, 3)
        written["test" if file == test else "train"].append((images, found))
        if version == "python":
            coarse = {b"coarse_labels": [0, 0, 0]} if name == "cifar100" else {}
            batch = {b"data": images, label: found.tolist(), b"batch_label": b"one", **coarse}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            heads = np.zeros((3, labels), np.uint8)
            heads[:, -1] = found
            (folder / f"{file}.bin").write_bytes(np.hstack([heads, images]).tobytes())
    return written


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("inside", [False, True], ids=["above", "inside"])
def test_cifar(tmp_path, name, version, inside):
    written = write_cifar(tmp_path, name, version)
    root = tmp_path / FOLDERS[name, version] if inside else tmp_path
    for part, split in data.load(name, 32, root).items():
        images, labels = (np.concatenate(found) for found in zip(*written[part], strict=True))
        want = torch.from_numpy(images).view(-1, 3, 32, 32)
        assert torch.equal(split.pixels, want) and split.labels.tolist() == labels.tolist()
        torch.testing.assert_close(split.images, want / 255)


def test_cifar_in_another_size(tmp_path):
    write_cifar(tmp_path, "cifar10", "binary")
    split = data.load("cifar10", 16, tmp_path)["test"]
    assert split.images.shape == (3, 3, 16, 16) and split.images.dtype == torch.float32


class Attack:
    def __reduce__(self):
        return (print, ("code was run",))


def test_no_code_in_a_pickle_is_run(tmp_path, capsys):
    write_cifar(tmp_path, "cifar100", "python")
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({b"data": Attack()}, protocol=2))
    with pytest.raises(data.DataError, match=r"a reference to (builtins|__builtin__).print"):
        data.load("cifar100", 32, tmp_path)
    assert "code was run" not in capsys.readouterr().out


def test_damaged_cifar_files_are_refused(tmp_path):
    with pytest.raises(data.DataError, match=r"expected the file train or train.bin in"):
        data.load("cifar100", 32, tmp_path)
    write_cifar(tmp_path, "cifar10", "python")
    python = tmp_path / "cifar-10-batches-py"
    whole = (python / "test_batch").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a pickle", pickle.dumps({b"data": 3})):
        (python / "test_batch").write_bytes(damaged)
        with pytest.raises(data.DataError, match="expected a batch of CIFAR's Python version"):
            data.load("cifar10", 32, tmp_path)
    (python / "data_batch_3").unlink()
    with pytest.raises(data.DataError, match="expected the file data_batch_3 in"):
        data.load("cifar10", 32, tmp_path)
    write_cifar(tmp_path, "cifar100", "binary")
    binary = tmp_path / "cifar-100-binary" / "test.bin"
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="expected records of 3074 bytes, got 9221 bytes"):
        data.load("cifar100", 32, tmp_path)


@pytest.fixture
def tiny_imagenet(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n002\nn001\n")
    lines = []
    for number, wnid in enumerate(("n002", "n001")):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for index in range(2):
            grey = number == 1 and index == 1
            shape = (64, 64) if grey else (64, 64, 3)
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            picture.save(folder / f"{wnid}_{index}.JPEG", quality=95)
        Image.new("RGB", (64, 64), (255, 0, 0)).save(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{('n001', 'n002')[number]}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet(tiny_imagenet):
    splits = data.load("tiny-imagenet", 64, tiny_imagenet)
    assert splits["train"].labels.tolist() == [0, 0, 1, 1]
    assert splits["test"].labels.tolist() == [1, 0]
    red = splits["test"].images[0]
    assert red[0].min() > 0.95 and red[1:].max() < 0.05
    grey = splits["train"].images[3]
    assert torch.equal(grey[0], grey[1]) and grey.std() > 0.1


def test_damaged_tiny_imagenet_files_are_refused(tiny_imagenet):
    root = tiny_imagenet / "tiny-imagenet-200"
    picture = root / "train" / "n001" / "images" / "n001_0.JPEG"
    picture.write_bytes(b"no picture")
    with pytest.raises(data.DataError, match=r"n001_0.JPEG: expected an image, got"):
        data.load("tiny-imagenet", 64, tiny_imagenet)
    from PIL import Image

    Image.new("RGB", (32, 64)).save(picture)
    with pytest.raises(data.DataError, match=r"expected an image of 64x64, got \(32, 64\)"):
        data.load("tiny-imagenet", 64, tiny_imagenet)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn009\n")
    with pytest.raises(data.DataError, match="a class of wnids.txt"):
        data.load("tiny-imagenet", 64, root)
    (root / "wnids.txt").unlink()
    with pytest.raises(data.DataError, match=r"expected the file wnids.txt in"):
        data.load("tiny-imagenet", 64, tiny_imagenet)


# -- splits ---------------------------------------------------------------------------------------


def test_held_out_images_are_the_same_ones_and_no_others():
    split = data.load("digits", 8)["train"]
    rest, held = split.held_out(100)
    again = split.held_out(100)[1]
    assert len(rest) == 1337 and len(held) == 100 and torch.equal(held.pixels, again.pixels)
    assert not torch.equal(held.pixels, split.held_out(100, seed=1)[1].pixels)
    together = torch.cat([rest.labels, held.labels])
    assert torch.equal(together.bincount(), split.labels.bincount())
    for count in (0, 1437):
        with pytest.raises(InvalidValue, match="count must be"):
            split.held_out(count)


def test_bytes_are_images_between_zero_and_one():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    split = data.Split(pixels, torch.zeros(1, dtype=torch.int64))
    assert split.images.max() == 1 and split.images.flatten()[51] == torch.tensor(51 / 255)
    with pytest.raises(InvalidValue, match=r"labels must have shape \(M\) = \(1\), got \(2\)"):
        data.Split(pixels, torch.zeros(2, dtype=torch.int64))


# -- scenes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes():
    recipe = dataclasses.replace(SCENES, train=40, test=20)
    return compose(recipe, readers.digits, None, 64)


def test_scenes_are_labelled_pixel_by_pixel(scenes):
    for split in scenes:
        assert split.pixels.dtype == torch.uint8 and split.maps.shape[1:] == (64, 64)
        assert 0.02 < (split.maps > 0).float().mean() < 0.5
        for label, seen in zip(split.labels.tolist(), split.maps, strict=True):
            assert (seen == label + 1).any(), "the largest object is in sight"
    assert len(scenes.train) == 40 and len(scenes.test) == 20 and scenes.train.pixel_classes == 11
    # Objects are bright where they are, the background is not.
    train = scenes.train
    assert (
        train.images[:, 0][train.maps > 0].mean() > 2 * train.images[:, 0][train.maps == 0].mean()
    )


def test_a_scene_is_the_same_every_time_and_its_parts_do_not_share_images(scenes):
    recipe = dataclasses.replace(SCENES, train=40, test=20)
    again = compose(recipe, readers.digits, None, 64)
    assert torch.equal(again.train.pixels, scenes.train.pixels)
    assert torch.equal(again.test.maps, scenes.test.maps)
    other = compose(dataclasses.replace(recipe, seed=1), readers.digits, None, 64)
    assert not torch.equal(other.train.pixels, scenes.train.pixels)
    # An image of the test part alone shows in no training scene: composed of black images only
    # the background is left.
    digits = readers.digits(None)
    black = data.Split(torch.zeros_like(digits.train.pixels), digits.train.labels)
    parts = compose(recipe, lambda root: data.Parts(black, digits.test), None, 64)
    assert (parts.train.maps == 0).all() and (parts.test.maps > 0).any()


def test_cluttered_scenes_hold_one_object():
    recipe = dataclasses.replace(CLUTTERED, train=30, test=10)
    train = compose(recipe, readers.digits, None, 64).train
    for label, seen in zip(train.labels.tolist(), train.maps, strict=True):
        assert seen.unique().tolist() == [0, label + 1]
    heights = [int((seen.any(1)).sum()) for seen in train.maps > 0]
    assert max(heights) <= 0.5 * 64 and min(heights) < 0.4 * 64


def test_a_scene_needs_room():
    with pytest.raises(InvalidValue, match="image_size must be a number >= 32, got 16"):
        data.load("scenes-digits", 16)
