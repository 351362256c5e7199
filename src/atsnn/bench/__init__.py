"""``atsnn bench``: what halting saves, counted and measured; how cost grows; what halting costs."""

from .gate import GateFailed, check_gate
from .growth import AXES, measure_growth
from .halting import BACKENDS
from .overheads import measure_overheads
from .run import bench
from .subject import of_checkpoint, of_config, read_config

__all__ = [
    "AXES",
    "BACKENDS",
    "GateFailed",
    "bench",
    "check_gate",
    "measure_growth",
    "measure_overheads",
    "of_checkpoint",
    "of_config",
    "read_config",
]
