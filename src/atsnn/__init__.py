"""Fused kernels for spiking vision transformers whose tokens halt early and merge."""

from . import compare, convert, counting, export, firing, functional, nir, nn, schedule, testing
from .checkpoint import from_pretrained
from .checks import AtsnnError
from .cost import cost
from .dropin import accelerate
from .engine import Engine, EngineState, freeze
from .layout import TokenLayout
from .nn.config import SpikformerConfig
from .nn.model import ATSpikformer, create_model
from .ops import available_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "ATSpikformer",
    "AtsnnError",
    "Engine",
    "EngineState",
    "SpikformerConfig",
    "TokenLayout",
    "accelerate",
    "available_backends",
    "compare",
    "convert",
    "cost",
    "counting",
    "create_model",
    "export",
    "firing",
    "freeze",
    "from_pretrained",
    "functional",
    "nir",
    "nn",
    "schedule",
    "testing",
    "use_backend",
]
