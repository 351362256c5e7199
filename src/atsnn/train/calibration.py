"""The share of cells, after training, by the one number that shifts all scores."""

from __future__ import annotations

import torch

from ..checks import InvalidValue, check_number
from ..data import Split
from ..nn.model import ATSpikformer
from ..schedule import rule_of
from .evaluation import evaluate

__all__ = ["CALIBRATION", "calibrate"]

CALIBRATION = 2048  # training images that are enough to count a share of cells on

# Of beta: a score of 6e-6, which halts nothing, and one of 1, which halts everything after the
# first block unless the features take a lot off it.
LOWEST, HIGHEST = -12.0, 20.0
HALVINGS = 13


@torch.no_grad()
def calibrate(model: ATSpikformer, split: Split, target: float) -> float:
    """Set ``beta`` of the halting so that at most a share of the cells is executed.

    Higher scores halt earlier, so the share falls as ``beta`` rises (as a whole: what halts changes
    what other tokens attend to); bisection finds where, on a fixed grid, it comes to ``target``.
    Weights stay as they are: this is for small corrections, and accuracy is to be looked at again.

    Parameters
    ----------
    model : ATSpikformer
        Which learned to halt.
    split : Split
        Images to count on; not those of the test.
    target : float
        Share of the ``L * T * N`` cells of an image.

    Returns
    -------
    float
        The share executed now. Where no ``beta`` of the grid reaches the target, ``beta`` stays.

    Raises
    ------
    InvalidValue
        If the model does not halt by scores, ``split`` is empty or ``target`` outside ``(0, 1]``.
    """
    check_number("calibrate", "target", target, above=0, at_most=1)
    if model.halting is None:
        raise InvalidValue("calibrate: expected a model that halts, got halting=None")
    if rule_of(model) is not None:
        raise InvalidValue("calibrate: expected a model that halts by its scores, got a policy")
    before = evaluate(model, split).cells
    beta = model.halting.beta
    kept = beta.clone()

    def share(value: float) -> float:
        beta.fill_(value)
        return evaluate(model, split).cells

    low, high = LOWEST, HIGHEST
    reached = share(high)
    if reached > target:
        beta.copy_(kept)
        return before
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = share(middle)
        if found > target:
            low = middle
        else:
            high, reached = middle, found
    beta.fill_(high)
    return reached
