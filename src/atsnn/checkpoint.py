"""Checkpoints: ``config.json`` and ``model.safetensors`` in a folder. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .card import model_card
from .checks import AtsnnError, CheckpointError, InvalidType, InvalidValue
from .nn.config import SpikformerConfig
from .nn.model import ATSpikformer, batch_norms
from .schedule import directed

__all__ = [
    "PACKAGED",
    "from_pretrained",
    "load_trained",
    "read_config",
    "read_extra",
    "save_pretrained",
]

FORMAT, VERSION = "atsnn", 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FOLDER = Path(__file__).parent / "checkpoints"
PACKAGED = {
    "digits": _FOLDER / "digits",
    "digits-constant": _FOLDER / "digits-constant",
    "digits-dense": _FOLDER / "digits-dense",
    "fashion-mnist": _FOLDER / "fashion-mnist",
}


def save_pretrained(
    model: ATSpikformer, folder: str | Path, extra: dict[str, Any] | None = None
) -> Path:
    """Write ``model`` and a model card to ``folder``.

    ``extra`` is kept under ``"extra"`` in the configuration. A card that is there already is kept
    too: it may have been written by hand.
    """
    for norm in batch_norms(model):
        if norm.eps != model.config.bn_eps:
            raise InvalidValue(
                f"save_pretrained: every BatchNorm must have the configuration's "
                f"bn_eps = {model.config.bn_eps}, got one with eps = {norm.eps}"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "version": VERSION, "model": model.config.to_dict()}
    if extra is not None:
        config["extra"] = extra
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    # Written beside and moved into place: an interrupted save leaves the old checkpoint whole.
    weights = folder / f"{WEIGHTS}.tmp"
    # Not save_file: what it writes only its owner can read, whatever the umask.
    weights.write_bytes(save(tensors, {"format": "pt", "atsnn_version": str(VERSION)}))
    weights.replace(folder / WEIGHTS)
    text = folder / f"{CONFIG}.tmp"
    text.write_text(json.dumps(config, indent=2) + "\n")
    text.replace(folder / CONFIG)
    if not (folder / CARD).exists():
        write_card(model.config, extra, folder)
    return folder


def write_card(config: SpikformerConfig, extra: dict[str, Any] | None, folder: Path) -> None:
    """Write the model card of a checkpoint, over one that is there."""
    (folder / CARD).write_text(model_card(config, extra, str(folder)))


def _locate(name: str | Path, **hub: Any) -> Path:
    """The folder of a checkpoint: a packaged name, a folder, or a model id on the hub."""
    if not isinstance(name, str | Path):
        raise InvalidType(f"from_pretrained: expected a name or a path, got {type(name).__name__}")
    if isinstance(name, str) and name in PACKAGED:
        return PACKAGED[name]
    path = Path(name)
    if str(name) and path.is_dir():
        return path
    known = ", ".join(PACKAGED)
    if path.is_file():
        raise CheckpointError(
            f"from_pretrained: expected a folder with {CONFIG} and {WEIGHTS}, got the file {path}"
        )
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", ".."):
        raise CheckpointError(
            f"from_pretrained: expected a packaged name ({known}), a folder or a hub id "
            f"'owner/name', got {str(name)!r}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **hub))
    except TypeError as error:
        raise InvalidType(f"from_pretrained: {error}") from None
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointError(
            f"from_pretrained: {str(name)!r} is no folder and could not be fetched from the hub: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        ) from error


def read_config(name: str | Path, **hub: Any) -> dict[str, Any]:
    """The checked content of a checkpoint's ``config.json``."""
    path = _locate(name, **hub) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected a file {CONFIG}, got none") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, got {got!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected checkpoint version {VERSION}, got {config.get('version')!r}"
        )
    return config


def read_extra(name: str | Path, **hub: Any) -> dict[str, Any]:
    """What a checkpoint says of how it came about: data, epochs, command, rule and so on."""
    extra = read_config(name, **hub).get("extra")
    return extra if isinstance(extra, dict) else {}


def from_pretrained(name: str | Path, **hub: Any) -> ATSpikformer:
    """Load a model, in evaluation mode.

    Parameters
    ----------
    name : str or path
        A packaged checkpoint (``"digits"``), a folder written by ``save_pretrained``, or a model
        id ``"owner/name"`` on the Hugging Face hub.
    **hub
        For the hub, as ``huggingface_hub.snapshot_download`` takes it: ``revision``, ``token``,
        ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, of another version or not ours.
    """
    folder = _locate(name, **hub)
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        model = ATSpikformer(SpikformerConfig.from_dict(config.get("model")))  # type: ignore[arg-type]
    except AtsnnError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: expected a model that fits into memory, got: {error}"
        ) from error
    want = model.state_dict()
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected a file {WEIGHTS}, got none")
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            missing, foreign = sorted(set(want) - names), sorted(names - set(want))
            if missing or foreign:
                raise CheckpointError(
                    f"{path}: expected the {len(want)} tensors of its configuration, got "
                    f"{len(missing)} missing {missing[:3]} and {len(foreign)} foreign {foreign[:3]}"
                )
            tensors = {key: stored.get_tensor(key) for key in want}
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: expected a safetensors file, got: {error}") from error
    for key, tensor in tensors.items():
        if tensor.shape != want[key].shape:
            raise CheckpointError(
                f"{path}: {key} must have shape {tuple(want[key].shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} must be finite, got NaN or infinite values")
    model.load_state_dict(tensors)
    extra = config.get("extra")
    model.extra = extra if isinstance(extra, dict) else None
    return model.eval()


def load_trained(name: str | Path, **hub: Any) -> ATSpikformer:
    """Load a model as it was trained: one that a rule halted (``atsnn train --policy``) under it.

    Takes what :func:`from_pretrained` takes, which loads the weights alone.
    """
    folder = _locate(name, **hub)
    try:
        return directed(from_pretrained(folder), read_extra(folder).get("policy"))
    except (InvalidType, InvalidValue) as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error


def check_empty_or_ours(folder: Path, also: Collection[str] = ()) -> None:
    """Refuse to write a checkpoint over files that are not one; ``also`` names others of ours."""
    if folder.is_file():
        raise InvalidValue(f"expected a folder to write to, got the file {folder}")
    ours = any((folder / name).exists() for name in (CONFIG, *also))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise InvalidValue(
            f"expected an empty folder or one with an earlier checkpoint, got {folder} with "
            "other files"
        )
