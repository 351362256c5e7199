"""Other people's Spikformers in and out: the published repository's and SpikingJelly's.

Weights are copied, not computed, so what goes in comes out again bit for bit. The one exception
are biases that the other side has no place for: BatchNorm takes its mean off right behind them, so
they go into that mean.
"""

from .spikformer import from_spikformer, to_spikformer
from .spikingjelly import from_spikingjelly, to_spikingjelly

__all__ = ["from_spikformer", "from_spikingjelly", "to_spikformer", "to_spikingjelly"]
