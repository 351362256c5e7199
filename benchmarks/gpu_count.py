"""What kernels move and compute, counted while Triton's interpreter runs them.

    TRITON_INTERPRET=1 python benchmarks/gpu_count.py 'neuron, f32, packed' ...

prints as JSON, for each case: the bytes that the unmasked lanes of all loads and stores of all its
programs move, and the arithmetic, by type. A load that a program repeats with no store between is
one, as the compiler makes it. A comparison, a selection or integer work is no FLOP; an exponential
or a division is one; ``dot`` is that of products.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from typing import Any

import numpy as np
from gpu_cases import Case, cases
from triton.runtime import interpreter

IMAGES = 2  # that are run; every count is proportional to them, but for what blocks round up
FLOPS = {
    "fadd": 1, "fsub": 1, "fmul": 1, "fdiv": 1, "precise_divf": 1, "fma": 2, "exp": 1, "exp2": 1,
    "log": 1, "sqrt": 1, "precise_sqrt": 1, "rsqrt": 1, "fneg": 1,
}  # fmt: skip


class Counts(Counter[str]):
    """Bytes and FLOPs since they were last cleared."""

    def __init__(self) -> None:
        super().__init__()
        self._loaded: set[int] = set()  # of a program, since its last store

    def watch(self) -> None:
        builder = interpreter.InterpreterBuilder
        self._before(builder, "create_masked_load", self._load)
        self._before(builder, "create_masked_store", self._store)
        self._before(builder, "set_grid_idx", lambda *program: self._loaded.clear())
        for name, flops in FLOPS.items():
            self._before(builder, f"create_{name}", functools.partial(self._elements, flops))
        self._before(builder, "create_dot", self._product)
        self._before(interpreter.ReduceOps, "apply_impl", self._reduction)

    def _before(self, owner: Any, name: str, count: Any) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            count(*args)
            return method(this, *args, **kwargs)

        setattr(owner, name, call)

    def _load(self, pointers: Any, mask: Any, *args: Any) -> None:
        lanes = np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))
        same = hash((np.asarray(pointers.data).tobytes(), lanes.tobytes()))
        if same not in self._loaded:
            self._loaded.add(same)
            self._bytes(pointers, lanes)

    def _store(self, pointers: Any, value: Any, mask: Any, *args: Any) -> None:
        self._loaded.clear()
        self._bytes(pointers, np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data)))

    def _bytes(self, pointers: Any, lanes: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self["bytes"] += int(lanes.sum()) * size

    def _elements(self, flops: int, *args: Any) -> None:
        self._flops(args[0].dtype, flops * max(np.size(x.data) for x in args))

    def _product(self, a: Any, b: Any, *args: Any) -> None:
        self["dot"] += 2 * int(np.size(a.data)) * int(np.shape(b.data)[-1])

    def _reduction(self, given: Any) -> None:
        for x in given if isinstance(given, tuple) else (given,):
            self._flops(x.dtype.scalar, int(np.size(x.handle.data)))

    def _flops(self, dtype: Any, number: int) -> None:
        if dtype.is_floating():
            self["f64" if dtype.primitive_bitwidth == 64 else "f32"] += number


def count(case: Case, counts: Counts) -> dict[str, int]:
    _, call = case.with_sizes(B=IMAGES).call("cpu")
    counts.clear()
    call()
    images = case.shape.B // IMAGES
    return {kind: images * number for kind, number in counts.items()}


def main() -> None:
    counts = Counts()
    counts.watch()
    found = {case.key: count(case, counts) for case in cases([""]) if case.key in sys.argv[1:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
