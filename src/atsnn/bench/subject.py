"""What is measured: a trained model on real images, or any configuration, made to fire."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ..checkpoint import from_pretrained, load_trained
from ..checks import InvalidValue, check_number
from ..data import Split, load, patterns
from ..firing import set_firing_rates
from ..nn.config import MODELS, SpikformerConfig
from ..nn.halting import Halting
from ..nn.model import ATSpikformer, token_merges

__all__ = [
    "RATES",
    "Subject",
    "of_checkpoint",
    "of_config",
    "read_config",
    "resized",
    "with_changes",
]

NEVER = -60.0  # a halting score of sigmoid(this) halts nothing
RATES = (0.05, 0.15)  # of spikes, and of what goes into blocks
FIRING_IMAGES = 4  # images on which firing rates are set


@dataclass
class Subject:
    """A model, and the images it is measured on.

    Attributes
    ----------
    title : str
        What a reader is told it is.
    model : ATSpikformer
        In evaluation mode.
    images : callable
        The first so many images, ``[B, C, H, W]``.
    split : Split, optional
        All of them with their labels, where they are real.
    controls : dict of str to ATSpikformer
        Models whose accuracy stands beside.
    rates : tuple of float, optional
        Firing rates that were set: of spikes, and of what goes into blocks.
    """

    title: str
    model: ATSpikformer
    images: Callable[[int], Tensor]
    split: Split | None = None
    controls: dict[str, ATSpikformer] = field(default_factory=dict)
    rates: tuple[float, float] | None = None

    @property
    def trained(self) -> bool:
        return self.split is not None


def of_checkpoint(
    name: str, data: str, folder: str | None = None, limit: int | None = None
) -> Subject:
    """A checkpoint and the test images it is asked to run on."""
    model = load_trained(name)
    split = load(data, model.config.image_size, folder)["test"]
    channels = split.pixels.shape[1]
    if channels != model.config.in_channels:
        raise InvalidValue(
            f"bench: {name} expects images with {model.config.in_channels} channels, got {data} "
            f"with {channels}"
        )
    if limit is not None:
        split = split[:limit]

    def images(count: int) -> Tensor:
        if count > len(split):
            raise InvalidValue(
                f"bench: batch must be a number >= 1 and <= {len(split)}, got {count}"
            )
        return split[:count].images

    controls = {}
    if (name, data) == ("digits", "digits"):
        controls = {
            "trained without halting": from_pretrained("digits-dense"),
            "constant score (control)": from_pretrained("digits-constant"),
        }
    return Subject(f"checkpoint {name}, data {data}", model, images, split, controls)


def read_config(name: str | Path, changes: Mapping[str, Any]) -> SpikformerConfig:
    """A named model or a JSON file of a configuration's values, with some of them changed.

    The file may be a checkpoint's ``config.json`` too.
    """
    if str(name) in MODELS:
        return MODELS[str(name)].replace(**changes)
    path = Path(name)
    if not path.is_file():
        raise InvalidValue(
            f"bench: --config must be one of {', '.join(MODELS)} or a JSON file, got {name}"
        )
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise InvalidValue(f"bench: --config: expected JSON in {path}, got {error}") from error
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    return SpikformerConfig.from_dict(values).replace(**changes)


def of_config(
    name: str, config: SpikformerConfig, rates: tuple[float, float] = RATES, seed: int = 0
) -> Subject:
    """An untrained model whose layers fire at given rates (:func:`atsnn.firing.set_firing_rates`).

    It is given a halting rule if it has none, so that there is something to switch on.
    """
    if config.halting is None:
        config = config.replace(halting="rectangle")
    for what, rate in zip(("spikes", "block inputs"), rates, strict=True):
        check_number("bench", f"--rates ({what})", rate, above=0, below=1)
    torch.manual_seed(seed)
    model = ATSpikformer(config).eval()

    def images(count: int) -> Tensor:
        return patterns(count, config.in_channels, config.image_size, seed)

    set_firing_rates(model, images(FIRING_IMAGES), *rates)
    title = f"{name}, untrained, spikes {100 * rates[0]:g} %, block inputs {100 * rates[1]:g} %"
    return Subject(title, model, images, rates=rates)


def with_changes(model: ATSpikformer, **changes: Any) -> ATSpikformer:
    """``model`` in another configuration that its weights fit: other merging, or halting where it
    did not halt, by scores at which nothing halts. Weights are shared."""
    twin = copy.copy(model)
    # A shallow copy shares the parameters; what is exchanged must not be exchanged there too.
    twin._modules = dict(model._modules)
    c = twin.config = model.config.replace(**changes)
    twin.merge = token_merges(c)
    if c.halting is not None and model.halting is None:
        twin.halting = Halting(c.embed_dim, c.score, c.eps, c.halting, beta=NEVER)
    return twin.eval()


def resized(subject: Subject, image_size: int) -> Subject:
    """The same model on larger or smaller images, and so on more or fewer tokens."""
    model = copy.deepcopy(subject.model)
    model.config = model.config.replace(image_size=image_size)
    given = subject.images

    def images(count: int) -> Tensor:
        size = (image_size, image_size)
        return nnf.interpolate(given(count), size, mode="bilinear", antialias=True).clamp(0, 1)

    if subject.rates is not None:
        set_firing_rates(model, images(FIRING_IMAGES), *subject.rates)
    return replace(subject, model=model, images=images, split=None)
