"""Operations on tensors, differentiable, checked: dense ``[T, B, N, C]`` or packed ``[R, C]``.

With a ``layout`` tensors hold the rows of its active cells alone.

Formulas live in :mod:`atsnn.reference`; this module checks arguments and chooses the backend.
"""

from ..reference import HaltingState, MergePlan
from .attention import spike_driven_attention, spiking_attention
from .halting import accumulate, halt, halting_scores, ponder_loss, readout
from .linear import PackedLinear, pack_linear, pack_spikes, spike_linear_lif, unpack_spikes
from .merging import firing_counts, match_tokens, merge_tokens, take_rows, unmerge_tokens
from .neuron import KINDS, neuron

__all__ = [
    "KINDS",
    "HaltingState",
    "MergePlan",
    "PackedLinear",
    "accumulate",
    "firing_counts",
    "halt",
    "halting_scores",
    "match_tokens",
    "merge_tokens",
    "neuron",
    "pack_linear",
    "pack_spikes",
    "ponder_loss",
    "readout",
    "spike_driven_attention",
    "spike_linear_lif",
    "spiking_attention",
    "take_rows",
    "unmerge_tokens",
    "unpack_spikes",
]
