"""What a kernel is handed: copies inside larger buffers of NaN, and whether it left them alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..conformance import difference
from ..layout import TokenLayout
from ..reference import MergePlan

ROOM = 64  # elements: keeps the alignment that a tensor of its own would have


class Given:
    """A tensor handed to a kernel.

    Floating-point tensors lie inside a larger buffer, with as much NaN before and after as they
    hold themselves, so that a read past an end shows in what is computed.
    """

    def __init__(self, name: str, x: Tensor, memory: str = "contiguous", leaf: bool = False):
        self.name = name
        self.values = x.detach()
        self.buffer, view = _place(self.values, memory)
        self.before = self.buffer.clone()
        self.view = view.detach()
        self.tensor = view.detach().requires_grad_(leaf)

    @classmethod
    def watching(cls, name: str, x: Tensor) -> Given:
        """A tensor watched where it is."""
        given = cls(name, x.clone())
        given.buffer = given.view = given.tensor = x
        return given

    def changed(self) -> str:
        """What the kernel wrote where it was to read."""
        found = difference(self.view, self.values)
        if found:
            return f"wrote into its argument {self.name}{found}"
        if not torch.equal(_bytes(self.buffer), _bytes(self.before)):
            return f"wrote outside of its argument {self.name}"
        return ""


def _place(x: Tensor, memory: str) -> tuple[Tensor, Tensor]:
    """A buffer with the values of ``x`` in it, and the part of it that they are."""
    if not x.is_floating_point() or not x.numel():
        buffer = x.clone()
        return buffer, buffer
    if memory == "every second" and x.dim():
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
        view = buffer[..., ::2]
    else:
        order = list(range(x.dim()))
        if memory == "last first":
            order = order[-1:] + order[:-1]
        room = -(-x.numel() // ROOM) * ROOM
        buffer = x.new_full((2 * room + x.numel(),), float("nan"))
        inner = buffer[room : room + x.numel()].view([x.shape[i] for i in order])
        view = inner.permute([order.index(i) for i in range(x.dim())])
    view.copy_(x)
    return buffer, view


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def to_device(value: Any, device: torch.device) -> Any:
    """An argument of its own on the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, TokenLayout):
        return TokenLayout.from_active_steps(value.active_steps.to(device).clone(), value.T)
    if isinstance(value, MergePlan):
        return MergePlan.of(value.target.to(device).clone())
    return value


def tensors_of(name: str, value: Any) -> list[tuple[str, Tensor]]:
    """The tensors that an argument which is none itself is made of."""
    parts: dict[type, tuple[str, ...]] = {
        TokenLayout: ("active_steps", "token", "offsets"), MergePlan: ("target", "merged")
    }  # fmt: skip
    return [(f"{name}.{part}", getattr(value, part)) for part in parts.get(type(value), ())]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that what a kernel forgets to write cannot pass unseen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
