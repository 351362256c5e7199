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
from .neuron import neuron, neuron_backward, neuron_spikes
from .spike_driven import spike_driven_attention, spike_driven_attention_backward

__all__ = [
    "neuron",
    "neuron_backward",
    "neuron_spikes",
    "spike_driven_attention",
    "spike_driven_attention_backward",
    "spiking_attention",
    "spiking_attention_backward",
]
