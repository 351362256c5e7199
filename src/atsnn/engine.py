"""The event-driven engine: whole-network inference on a CPU whose time follows the spikes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .checks import (
    AtsnnError,
    BackendError,
    InvalidType,
    InvalidValue,
    check_choice,
    check_dtype,
    check_finite,
    check_shape,
    check_tensor,
)
from .cost import Cost, Parts, cost_of_trace
from .functional.linear import MOST_INPUTS, MOST_TIMESTEPS
from .nn.blocks import MLP, SpikeDrivenSelfAttention, SpikformerBlock, SpikingSelfAttention
from .nn.config import SpikformerConfig
from .nn.folding import fold
from .nn.halting import Halting
from .nn.merging import TokenMerge
from .nn.model import ATSpikformer, Head, check_images, maps_of_tokens
from .nn.neurons import IF, LIF, PLIF
from .nn.stem import SpikingPatchSplitting
from .nn.trace import Trace
from .ops.library import native, native_missing
from .schedule import rule_of

__all__ = ["Engine", "EngineState", "EngineTrace", "engine_of", "freeze", "levels"]

# The residual stream is bytes: two spikes from the stem and two from each block.
MOST_BLOCKS = 126


STEM = ("proj", "proj1", "proj2", "proj3", "rpe")
BLOCK = ("attn.input", "attn.q_lif", "attn.k_lif", "attn.v_lif", "attn.attn_lif", "attn.proj_lif",
         "mlp.input", "mlp.fc1_lif", "mlp.fc2_lif")  # fmt: skip
# What the time of a block is told by, the price of halting and merging from the third on.
PIECES = ("attention", "mlp", "scores", "accumulators", "readout", "moves", "matching", "merging")


def levels() -> list[str]:
    """Instruction sets the engine can use on this machine, the one it uses last."""
    return list(_native("levels").levels())


@dataclass
class EngineTrace(Trace):
    """What a pass of the engine did; see :class:`~atsnn.nn.trace.Trace` for what it inherits.

    Attributes
    ----------
    seconds : Parts
        Time spent in each part, for the whole batch. Writing the trace is not in it.
    block_seconds : list of dict of str to float
        The same for each block, with halting and merging taken apart: ``attention``, ``mlp``,
        ``scores``, ``accumulators``, ``readout``, ``moves`` (of rows to the next block),
        ``matching`` and ``merging``.
    rows : list of int
        Rows each block ran, over the whole batch.
    stem_pixels : dict of str to int
        Pixels of which each convolution of the stem was computed, over batch and timesteps: with
        the sequential accumulator those around the tokens that go on.
    config : SpikformerConfig
    still : bool
        Whether the images stood still.
    """

    seconds: Parts
    block_seconds: list[dict[str, float]]
    rows: list[int]
    stem_pixels: dict[str, int]
    config: SpikformerConfig
    still: bool

    @cached_property
    def cost(self) -> Cost:
        """FLOPs, SOPs, bytes and energy by part, of the rows that ran and what fired in them.

        Its ``dense`` is None: what the same network costs without halting is told by the trace of
        ``freeze(model.without_halting())``, or by :func:`atsnn.cost` of the model.
        """
        return cost_of_trace(self.config, self, self.still, self.stem_pixels)


class EngineState:
    """What an engine remembers between the parts of a stream.

    Membranes of every neuron, halting scores and the readout so far, of the images of one batch in
    one engine. A new one starts at rest; each call of the engine that is given it goes on where the
    last one ended. To start again make a new one.
    """

    def __init__(self) -> None:
        self._state = _native("EngineState").StreamState()
        self._owner: Any = None  # the compiled engine whose stream it is
        self._in_use = threading.Lock()

    @property
    def steps(self) -> int:
        """Timesteps seen so far."""
        return int(self._state.steps)

    @property
    def batch(self) -> int:
        """Images of the stream; 0 before the first call."""
        return int(self._state.batch)

    def __repr__(self) -> str:
        return f"EngineState(steps={self.steps}, batch={self.batch})"

    def __reduce__(self) -> Any:
        raise InvalidType("EngineState: cannot be copied or pickled; make a new one")


class Engine:
    """A frozen model; made by :func:`freeze`.

    Attributes
    ----------
    config : SpikformerConfig

    Notes
    -----
    Threads may call one engine at the same time. PyTorch's number of threads
    (``torch.set_num_threads``) is the engine's.
    """

    def __init__(self, config: SpikformerConfig, compiled: Any) -> None:
        self.config = config
        self._compiled = compiled

    def __reduce__(self) -> Any:
        raise InvalidType(
            "Engine: cannot be copied or pickled; save the model and call atsnn.freeze on it again"
        )

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Engine(Spikformer-{c.depth}-{c.embed_dim}, {c.image_size}x{c.image_size}, T={c.T}, "
            f"halting={c.halting!r}, level={levels()[-1]!r})"
        )

    def __call__(
        self,
        x: Tensor,
        return_trace: bool = False,
        *,
        execution: str = "packed",
        state: EngineState | None = None,
        scores: Tensor | None = None,
        level: str | None = None,
        record: Callable[[tuple[Any, ...]], None] | None = None,
    ) -> Tensor | EngineTrace:
        """Images to logits.

        Parameters
        ----------
        x : Tensor
            ``[B, C, H, W]`` still images, shown ``T`` times, or ``[T, B, C, H, W]`` video or
            events, time first, whose ``T`` need not be the model's; float32 on the CPU, finite.
        return_trace : bool
            Whether to return an :class:`EngineTrace` instead of the logits.
        execution : {"packed", "masked"}
            Whether halted cells do not exist, or are computed and zeroed. The same bits either
            way.
        state : EngineState, optional
            Go on from it, and leave in it what comes next: ``T`` calls with one timestep each
            give what one call with ``T`` timesteps gives. The logits are those of all timesteps
            so far; a trace is of this call's timesteps. Still images (4-d) move it by the model's
            ``T``. Not with merging, whose decision needs all timesteps. Each thread needs its own.
        scores : Tensor, optional
            ``[L, T, B, N]`` float32 halting scores to go by; the model's own are computed all the
            same. For measuring what halting saves: see :mod:`atsnn.schedule`.
        level : str, optional
            Instruction set, one of :func:`levels`; the same bits on each.
        record : callable, optional
            Called with the spikes of each layer; for :mod:`atsnn.compare`.

        Returns
        -------
        Tensor or EngineTrace
            ``[B, num_classes]`` float32 logits; ``[B, num_classes, H, W]`` with ``task="pixels"``.
        """
        c = self.config
        op = "Engine"
        x = self._images(x)
        check_choice(op, "execution", execution, ("packed", "masked"))
        if level is not None:
            check_choice(op, "level", level, levels())
        still = x.dim() == 4
        T, B = (c.T, x.shape[0]) if still else x.shape[:2]
        L, N = c.depth, c.grid**2
        if scores is not None:
            self._check_scores(scores, L, T, B, N)
        rows = (B, N) if c.task == "pixels" else (B,)
        arrays: dict[str, Tensor] = {"logits": x.new_empty(*rows, c.outputs)}
        if return_trace:
            cells = (L, T, B, N)
            arrays |= {
                "active": torch.empty(cells, dtype=torch.uint8),
                "scores": x.new_empty(cells), "weights": x.new_empty(cells),
                "block_sizes": x.new_empty(L, B, N), "sizes": x.new_empty(B, N),
                "depth": torch.empty((T, B, N), dtype=torch.int64),
                "source": torch.empty((B, N), dtype=torch.int64),
            }  # fmt: skip
        if scores is not None:
            arrays["given_scores"] = scores.detach().contiguous()
        views = {name: array.numpy() for name, array in arrays.items()}
        with self._holding(state, B):
            report = self._compiled.run(
                x.detach().contiguous().numpy(), still, T, views, execution == "masked",
                torch.get_num_threads(), None if state is None else state._state, level, record,
            )  # fmt: skip
        if c.task == "pixels":
            arrays["logits"] = maps_of_tokens(c, arrays["logits"])
        if not return_trace:
            return arrays["logits"]
        return self._trace(arrays, report, T, B, N, still)

    def trace(self, x: Tensor, **options: Any) -> EngineTrace:
        """What a call with these options does: ``engine(x, return_trace=True, ...)``."""
        trace = self(x, return_trace=True, **options)
        assert isinstance(trace, EngineTrace)
        return trace

    def _images(self, x: Tensor) -> Tensor:
        op = "Engine"
        check_images(op, self.config, x)
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise InvalidType(
                f"{op}: images must be float32 on the CPU, got {x.dtype} on {x.device}"
            )
        if x.dim() == 5 and x.shape[0] > MOST_TIMESTEPS:
            raise InvalidValue(
                f"{op}: images must have at most {MOST_TIMESTEPS} timesteps, got T = {x.shape[0]}"
            )
        check_finite(op, "images", x)
        return x

    @contextmanager
    def _holding(self, state: EngineState | None, B: int) -> Iterator[None]:
        """Nobody else may move a state while it is checked and used; it becomes this engine's."""
        if state is None:
            yield
            return
        if not isinstance(state, EngineState):
            raise InvalidType(f"Engine: state must be an EngineState, got {type(state).__name__}")
        if not state._in_use.acquire(blocking=False):
            raise InvalidValue("Engine: state must be free, got one in use by another call")
        try:
            self._check_state(state, B)
            state._owner = self._compiled
            yield
        finally:
            state._in_use.release()

    def _check_state(self, state: EngineState, B: int) -> None:
        if self.config.merging:
            raise InvalidValue(
                "Engine: a model that merges tokens cannot stream, as the decision which to merge "
                "needs all timesteps; expected state=None"
            )
        if state._owner is not None and state._owner is not self._compiled:
            raise InvalidValue(
                "Engine: state must be new or of this engine's stream, got one of another engine's"
            )
        if state._state.broken:
            raise InvalidValue(
                "Engine: state must be whole, got one of a call that was stopped half-way"
            )
        if state.steps and state.batch != B:
            raise InvalidValue(
                f"Engine: images must be as many as those of the state, {state.batch}, got {B}"
            )

    def _check_scores(self, scores: Tensor, L: int, T: int, B: int, N: int) -> None:
        if self.config.halting not in ("rectangle", "depth"):
            raise InvalidValue(
                "Engine: scores can be given to a model that halts by 'rectangle' or 'depth', "
                f"got halting={self.config.halting!r}"
            )
        check_shape(
            "Engine", "scores", check_tensor("Engine", "scores", scores), L=L, T=T, B=B, N=N
        )
        check_dtype("Engine", "scores", scores, (torch.float32,))
        check_finite("Engine", "scores", scores)

    def _trace(
        self, arrays: dict[str, Tensor], report: dict[str, Any], T: int, B: int, N: int,
        still: bool,
    ) -> EngineTrace:  # fmt: skip
        c = self.config
        trace = Trace(
            arrays["logits"], arrays["active"].bool(), arrays["depth"],
            torch.tensor(report["ponder"] / max(T * B * N, 1), dtype=torch.float32),
            arrays["scores"], arrays["weights"], arrays["sizes"], arrays["block_sizes"],
            arrays["source"], self._rates(report),
        )  # fmt: skip
        blocks = [dict(zip(PIECES, seconds, strict=True)) for seconds in report["block_seconds"]]
        return EngineTrace(
            **vars(trace),
            seconds=_parts(report["stem_seconds"], blocks, report["head_seconds"]),
            block_seconds=blocks,
            rows=list(report["rows"]),
            stem_pixels=dict(zip(STEM, report["stem_pixels"][::2], strict=True)),
            config=c,
            still=still,
        )

    def _rates(self, report: dict[str, Any]) -> dict[str, float]:
        """Spikes per neuron and active cell, by the names of the model's layers."""
        c = self.config
        dim = c.embed_dim
        widths = (c.in_channels, dim // 8, dim // 4, dim // 2, dim, dim)
        found: dict[str, float] = {}
        counts = zip(report["stem_spikes"], report["stem_pixels"], strict=True)
        for i, (spikes, pixels) in enumerate(counts):
            channels = widths[(i + 1) // 2]  # before a layer's neurons those of its input
            found[layer_name(-1, i)] = spikes / max(pixels * channels, 1)
        counts = iter(report["block_spikes"])
        hidden = int(dim * c.mlp_ratio)
        for block, rows in enumerate(report["rows"]):
            for layer in BLOCK:
                spikes = next(counts)
                if rows:
                    width = hidden if layer == "mlp.fc1_lif" else dim
                    found[f"block.{block}.{layer}"] = spikes / (rows * width)
        return found


def _parts(stem: float, blocks: list[dict[str, float]], head: float) -> Parts:
    found = Parts(stem=stem, head=head)
    for block in blocks:
        for piece, seconds in block.items():
            merges = piece in ("matching", "merging")
            part = piece if piece in ("attention", "mlp") else "merging" if merges else "halting"
            found.add(part, seconds)
    return found


def _native(what: str) -> Any:
    if native is None:
        raise BackendError(f"{what}: the engine needs the native extension, but {native_missing}")
    return native


def pooled(config: SpikformerConfig) -> tuple[str, ...]:
    """The convolutions after which maps are halved."""
    return STEM[2:4] if config.stem == "cifar" else STEM[:4]


def layer_name(block: int, layer: int) -> str:
    """What the model calls a layer of the engine; ``block`` is -1 for the stem."""
    if block < 0:
        return f"patch_embed.{STEM[layer // 2]}" + ("_lif" if layer % 2 else ".input")
    return f"block.{block}.{BLOCK[layer]}"


# -- from a model ---------------------------------------------------------------------------------


def freeze(model: ATSpikformer) -> Engine:
    """Fold, pack and compile a trained model for inference on the CPU.

    Every BatchNorm is folded into the layer before it (in float64, rounded once to float32), the
    weights are packed, and nothing refers to the model afterwards: training it on does not change
    the engine.

    Parameters
    ----------
    model : ATSpikformer
        In evaluation mode, float32, on the CPU.

    Raises
    ------
    InvalidValue
        If the model is in training mode, halts by a rule (:mod:`atsnn.schedule`), holds values
        that are not finite, or is larger than the engine's integers.
    InvalidType
        If a layer is of a kind the engine does not know.
    BackendError
        If the extension is not built.
    """
    op = "freeze"
    extension = _native(op)
    if not isinstance(model, ATSpikformer):
        raise InvalidType(
            f"{op}: model must be an ATSpikformer, itself and not a wrapper around it, "
            f"got {type(model).__name__}"
        )
    rule = rule_of(model)
    if rule is not None:
        raise InvalidValue(
            f"{op}: the model must halt by its scores, got one that halts by a rule "
            f"({rule}), which an engine does not know; freeze undirected(model) and "
            f"give the engine scores=policy_scores(model, images), both of atsnn.schedule"
        )
    _check_model(model)
    c = model.config
    limit = None if c.merge_threshold is None else math.copysign(
        c.merge_threshold**2, c.merge_threshold
    )  # fmt: skip
    config = {
        "image_size": c.image_size, "in_channels": c.in_channels, "outputs": c.outputs,
        "pixels": c.task == "pixels",
        "embed_dim": c.embed_dim, "depth": c.depth, "num_heads": c.num_heads,
        "hidden": int(c.embed_dim * c.mlp_ratio),
        "pooled": [name in pooled(c) for name in STEM[:4]],
        "pool_spikes": c.pool == "after_lif", "spike_driven": c.attention == "sdsa",
        "attn_scale": c.attn_scale, "halting": c.halting or "none",
        "mean_field": c.readout == "mean-field", "score": c.score, "eps": c.eps,
        "merging": c.merging, "merge_sizes": c.merge_sizes, "merge_r": list(c.merges),
        "merge_threshold": limit,
    }  # fmt: skip
    stem = model.patch_embed
    conv = [
        _layer(stem._layer("conv", name), stem._layer("bn", name), stem._layer("lif", name))
        for name in STEM
    ]
    blocks = []
    for block in model.block:
        attn, mlp = block.attn, block.mlp
        layers: dict[str, Any] = {
            name: _layer(*(getattr(attn, f"{name}_{part}") for part in ("linear", "bn", "lif")))
            for name in ("q", "k", "v", "proj")
        }
        for name in ("fc1", "fc2"):
            parts = (getattr(mlp, f"{name}_{part}") for part in ("linear", "bn", "lif"))
            layers[name] = _layer(*parts)
        blocks.append({**layers, "attn": _neuron(attn.attn_lif)})
    head = {
        "weight": model.head.weight.detach().double().T.contiguous().numpy(),
        "bias": fold(model.head, None)[1].numpy(),
    }
    halting = model.halting
    weight, bias = torch.zeros(1, dtype=torch.float64), 0.0
    if halting is not None:
        scaled = halting.alpha if halting.weight is None else halting.alpha * halting.weight
        weight, bias = scaled.detach().double().reshape(-1), float(halting.beta.detach())
    return Engine(
        c, extension.Engine(config, conv, blocks, head, {"weight": weight.numpy(), "bias": bias})
    )


def engine_of(model: ATSpikformer) -> Engine | str:
    """The model's engine, or why it has none."""
    try:
        return freeze(model)
    except AtsnnError as error:
        return f"no engine: {error}"


KNOWN: list[type[nn.Module]] = [
    ATSpikformer, SpikingPatchSplitting, SpikformerBlock, SpikingSelfAttention,
    SpikeDrivenSelfAttention, MLP, Halting, TokenMerge, Head, nn.ModuleList, nn.Linear, nn.Conv2d,
    nn.BatchNorm1d, nn.BatchNorm2d, LIF, IF, PLIF,
]  # fmt: skip


def _check_model(model: ATSpikformer) -> None:
    op = "freeze"
    c = model.config
    for name, module in model.named_modules():
        if name and type(module) not in KNOWN:
            raise InvalidType(
                f"{op}: expected layers of {', '.join(sorted(k.__name__ for k in KNOWN))}; "
                f"got {type(module).__name__} at {name}"
            )
        if module.training:
            raise InvalidValue(
                f"{op}: the model must be in evaluation mode (model.eval()), "
                f"got {name or 'the model'} in training mode"
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InvalidValue(f"{op}: {name} must keep running statistics, got none")
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if any(hooks):
            raise InvalidValue(
                f"{op}: the model must have no forward hooks, which the engine would not call, "
                f"got one at {name or 'the model'}"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise InvalidType(
                f"{op}: {name} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}"
            )
        check_finite(op, name, tensor)
    if c.merge_match == "random" and c.merging:
        raise InvalidValue(
            f"{op}: merge_match must be 'similar', got 'random', which is a control for studies"
        )
    widest = max(9 * c.embed_dim, int(c.embed_dim * c.mlp_ratio), 9 * c.in_channels)
    for name, value, most in (
        ("depth", c.depth, MOST_BLOCKS), ("the inputs of a layer", widest, MOST_INPUTS),
        ("T", c.T, MOST_TIMESTEPS),
    ):  # fmt: skip
        if value > most:
            raise InvalidValue(f"{op}: {name} must be at most {most}, got {value}")
    for number, block in enumerate(model.block):
        neurons = [_neuron(getattr(block.attn, f"{name}_lif")) for name in "qkv"]
        if any(neuron != neurons[0] for neuron in neurons):
            raise InvalidValue(
                f"{op}: the neurons of q, k and v must have the same settings, "
                f"got others in block {number}"
            )


def _layer(layer: nn.Linear | nn.Conv2d, bn: Any, neuron: Any) -> dict[str, Any]:
    weight, bias = (t.to(torch.float32) for t in fold(layer, bn))
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_finite("freeze", f"the {name} of a layer after folding its BatchNorm", tensor)
    return {
        "weight": weight.contiguous().numpy(),
        "bias": bias.numpy(),
        "neuron": _neuron(neuron),
    }


def _neuron(neuron: IF | LIF | PLIF) -> dict[str, Any]:
    settings = neuron._settings()
    inv_tau = settings.get("inv_tau")
    return {
        "kind": neuron.kind,
        "decay_input": settings.get("decay_input", True),
        "tau": settings.get("tau", 2.0),
        "inv_tau": None if inv_tau is None else float(inv_tau.detach()),
        "v_threshold": neuron.v_threshold,
        "v_reset": neuron.v_reset,
    }
