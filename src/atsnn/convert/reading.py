"""Reading a state dict that nobody vouches for: no code runs, and no claim is believed unseen."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..checks import STORAGE_DTYPES, CheckpointError, shape_of
from .common import COUNTER

WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
PICKLED = (".pth", ".pt", ".tar")  # .pth.tar is what timm writes


def read(where: str, path: Path) -> Any:
    if not path.is_file():
        got = "a directory" if path.is_dir() else "none"
        raise CheckpointError(f"{where}: expected a file, got {got}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{where}: expected a safetensors file, got: {error}") from error
    if path.suffix not in PICKLED:
        known = ", ".join((*PICKLED, ".safetensors"))
        raise CheckpointError(
            f"{where}: expected a file name that ends in one of {known}, got {path.name!r}"
        )
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            _check_archive(where, path)
        # timm keeps its arguments in a Namespace, which is no more than a dictionary. PyTorch
        # warns about foreign pickles, which are then read or refused.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        call = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = f"one that refers to {call[1]}" if call else "a damaged or foreign one"
        raise CheckpointError(
            f"{where}: expected a pickle of tensors and plain values, got {got}"
        ) from error
    except Exception as error:  # damage shows as nearly any type
        # The first sentence: PyTorch's next one may advise to run the code in it.
        text = re.split(r"\. |\n", str(error))[0]
        raise CheckpointError(
            f"{where}: expected a file written by torch.save, got: {type(error).__name__}: {text}"
        ) from error


def _check_archive(where: str, path: Path) -> None:
    """Refuse compressed archives, which could unpack to any size; torch.save does not compress."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{where}: expected an archive without compression, as torch.save writes it, "
                    f"got {_short(member.filename)} compressed"
                )


def unwrap(where: str, found: Any) -> dict[str, Tensor]:
    """The tensors by name: out of its wrapper, without the prefix of parallel training."""
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{where}: expected a mapping of names to tensors, got {type(found).__name__}"
        )
    for key in WRAPPERS:
        if isinstance(found.get(key), Mapping):
            found = found[key]
            break
    for name, value in found.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{where}: expected names that are strings, got {_short(name)} of type "
                f"{type(name).__name__}"
            )
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{where}: {_short(name)} must be a tensor, got {type(value).__name__}"
            )
    if all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): value for name, value in found.items()}
    return dict(found)


def check_tensors(where: str, tensors: dict[str, Tensor]) -> torch.dtype:
    """The dtype of the weights; every tensor is dense, and has the memory that its shape says.

    Tensors may be views. Were they allowed to overlap, a small file could claim a large network.
    """
    first, needed, owned = "", 0, {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{where}: {_short(name)} must be a dense tensor with values")
        dtypes = (torch.int64,) if name.endswith(COUNTER) else STORAGE_DTYPES
        if tensor.dtype not in dtypes:
            listed = ", ".join(str(dtype) for dtype in dtypes)
            raise CheckpointError(
                f"{where}: {_short(name)} must have one of the dtypes {listed}, got {tensor.dtype}"
            )
        if dtypes == STORAGE_DTYPES:
            first = first or name
            if tensor.dtype != tensors[first].dtype:
                raise CheckpointError(
                    f"{where}: expected one dtype for all weights, got {tensors[first].dtype} for "
                    f"{_short(first)} and {tensor.dtype} for {_short(name)}"
                )
        storage = tensor.untyped_storage()
        owned[storage.data_ptr()] = storage.nbytes()
        size = tensor.numel() * tensor.element_size()
        needed += size
        if size > storage.nbytes():
            raise CheckpointError(
                f"{where}: {_short(name)} must have memory for its shape {shape_of(tensor)}, "
                f"got {storage.nbytes()} bytes"
            )
    if needed > sum(owned.values()):
        raise CheckpointError(
            f"{where}: expected tensors that share no memory, got {needed} bytes of tensors "
            f"in {sum(owned.values())}"
        )
    return tensors[first].dtype if first else torch.float32


def check_values(where: str, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: {name} must be finite, got NaN or infinite values")
    if name.endswith(("running_var", COUNTER)) and bool((tensor < 0).any()):
        raise CheckpointError(f"{where}: {name} must be >= 0, got negative values")


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def few(names: Collection[str]) -> str:
    return f"[{', '.join(_short(name) for name in list(names)[:3])}]"
