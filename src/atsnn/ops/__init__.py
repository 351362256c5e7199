"""Operators: ``torch.library`` schemas, fake kernels, autograd, and the choice of backend."""

from . import layout
from .attention import spike_driven_attention, spiking_attention
from .backends import (
    BACKENDS,
    available_backends,
    kernels_serve,
    native_level,
    native_serves,
    resolve_backend,
    serving_backend,
    use_backend,
)
from .halting import halt, halting_scores, readout
from .linear import pack_linear, pack_spikes, spike_linear_lif, unpack_spikes
from .merging import firing_counts, match_tokens, merge_tokens, take_rows, unmerge_tokens
from .neuron import neuron

__all__ = [
    "BACKENDS",
    "available_backends",
    "firing_counts",
    "halt",
    "halting_scores",
    "kernels_serve",
    "layout",
    "match_tokens",
    "merge_tokens",
    "native_level",
    "native_serves",
    "neuron",
    "pack_linear",
    "pack_spikes",
    "readout",
    "resolve_backend",
    "serving_backend",
    "spike_driven_attention",
    "spike_linear_lif",
    "spiking_attention",
    "take_rows",
    "unmerge_tokens",
    "unpack_spikes",
    "use_backend",
]
