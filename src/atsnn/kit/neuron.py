"""Cases of the neuron, each named by the mistake that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cases import Arguments, Numbers
from ..layout import TokenLayout
from .case import Case, named

SHAPE = (6, 2, 3, 8)
UNREACHED = 1e6  # a threshold at which nothing fires
TAU = 3.7  # no power of two: only then does a product with the reciprocal round otherwise

case = named("neuron")


def currents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Random currents, about a third of which fire."""
    return Numbers(seed).normal(shape or SHAPE).to(dtype)


def steps(low: int, high: int, *shape: int, bits: int = 2) -> Tensor:
    """Currents that are multiples of ``2^-bits``, on which every operation is exact."""
    return Numbers(2).integers(low, high, shape or SHAPE, bits).float()


def x(*shape: int, **options: Any) -> Callable[[], Arguments]:
    return lambda: {"x": currents(*shape, **options)}


def x_and_v(*shape: int) -> Callable[[], Arguments]:
    return lambda: {"x": currents(*shape), "v": currents(*(shape or SHAPE)[1:], seed=3)}


def learned(*shape: int) -> Callable[[], Arguments]:
    """A PLIF whose ``inv_tau`` has all its bits."""
    return lambda: {"x": currents(*shape), "inv_tau": torch.tensor(0.27), "kind": "plif"}


def rows(active: list[list[int]], T: int, state: bool = False) -> Callable[[], Arguments]:
    """Rows of a layout, 8 channels."""

    def make() -> Arguments:
        layout = TokenLayout.from_active_steps(torch.tensor(active), T)
        out: Arguments = {"x": currents(layout.num_rows, 8), "layout": layout, "tau": TAU}
        return out | ({"v": currents(layout.B, layout.N, 8, seed=3)} if state else {})

    return make


def cases(op: str) -> Iterator[Case]:
    """The cases of the neuron; none for another operation."""
    if op == "neuron":
        for part in (_arithmetic, _firing, _state, _ragged, _memory, _sizes, _gradients, _random):
            yield from part()


def _arithmetic() -> Iterator[Case]:
    # Many elements, each of which may round otherwise, and nothing fires that would hide it.
    far = {"v_threshold": UNREACHED}
    yield case("a division by tau, no product with 1/tau", x(1, 512), tau=TAU, **far)
    yield case("no fused multiply-add", x(8, 256), tau=TAU, **far)
    yield case(
        "no fused multiply-add, input not decayed", x(8, 256), tau=TAU, decay_input=False, **far
    )
    yield case("no fused multiply-add, inv_tau learned", learned(8, 256), **far)
    yield case(
        "no fused multiply-add, inv_tau learned, input not decayed", learned(8, 256),
        decay_input=False, **far,
    )  # fmt: skip
    yield case("the input is decayed", x(), decay_input=True)
    yield case("the input is not decayed", x(), decay_input=False)
    yield case("kind if does not leak", x(), kind="if")
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield case(f"{name} in memory, float32 in arithmetic", x(dtype=dtype), tau=TAU)
    yield case("float64 throughout", x(dtype=torch.float64), tau=TAU)


def _firing() -> Iterator[Case]:
    # From rest with tau = 2 a current of 2 reaches 1 exactly.
    yield case("fires at the threshold exactly", lambda: {"x": steps(7, 9)})
    yield case("fires at the threshold exactly, kind if", lambda: {"x": steps(3, 5)}, kind="if")
    yield case("fires before it resets", lambda: {"x": steps(8, 24)})
    yield case("a hard reset, to v_reset = 0", lambda: {"x": steps(4, 24)})
    yield case("a hard reset, to v_reset = -0.25", lambda: {"x": steps(4, 24)}, v_reset=-0.25)
    yield case("a soft reset, by v_threshold", lambda: {"x": steps(4, 24)}, v_reset=None)
    yield case(
        "a soft reset, by v_threshold = 0.75", lambda: {"x": steps(4, 24)}, v_reset=None,
        v_threshold=0.75,
    )  # fmt: skip
    yield case("a threshold below rest", x(), v_threshold=-0.25, v_reset=-0.7)


