"""Triton's interpreter as a judge: it also sees every address that a kernel reads or writes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from triton.runtime import interpreter

import atsnn

# It takes milliseconds a program: few examples, small ones.
FEW = settings(
    max_examples=settings.default.max_examples // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RUNS = atsnn.available_backends()["triton"] is True


_prepared = set()


def call_inside(function, *args, **kwargs):
    """A call of one jitted function by another.

    The interpreter prepares the language for each; the launch did so for our own, and once is
    enough for Triton's. That is twice as fast.
    """
    module = function.fn.__module__
    if not module.startswith("atsnn.") and module not in _prepared:
        _prepared.add(module)
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


class Guard:
    """Every address must lie in one of the tensors that the launch was given."""

    def __init__(self) -> None:
        self.ranges = np.zeros((0, 2), np.int64)
        self.accesses = 0
        self.launches: list[str] = []

    def launch(self, tensors: list[Tensor]) -> None:
        spans = [
            (x.data_ptr(), x.data_ptr() + x.element_size() * (1 + _reach(x)))
            for x in tensors
            if x.numel()
        ]
        self.ranges = np.array(sorted(spans), np.int64).reshape(-1, 2)

    def check(self, pointers, mask, what: str) -> None:
        addresses = np.asarray(pointers.data).astype(np.int64).reshape(-1)
        if mask is not None:
            chosen = np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))
            addresses = addresses[chosen.reshape(-1)]
        self.accesses += len(addresses)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(len(addresses), bool)
        for begin, end in self.ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            raise AssertionError(f"{what} out of bounds: {int((~inside).sum())} of {len(inside)}")


def _reach(x: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@pytest.fixture
def guard(monkeypatch):
    """Watch all launches of a test; kernels are quicker, too."""
    watch = Guard()
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call_inside)
    prepare = interpreter.GridExecutor._init_args_hst

    def prepared(self, args, kwargs):
        watch.launch([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        watch.launches.append(self.fn.__name__)
        return prepare(self, args, kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", prepared)

    def watched(name, masked, what):
        method = getattr(interpreter.InterpreterBuilder, name)

        @functools.wraps(method)
        def call(self, pointers, *args, **kwargs):
            watch.check(pointers, args[masked] if masked is not None else None, what)
            return method(self, pointers, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, call)

    # Loads and stores without a mask are made of these, with one that is all true.
    watched("create_masked_load", 0, "a read")
    watched("create_masked_store", 1, "a write")
    return watch
