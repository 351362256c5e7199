"""A model as a program of ``torch.export``: a graph of operators without its Python."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .checks import InvalidType, InvalidValue
from .nn.model import ATSpikformer, check_images

__all__ = ["export_model"]


def export_model(model: ATSpikformer, example: Tensor) -> ExportedProgram:
    """Export ``model`` from images to logits, for any number of images.

    The program computes what ``model.execution = "masked"`` computes, by the same operators, so its
    logits are the model's bit for bit. It can be saved with ``torch.export.save``; whoever loads it
    imports ``atsnn`` before, which registers the operators. They are those of the backend that
    serves the model here (``atsnn.use_backend``, the device).

    How many cells are active is a number that the program finds as it runs: accumulators and
    readout weights have as many rows. The packed form, where all of the network has, is not
    exported.

    Parameters
    ----------
    model : ATSpikformer
        In evaluation mode; it is not changed, whatever its ``execution``.
    example : Tensor
        ``[B, C, H, W]`` still images or ``[T, B, C, H, W]``, in the dtype and on the device of the
        parameters; its values are not used. All but ``B`` is fixed in the program.

    Returns
    -------
    torch.export.ExportedProgram
        Its ``module()`` takes any number of images shaped as ``example`` and returns
        ``[B, num_classes]`` logits. It checks shapes, but not that images are finite.

    Raises
    ------
    InvalidType
        If ``model`` is no :class:`~atsnn.ATSpikformer` or ``example`` no tensor of its dtype.
    InvalidValue
        If the model is in training mode, ``example`` has another shape, or partners for merging are
        random: they are drawn by a generator anew at each call, and a graph holds none.
    """
    op = "export_model"
    if not isinstance(model, ATSpikformer):
        raise InvalidType(f"{op}: model must be an ATSpikformer, got {type(model).__name__}")
    if model.training:
        raise InvalidValue(
            f"{op}: model must be in evaluation mode, as BatchNorm learns in training, "
            "got one in training mode"
        )
    if model.config.merging and model.config.merge_match == "random":
        raise InvalidValue(
            f"{op}: expected merge_match='similar', as random partners are drawn anew at each "
            "call, got merge_match='random'"
        )
    check_images(op, model.config, example)
    weight = model.head.weight
    if example.dtype != weight.dtype:
        raise InvalidType(
            f"{op}: example must have the dtype of the parameters, {weight.dtype}, "
            f"got {example.dtype}"
        )
    masked = copy.copy(model)  # which shares the parameters
    masked.execution = "masked"
    batch = example.dim() - 4
    shape = list(example.shape)
    # A dimension of size 0 or 1 would be taken for a constant.
    shape[batch] = max(shape[batch], 2)
    images = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    dynamic = {batch: torch.export.Dim("batch", min=0)}
    with torch.no_grad():
        return torch.export.export(masked, (images,), dynamic_shapes=(dynamic,), strict=False)
