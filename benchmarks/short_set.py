"""The short set of ``compare.py``: some ten cases that stand for the rest, and who times them.

    PYTHONPATH=TREE/src python short_set.py TREE THREADS

serves one tree: it reads a JSON object a line and answers each with one, and waits between turns.
The same file is run for both trees, each with the package of its own tree. So a case keeps to
what older revisions have too, and the clock is here and not in :mod:`atsnn.measure`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import atsnn
import atsnn.functional as F
from atsnn import TokenLayout

Run = Callable[[], Any]
T, B, N, C = 4, 8, 64, 384  # Spikformer-4-384's tokens of eight images
CASES: dict[str, Callable[[], Run]] = {}  # each makes its inputs and returns what is timed


def case(name: str, *args: Any) -> Callable[[Callable[..., Run]], Callable[..., Run]]:
    """Add a function that makes a case, called with ``args``, under ``name``."""

    def add(make: Callable[..., Run]) -> Callable[..., Run]:
        CASES[name] = functools.partial(make, *args)
        return make

    return add


# -- inputs ---------------------------------------------------------------------------------------


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def spikes(rate: float, seed: int = 0) -> torch.Tensor:
    return (uniform(T, B, N, C, seed=seed) < rate).float()


def lifetimes(images: int, tokens: int) -> TokenLayout:
    """Tokens that live for 0 to T timesteps, each as often."""
    return TokenLayout.from_active_steps((uniform(images, tokens) * (T + 1)).long(), T)


@functools.cache
def network():
    """Spikformer-4-384 whose layers fire: an untrained one is silent after its first layers."""
    from atsnn.firing import set_firing_rates

    torch.manual_seed(0)
    model = atsnn.create_model("spikformer_4_384", num_classes=10, halting="rectangle").eval()
    set_firing_rates(model, uniform(2, 3, 32, 32), 0.05, 0.15)
    return model


@functools.cache
def frozen():
    return atsnn.freeze(network())


def halting_scores(images: int, share: float) -> torch.Tensor:
    """Scores by which ``share`` of the cells run."""
    from atsnn.schedule import synthetic_depths, synthetic_scores

    depth = network().config.depth
    return synthetic_scores(synthetic_depths(depth, T, images, N, share), depth)


# -- cases ----------------------------------------------------------------------------------------


@case("neuron forward")
def neuron() -> Run:
    x = 2 * uniform(T, B, N, C)
    return lambda: F.neuron(x, detach_reset=True)


@case("neuron forward + backward")
def neuron_training() -> Run:
    x, grad = (2 * uniform(T, B, N, C)).requires_grad_(), uniform(T, B, N, C, seed=1)
    return lambda: torch.autograd.grad(F.neuron(x, detach_reset=True)[0], x, grad)


@case("attention, dense")
def attention() -> Run:
    q, k, v = (spikes(0.1, seed) for seed in range(3))
    return lambda: F.spiking_attention(q, k, v, num_heads=12)


@case("attention, packed")
def attention_packed() -> Run:
    layout = lifetimes(B, N)
    q, k, v = (layout.pack(spikes(0.1, seed)) for seed in range(3))
    return lambda: F.spiking_attention(q, k, v, num_heads=12, layout=layout)


@case("match and merge")
def merging() -> Run:
    x = spikes(0.15)

    def run():
        plan = F.match_tokens(F.firing_counts(x), r=N // 4)
        return F.merge_tokens(x, plan)

    return run


@case("layout, pack, unpack")
def layout() -> Run:
    n, x = lifetimes(16, 196).active_steps, uniform(T, 16, 196, 64)

    def run():
        made = TokenLayout.from_active_steps(n, T)
        return made.unpack(made.pack(x))

    return run


@case("linear + LIF, 40 %", 0.4)
@case("linear + LIF, 5 %", 0.05)
def linear(rate: float) -> Run:
    x, weight = spikes(rate), F.pack_linear(0.1 * (uniform(C, C) - 0.25))
    return lambda: F.spike_linear_lif(x, weight)


@case("engine, batch 8, 40 % halted", 8, 0.6)
@case("engine, batch 8", 8, 1.0)
@case("engine, batch 1, 40 % halted", 1, 0.6)
@case("engine, batch 1", 1, 1.0)
def engine(images: int, share: float) -> Run:
    compiled, x, scores = frozen(), uniform(images, 3, 32, 32), halting_scores(images, share)
    return lambda: compiled(x, scores=scores)


@case("blocks, packed, 40 % halted")
@torch.no_grad()
def blocks() -> Run:
    from atsnn.schedule import scheduled

    tokens = network().embed(uniform(1, 3, 32, 32))
    halted = scheduled(network(), halting_scores(1, 0.6))
    return torch.no_grad()(lambda: halted.forward_tokens(tokens))


@case("training step, small model")
def training() -> Run:
    torch.manual_seed(0)
    config = atsnn.SpikformerConfig(
        image_size=16, num_classes=10, embed_dim=64, depth=2, num_heads=4, halting="rectangle"
    )
    model = atsnn.ATSpikformer(config).train()
    x, labels = uniform(8, 3, 16, 16), torch.arange(8)
    weights = list(model.parameters())

    def run():
        trace = model(x, return_trace=True, firing_rates=False)
        loss = torch.nn.functional.cross_entropy(trace.logits, labels) + 0.1 * trace.ponder_loss
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return run


# -- the worker -----------------------------------------------------------------------------------


def check_place(tree: Path) -> None:
    """Check that everything of atsnn in this process is the tree's: an installed one may win."""
    kernels = importlib.util.find_spec("atsnn.kernels")
    files = {"atsnn.kernels": kernels and kernels.origin, "atsnn._C": None} | {
        name: getattr(module, "__file__", None)
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "atsnn"
    }
    for name, file in files.items():
        if file is None or not Path(file).resolve().is_relative_to(tree):
            raise ImportError(f"short_set: expected {name} from {tree}, got {file}")


def digest(result: Any) -> str:
    """What came out, to tell whether two revisions computed the same."""
    found = hashlib.sha256()
    for tensor in [result] if isinstance(result, torch.Tensor) else result:
        if tensor is not None:  # the gradient of a parameter that is not used
            found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Bench:
    """Answers what the parent asks; every question names a case."""

    def __init__(self, tree: Path) -> None:
        check_place(tree)
        self.tree = tree
        self.runs: dict[str, Run] = {}

    def prepare(self, case: str) -> dict[str, str]:
        """Make a case and run it once; a revision that lacks what it needs says so."""
        try:
            self.runs[case] = CASES[case]()
            found = digest(self.runs[case]())
        except (AttributeError, ImportError, TypeError) as error:
            return {"missing": f"{type(error).__name__}: {error}"}
        check_place(self.tree)  # again: a case may have imported more
        return {"result": found}

    def time(self, case: str, calls: int) -> dict[str, float]:
        """Median seconds of ``calls`` calls."""
        run = self.runs[case]
        run()  # untimed: the caches are as the others left them
        seconds = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds)}

    def serve(self, questions: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
        for question in questions:
            asked = json.loads(question)
            answer(getattr(self, asked.pop("do"))(**asked))


def main() -> None:
    from atsnn.measure import machine

    tree, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    # Answers have a pipe of their own: whatever prints must not be read as one.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        pipe.write(json.dumps(found) + "\n")
        pipe.flush()

    # An installed atsnn.kernels would be found otherwise: in a checkout it lies beside src.
    atsnn.__path__.append(str(tree))
    torch.set_num_threads(threads)
    answer({"cases": list(CASES), "machine": machine()})
    Bench(tree).serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
