"""When an event-driven kernel may stand in for modules: asked at every call.

It computes the same numbers but for the rounding of sums, and nothing that could be watched on the
way. So whatever watches, or needs more than numbers, gets the modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops import native_serves


def events_serve(x: object) -> bool:
    """Whether ``x`` is a tensor, and the call one, that event-driven kernels can be given."""
    if torch.compiler.is_compiling():
        return False
    return (
        type(x) is Tensor
        and x.dtype == torch.float32
        and native_serves(x.device)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and not _has_any_global_hook()
    )


def unwatched(module: nn.Module) -> bool:
    """Whether nothing but the module's class says what a call of it does."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def at_rest(modules: Iterable[nn.Module]) -> bool:
    """Whether modules are in evaluation mode, unwatched, and need no gradient."""
    wants = torch.is_grad_enabled()
    return all(
        not m.training
        and unwatched(m)
        and not (wants and any(p.requires_grad for p in m._parameters.values() if p is not None))
        for m in modules
    )