def _state() -> Iterator[Case]:
    yield case("starts from the membrane given", x_and_v())
    yield case("starts from v_reset where none is given", x(), v_reset=-0.25)
    yield case("leaks to v_reset", x_and_v(), v_reset=-0.25, tau=TAU, v_threshold=UNREACHED)
    yield case("returns the membrane after the last timestep", x(), tau=TAU)
    yield case("returns the membrane after the reset", lambda: {"x": steps(8, 24, 1, 16)})


def _ragged() -> Iterator[Case]:
    # Image 0 has fewer tokens at each timestep than image 1, whose rows follow.
    yield case(
        "ragged: no read past the end of a run, where the next begins",
        rows([[3, 1, 0, 0], [3, 3, 2, 2]], 3),
    )  # fmt: skip
    # One image: past its last run there is nothing of the tensor, but NaN.
    yield case("ragged: no read past the last row", rows([[2, 1, 1]], 2))
    yield case("ragged: a halted token keeps its membrane", rows([[4, 1, 2]], 4))
    yield case("ragged: membranes are in token order", rows([[1, 3, 2], [2, 1, 3]], 3))
    yield case("ragged: a token that never runs keeps the membrane given",
               rows([[0, 2, 0]], 2, state=True))  # fmt: skip
    yield case("ragged: no token runs", rows([[0, 0, 0]], 2, state=True))
    yield case("ragged: gradients of x and v", rows([[3, 1, 0, 2], [2, 3, 2, 1]], 3, state=True),
               leaves="x v")  # fmt: skip


def _memory() -> Iterator[Case]:
    for memory in ("every second", "last first"):
        label = {
            "every second": "strided: every second element of memory",
            "last first": "strided: the last dimension outermost in memory",
        }[memory]
        yield case(label, x_and_v(), memory=memory)
        yield case(f"{label}, gradients", x_and_v(), "x v", memory)


def _sizes() -> Iterator[Case]:
    yield case("one timestep, one element", x(1, 1))
    yield case("x of one dimension", x(5))
    yield case("x of five dimensions", x(3, 2, 2, 3, 5))
    yield case("1025 elements", x(3, 1025))
    yield case("40 timesteps", x(40, 3), tau=TAU)
    yield case("no element", x(4, 0))
    yield case("no timestep", x(0, 3))


def _gradients() -> Iterator[Case]:
    for name in reference.SURROGATES:
        label = f"gradient of the surrogate {name}"
        yield case(label, x(3, 64), "x", surrogate=name)
        yield case(f"{label}, alpha = 1.5", x(3, 64), "x", surrogate=name, alpha=1.5,
                   detach_reset=True)  # fmt: skip
    for reset, v_reset in (("hard", 0.0), ("soft", None)):
        for detach in (True, False):
            way = "detached from" if detach else "through"
            yield case(f"gradient {way} a {reset} reset", x(), "x", v_reset=v_reset,
                       detach_reset=detach)  # fmt: skip
    yield case("gradient of the membrane given", x_and_v(), "x v")
    yield case("gradient of inv_tau", learned(), "x inv_tau")
    yield case("gradient, input not decayed", x(), "x", decay_input=False, tau=TAU)
    yield case("gradient in float64", x(dtype=torch.float64), "x", tau=TAU)


def _random() -> Iterator[Case]:
    for seed in range(8):
        yield case(f"random settings {seed + 1}", partial(random_settings, seed))
    for seed in range(8, 12):
        leaves = "x v"
        yield case(f"random settings {seed + 1}, gradient", partial(random_settings, seed), leaves)


def random_settings(seed: int) -> Arguments:
    """Settings of every kind beside random currents."""
    numbers = Numbers(100 + seed)

    def one_of(*values: Any) -> Any:
        return values[numbers.rng.integers(len(values))]

    shape = (one_of(1, 2, 5, 9), one_of(1, 3), one_of(1, 7, 16, 65))
    settings = {
        "x": numbers.normal(shape).float(), "v": numbers.normal(shape[1:]).float(),
        "kind": one_of("lif", "lif", "if"), "tau": one_of(1.0625, 1.5, 2.0, 3.7, 100.0),
        "v_threshold": one_of(0.5, 1.0, 1.3), "v_reset": one_of(0.0, None, 0.3, -0.7),
        "decay_input": one_of(True, False), "detach_reset": one_of(True, False),
        "surrogate": one_of(*reference.SURROGATES),
    }  # fmt: skip
    return settings | ({"tau": 2.0} if settings["kind"] == "if" else {})
