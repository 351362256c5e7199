"""Cases of the operations on tokens: attention, merging, halting, readout, linear maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..cases import Arguments, Numbers, cells, masked
from ..layout import TokenLayout
from ..reference import MergePlan
from .case import Case, named

RAGGED = [[3, 1, 0, 0], [3, 3, 2, 1]]


def cases(op: str) -> Iterator[Case]:
    """The named cases of one operation; some have none."""
    parts: dict[str, Callable[[], Iterator[Case]]] = {
        "spiking_attention": _spiking_attention, "spike_driven_attention": _spike_driven,
        "match_tokens": _match, "merge_tokens": _merge, "unmerge_tokens": _unmerge,
        "halt": _halt, "halting_scores": _scores, "readout": _readout,
        "firing_counts": _counts, "spike_linear_lif": _linear, "pack_spikes": _pack,
        "unpack_spikes": _unpack,
    }  # fmt: skip
    if op in parts:
        yield from parts[op]()


def layout_of(active: list[list[int]]) -> TokenLayout:
    return TokenLayout.from_active_steps(torch.tensor(active), max(map(max, active)))


# -- attention ------------------------------------------------------------------------------------


def qkv(
    *shape: int, heads: int = 2, dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int] | None = None, active: list[list[int]] | None = None,
) -> Callable[[], Arguments]:  # fmt: skip
    """Spikes ``[T, B, N, C]``, or rows of the active cells, and sizes from a range."""

    def make() -> Arguments:
        numbers = Numbers(4)
        layout = None if active is None else layout_of(active)
        whole = (shape or (2, 2, 5, 8)) if layout is None else cells(layout, 8)
        out: Arguments = {name: numbers.spikes(whole).to(dtype) for name in "qkv"}
        if layout is not None:
            out = {name: layout.pack(masked(layout, x)) for name, x in out.items()}
            out["layout"] = layout
        if sizes is not None:
            out["sizes"] = numbers.integers(*sizes, whole[1:3]).float()
        return out | {"num_heads": heads}

    return make


def _both_attentions(case: Callable[..., Case]) -> Iterator[Case]:
    # Where whole runs are taken to be N long, these read the rows of other images.
    yield case("ragged: halted tokens left out", qkv(active=RAGGED))
    yield case("ragged: halted tokens left out, sized", qkv(active=RAGGED, sizes=(2, 5)))
    yield case("images and timesteps apart", qkv(3, 3, 2, 4))
    yield case("300 tokens", qkv(1, 1, 300, 8))
    yield case("no token", qkv(2, 1, 0, 8))
    yield case("strided: every second element of memory", qkv(), memory="every second")
    yield case("strided: the last dimension outermost in memory", qkv(), memory="last first")
    yield case("gradient of q, k and v", qkv(), "q k v")
    yield case("gradient, sized", qkv(sizes=(2, 5)), "q k v")
    yield case("gradient, ragged", qkv(active=RAGGED), "q k v")


def _spiking_attention() -> Iterator[Case]:
    case = named("spiking_attention")
    yield case("sums, no softmax", qkv(heads=1), scale=1.0)
    yield case("the result is scaled, 0.125", qkv())
    yield case("the result is scaled, 0.25", qkv(), scale=0.25)
    yield case("sizes weigh the tokens", qkv(sizes=(2, 5)))
    yield case("heads apart", qkv(2, 1, 5, 12, heads=4))
    yield case("heads of one channel", qkv(heads=8))
    # Sums of odd numbers above 2048, which float16 cannot hold.
    yield case("float16 in memory, float32 in sums", qkv(dtype=torch.float16, sizes=(2049, 2055)))
    yield from _both_attentions(case)


def _spike_driven() -> Iterator[Case]:
    case = named("spike_driven_attention")
    # A sum of one reaches the threshold of 0.5 exactly.
    yield case("fires at the threshold exactly", qkv(3, 2, 3, 8))
    yield case("the threshold is v_threshold", qkv(3, 2, 5, 8), v_threshold=1.5)
    # Too high for what fires to fire without the sizes.
    yield case("sizes weigh the tokens", qkv(3, 2, 5, 8, sizes=(2, 5)), v_threshold=3.0)
    yield case("divided by tau", qkv(3, 2, 5, 8), tau=3.7)
    yield case("returns the potential", qkv(3, 2, 5, 8), tau=3.7, return_state=True)

    def from_state() -> Arguments:
        state = Numbers(5).normal((2, 1, 8)).float()
        return qkv(3, 2, 5, 8)() | {"state": state, "return_state": True}

    yield case("starts from the potential given", from_state)
    yield case("gradient of the potential given", from_state, "q k v state")
    yield from _both_attentions(case)


# -- merging --------------------------------------------------------------------------------------


def _match() -> Iterator[Case]:
    case = named("match_tokens")

    def counts(values: Any) -> Callable[[], Arguments]:
        return lambda: {"counts": torch.tensor(values, dtype=torch.float32)}

    same = counts([[[1.0, 2.0]] * 8] * 2)
    longer = counts([[[1, 0], [9, 9], [0, 1], [3, 0]]])
    yield case("ties go to the lower index", same, r=2)
    yield case("ties go to the lower index, all pairs", same, r=8)
    yield case("a cosine, no product of counts", longer, r=1)
    yield case("at most r pairs", lambda: {"counts": Numbers(6).integers(0, 3, (2, 9, 5)).float()},
               r=2)  # fmt: skip
    yield case("pairs above the threshold", counts([[[1, 0], [2, 0], [1, 1], [1, 2]]]),
               threshold=0.97)  # fmt: skip
    yield case("no pair at the threshold itself", counts([[[1, 0], [2, 0]]]), threshold=1.0)
    yield case("a silent token is like none that fires",
               counts([[[0, 0], [1, 2], [3, 1], [0, 0]]]), threshold=0.0)  # fmt: skip
    yield case("silent tokens are alike", counts([[[1, 1], [2, 1], [0, 0], [0, 0]]]), r=1)

    def lives(steps: list[int]) -> Callable[[], Arguments]:
        return lambda: same() | {"active_steps": torch.tensor([steps] * 2)}

    yield case("equal lifetimes only", lives([2, 1, 2, 1, 3, 3, 1, 2]), r=8)
    yield case("tokens that never run stay out", lives([0, 0, 1, 0, 1, 0, 0, 0]), r=8)


def _plan() -> MergePlan:
    """Tokens 1 and 3 into token 0, token 4 into token 2; nothing in the other image."""
    return MergePlan.of(torch.tensor([[0, 0, 2, 0, 2, 5], [0, 1, 2, 3, 4, 5]]))


def rows_to_merge(bits: int = 1, sizes: bool = True, ragged: bool = False,
                  dtype: torch.dtype = torch.float32) -> Callable[[], Arguments]:  # fmt: skip
    def make() -> Arguments:
        numbers = Numbers(7)
        out: Arguments = {"x": numbers.integers(-99, 99, (2, 2, 6, 4), bits).to(dtype)}
        if sizes:
            out["sizes"] = numbers.integers(1, 4, (2, 6)).float()
        if ragged:
            layout = layout_of([[2, 2, 1, 2, 1, 0], [1, 0, 2, 2, 1, 1]])
            out |= {"x": layout.pack(masked(layout, out["x"])), "layout": layout}
        return out | {"plan": _plan()}

    return make


def _merge() -> Iterator[Case]:
    case = named("merge_tokens")
    yield case("means weighed by size", rows_to_merge())
    yield case("sizes are ones where none are given", rows_to_merge(sizes=False))
    # Halves of 2^-8: ties, which go to the even multiple.
    yield case("means rounded to 2^-8, ties to even", rows_to_merge(bits=8, sizes=False))

    def unrounded() -> Arguments:
        return rows_to_merge()() | {"x": Numbers(8).normal((2, 2, 6, 4)).float()}

    yield case("tokens that take none in are left as they are", unrounded)
    yield case("float16 in memory, float64 in sums", rows_to_merge(bits=0, dtype=torch.float16))
    yield case("ragged: rows of the layout after the merge", rows_to_merge(ragged=True))
    yield case("gradient, by size", rows_to_merge(), "x")
    yield case("gradient, ragged", rows_to_merge(ragged=True), "x")


def _unmerge() -> Iterator[Case]:
    def make() -> Arguments:
        return {"y": Numbers(9).normal((2, 2, 6, 4)).float(), "plan": _plan()}

    case = named("unmerge_tokens")
    yield case("each token the row of the one it is held in", make)
    yield case("gradient, summed over the tokens held", make, "y")


# -- halting and readout --------------------------------------------------------------------------


def _halt() -> Iterator[Case]:
    case = named("halt")

    def scores(active: list[list[int]], h: float, H: float) -> Callable[[], Arguments]:
        def make() -> Arguments:
            layout = layout_of(active)
            ones = torch.ones(layout.num_rows)
            return {"h": h * ones, "H": H * ones, "layout": layout}

        return make

    yield case("a rectangle adds up over time", scores([[4, 4, 2]], 0.25, 0.0))
    yield case("depth does not add up over time", scores([[4, 4, 2]], 0.25, 0.0),
               accumulator="depth")  # fmt: skip
    yield case("an accumulator at 1 - eps stops", scores([[1, 1]], 0.5, 0.25), eps=0.25)
    yield case("the last block takes the remainder", scores([[2, 1]], 0.125, 0.25), final=True)
    yield case("a token stops for good once it stops", scores([[3, 1, 0]], 0.375, 0.25))
    yield case("gradient of scores and accumulators", scores([[4, 2, 1]], 0.25, 0.125), "h H")


def _scores() -> Iterator[Case]:
    case = named("halting_scores")

    def make(scale: int = 3) -> Arguments:
        x = Numbers(10).integers(-scale, scale, (2, 2, 5, 8), bits=1).float()
        return {"x": x, "weight": torch.tensor(0.3), "bias": torch.tensor(-1.2)}

    yield case("rounded to multiples of 2^-18", make)
    yield case("of the mean over channels", make, score="mean")
    yield case("gradient straight through the rounding", make, "x weight bias")


def _readout() -> Iterator[Case]:
    case = named("readout")

    def make(sized: bool = False, active: list[list[int]] | None = None) -> Arguments:
        numbers = Numbers(13)
        layout = layout_of(active or [[3] * 4] * 2)
        x = masked(layout, numbers.integers(-999, 999, cells(layout, 8), bits=3)).float()
        w = masked(layout, numbers.integers(1, 2**18, cells(layout), bits=18)).float()
        out: Arguments = {"x": x, "w": w}
        if active is not None:
            out = {"x": layout.pack(x), "w": layout.pack(w), "layout": layout}
        return out | ({"sizes": numbers.integers(2, 5, (2, 4)).float()} if sized else {})

    yield case("a sum weighed by w, no mean", make)
    yield case("sizes weigh the tokens", lambda: make(sized=True))
    # Products of 10 and 18 bits: the sum has more than float32 holds.
    yield case("summed in float64", lambda: {name: x.repeat(9, *[1] * (x.dim() - 1))
                                             for name, x in make().items()})  # fmt: skip
    yield case("ragged: halted tokens left out", lambda: make(active=RAGGED))
    yield case("ragged: sizes are those of the tokens", lambda: make(True, RAGGED))
    yield case("gradient of x and w", make, "x w")
    yield case("gradient of x and w, ragged and sized", lambda: make(True, RAGGED), "x w")


def _counts() -> Iterator[Case]:
    def make(active: list[list[int]]) -> Callable[[], Arguments]:
        def rows() -> Arguments:
            layout = layout_of(active)
            keys = Numbers(14).spikes(cells(layout, 8)).float()
            return {"keys": layout.pack(masked(layout, keys)), "layout": layout}

        return rows

    case = named("firing_counts")
    yield case("ragged: counts are in token order", make([[1, 3, 2], [0, 2, 3]]))


# -- linear maps of spikes ------------------------------------------------------------------------


def _linear() -> Iterator[Case]:
    case = named("spike_linear_lif")

    def make(high: int = 1, bias: bool = True, **settings: Any) -> Callable[[], Arguments]:
        def arguments() -> Arguments:
            numbers = Numbers(15)
            out: Arguments = {
                "spikes": numbers.integers(0, high, (3, 2, 12)).float(),
                "weight": numbers.integers(-8, 8, (10, 12), bits=3).float(),
            }
            if bias:
                out["bias"] = numbers.integers(-4, 4, (10,), bits=3).float()
            return out | settings

        return arguments

    def from_v() -> Arguments:
        return make()() | {"v": Numbers(16).integers(-4, 4, (2, 10), bits=3).float()}

    yield case("the bias is added once a timestep", make())
    yield case("no bias", make(bias=False))
    yield case("values other than ones multiply", make(high=3))
    yield case("a soft reset, by v_threshold", make(), v_reset=None)
    yield case("starts from the membrane given", from_v)
    yield case("returns the membrane", from_v, return_state=True)


def _pack() -> Iterator[Case]:
    case = named("pack_spikes")

    def spikes(channels: int) -> Callable[[], Arguments]:
        return lambda: {"x": Numbers(17).spikes((3, 2, channels)).float()}

    yield case("one word, its sign the last channel", spikes(64))
    yield case("channel 64 begins the second word", spikes(65))
    yield case("bits past the last channel are zero", spikes(70))
    yield case("whatever is not zero is set", lambda: {"x": torch.tensor([[0.0, -0.5, 2.0, 0.0]])})
    yield case("strided: every second element of memory", spikes(70), memory="every second")


def _unpack() -> Iterator[Case]:
    case = named("unpack_spikes")

    def words(channels: int) -> Callable[[], Arguments]:
        def make() -> Arguments:
            numbers = Numbers(18).rng.integers(-(2**63), 2**63 - 1, (3, -(-channels // 64)))
            return {"bits": torch.from_numpy(numbers), "channels": channels}

        return make

    yield case("one word, its sign the last channel", words(64))
    yield case("channel 64 begins the second word", words(65))
    yield case("bits past the last channel are passed over", words(3))
