"""The moving average of the weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import TrainConfig

__all__ = ["moving_average"]


def moving_average(model: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The exponential moving average of the weights, if one is asked for.

    Its BatchNorm statistics have to be measured
    (:func:`~atsnn.train.statistics.measure_statistics`): what layers put out with averaged weights
    is not the average of what they put out, and spikes are sensitive to it. So are the scores'
    thresholds, which is why the budget is met by :func:`~atsnn.train.calibrate`.
    """
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
