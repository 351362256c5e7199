"""Triton kernels of atsnn, imported as ``atsnn.kernels``.

Each launcher has the name and the arguments of the operator it computes; see
:mod:`atsnn.ops.library`.
"""

if __name__ != "atsnn.kernels":
    raise ImportError(
        f"this package must be imported as 'atsnn.kernels', got {__name__!r}: install atsnn "
        "(pip install -e . --no-build-isolation) instead of putting its root on sys.path"
    )

from .attention import spiking_attention, spiking_attention_backward
from .halting import halt, halt_backward
from .layout import layout_cells, moved_rows, token_layout
from .linear import pack_spikes, spike_linear_lif, unpack_spikes
from .matching import firing_counts, match_tokens
from .merging import (
    merge_tokens,
    merge_tokens_backward,
    unmerge_tokens,
    unmerge_tokens_backward,
)
from .neuron import neuron, neuron_backward, neuron_spikes
from .readout import readout, readout_backward
from .scores import halting_scores, halting_scores_backward
from .spike_driven import spike_driven_attention, spike_driven_attention_backward
from .taking import take_rows, take_rows_backward

__all__ = [
    "firing_counts",
    "halt",
    "halt_backward",
    "halting_scores",
    "halting_scores_backward",
    "layout_cells",
    "match_tokens",
    "merge_tokens",
    "merge_tokens_backward",
    "moved_rows",
    "neuron",
    "neuron_backward",
    "neuron_spikes",
    "pack_spikes",
    "readout",
    "readout_backward",
    "spike_driven_attention",
    "spike_driven_attention_backward",
    "spike_linear_lif",
    "spiking_attention",
    "spiking_attention_backward",
    "take_rows",
    "take_rows_backward",
    "token_layout",
    "unmerge_tokens",
    "unmerge_tokens_backward",
    "unpack_spikes",
]
