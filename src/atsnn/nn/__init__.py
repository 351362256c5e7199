"""Modules: neurons, attention, halting, merging, blocks and the model."""

from .blocks import MLP, SpikeDrivenSelfAttention, SpikformerBlock, SpikingSelfAttention
from .config import SpikformerConfig
from .halting import Halting
from .merging import TokenMerge
from .model import ATSpikformer, create_model
from .neurons import IF, LIF, PLIF
from .spike_linear import SpikeLinear
from .stem import SpikingPatchSplitting
from .trace import Trace

__all__ = [
    "IF",
    "LIF",
    "MLP",
    "PLIF",
    "ATSpikformer",
    "Halting",
    "SpikeDrivenSelfAttention",
    "SpikeLinear",
    "SpikformerBlock",
    "SpikformerConfig",
    "SpikingPatchSplitting",
    "SpikingSelfAttention",
    "TokenMerge",
    "Trace",
    "create_model",
]
