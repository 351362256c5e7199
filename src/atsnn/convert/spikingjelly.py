"""SpikingJelly's Spikformer, whose queries, keys and values are one convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import InvalidType, InvalidValue, check_finite, require
from ..nn.config import STEMS, SpikformerConfig
from ..nn.model import ATSpikformer
from ..reference import SURROGATE_CLASSES, SURROGATES
from .common import COUNTER, build, check_fixed, check_plain, fold_biases, ratio_of

# What a neuron computes with; the surrogate besides.
NEURON = ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset")
STACKED = ("weight", "bias", "running_mean", "running_var")  # of a BatchNorm, by channels


def from_spikingjelly(model: nn.Module, **overrides: Any) -> ATSpikformer:
    """A model with the weights and settings of SpikingJelly 2.0's ``Spikformer``.

    Its logits are the mean over time of that model's, which returns those of every timestep. The
    device, dtype and mode (training or evaluation) are kept.

    Parameters
    ----------
    model : spikingjelly.activation_based.model.spikformer.Spikformer
        As its constructor builds it, ``spikformer_ti``, ``_s`` and ``_cifar10`` included. Neurons
        of classes of this package that derive from SpikingJelly's count as those.
    **overrides
        Further values of :class:`~atsnn.SpikformerConfig`, e.g. ``halting`` or ``merge_r``.

    Raises
    ------
    InvalidType
        If ``model`` is no such model.
    InvalidValue
        If it has a setting that :class:`~atsnn.ATSpikformer` has not, which names the layer; if an
        override contradicts the weights; if weights are not finite.
    MissingDependency
        If SpikingJelly is not installed.
    """
    op = "from_spikingjelly"
    require("spikingjelly", "peers", op)
    from spikingjelly.activation_based.model.spikformer import Spikformer

    if not _is_kind(model, Spikformer):
        raise InvalidType(
            f"{op}: model must be SpikingJelly's Spikformer, got {type(model).__name__}"
        )
    config = _configuration(op, model)
    _check_as_built(op, model, config)
    check_fixed(op, config, overrides)
    theirs = model.state_dict()
    for name, tensor in theirs.items():
        check_finite(op, name, tensor)
    weight = theirs["head.weight"]
    ours = build(config.replace(**overrides), _our_state(theirs, config.depth), weight.dtype)
    return ours.to(weight.device).train(model.training)


def to_spikingjelly(model: ATSpikformer, *, drop_halting: bool = False) -> nn.Module:
    """SpikingJelly's ``Spikformer`` with the weights and settings of ``model``.

    It returns the logits of every timestep, whose mean over time is what ours returns. Its linear
    layers have no bias: ours go into the mean of their BatchNorm. Device, dtype and mode are kept.

    Parameters
    ----------
    model : ATSpikformer
        With ``pool="before_lif"``, as that model pools.
    drop_halting : bool
        Whether to leave halting and merging out, which that model does not have: its numbers are
        those of ``model.without_halting()``.

    Returns
    -------
    spikingjelly.activation_based.model.spikformer.Spikformer

    Raises
    ------
    InvalidValue
        If tokens halt or merge and ``drop_halting`` is not set, or if the attention, the pooling
        or differing settings of queries, keys and values cannot be expressed.
    MissingDependency
        If SpikingJelly is not installed.
    """
    op = "to_spikingjelly"
    check_plain(op, model, drop_halting)
    if model.config.pool != "before_lif":
        raise InvalidValue(
            f"{op}: expected pool='before_lif', as SpikingJelly's stem pools potentials, "
            f"got pool={model.config.pool!r}"
        )
    require("spikingjelly", "peers", op)
    theirs = _like(op, model).to(model.head.weight)
    theirs.load_state_dict(_their_state(op, model.state_dict(), model.config.depth))
    return theirs.train(model.training)


class _Layer(NamedTuple):
    """A convolution and BatchNorm of theirs, the neuron behind, and what those are here.

    ``ours`` has a place for ``linear`` (``conv`` in the stem), ``bn`` or ``lif``.
    """

    theirs: str
    neuron: str
    linear: str
    ours: tuple[str, ...]

    def parts(self, part: str) -> list[str]:
        return [name.format(part) for name in self.ours]


def _layers(depth: int) -> Iterator[_Layer]:
    for stage, name in enumerate(("proj_{}", "proj_{}1", "proj_{}2", "proj_{}3", "rpe_{}")):
        at = f"stages.{stage}" if name != "rpe_{}" else "positional_encoding"
        at = f"patch_embed.{at}"
        yield _Layer(f"{at}.conv_bn.block", f"{at}.neuron", "conv", (f"patch_embed.{name}",))
    for number in range(depth):
        theirs, ours = f"blocks.{number}", f"block.{number}"
        for block, neuron, names in (
            ("attn.qkv_conv_bn", "attn.qkv_lif", ("attn.q_{}", "attn.k_{}", "attn.v_{}")),
            ("attn.proj_conv_bn", "attn.proj_lif", ("attn.proj_{}",)),
            ("mlp.fc1", "mlp.neuron1", ("mlp.fc1_{}",)),
            ("mlp.fc2", "mlp.neuron2", ("mlp.fc2_{}",)),
        ):
            yield _Layer(
                f"{theirs}.{block}", f"{theirs}.{neuron}", "linear",
                tuple(f"{ours}.{name}" for name in names),
            )  # fmt: skip


def _their_state(op: str, ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    layers = list(_layers(depth))
    ours = fold_biases(ours, [name for layer in layers for name in layer.parts(layer.linear)])
    state = {name: ours[name] for name in ("head.weight", "head.bias")}
    for layer in layers:
        weight = torch.cat([ours[f"{name}.weight"] for name in layer.parts(layer.linear)])
        # A linear layer is a convolution of one token.
        state[f"{layer.theirs}.0.weight"] = weight if weight.dim() == 4 else weight.unsqueeze(-1)
        norms = layer.parts("bn")
        for part in STACKED:
            state[f"{layer.theirs}.1.{part}"] = torch.cat([ours[f"{n}.{part}"] for n in norms])
        counts = [ours[f"{name}.{COUNTER}"] for name in norms]
        if any(not torch.equal(count, counts[0]) for count in counts):
            raise InvalidValue(
                f"{op}: {', '.join(norms)} must have seen the same batches, as they are one "
                f"BatchNorm there, got {COUNTER} of {', '.join(str(int(c)) for c in counts)}"
            )
        state[f"{layer.theirs}.1.{COUNTER}"] = counts[0]
    return state


def _our_state(theirs: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    state = {name: theirs[name] for name in ("head.weight", "head.bias")}
    for layer in _layers(depth):
        linears, norms = layer.parts(layer.linear), layer.parts("bn")
        weight = theirs[f"{layer.theirs}.0.weight"]
        weights = (weight if weight.dim() == 4 else weight.squeeze(-1)).chunk(len(linears))
        state.update({f"{n}.weight": w for n, w in zip(linears, weights, strict=True)})
        for part in STACKED:
            parts = theirs[f"{layer.theirs}.1.{part}"].chunk(len(norms))
            state.update({f"{n}.{part}": t for n, t in zip(norms, parts, strict=True)})
        state.update({f"{n}.{COUNTER}": theirs[f"{layer.theirs}.1.{COUNTER}"] for n in norms})
    return state


# -- settings --------------------------------------------------------------------------------------


def _like(op: str, model: ATSpikformer) -> Any:
    """SpikingJelly's model with the sizes and settings of ours, but its own weights."""
    from spikingjelly.activation_based.model.spikformer import Spikformer

    c = model.config
    theirs = Spikformer(
        T=c.T, in_channels=c.in_channels, img_size_h=c.image_size, img_size_w=c.image_size,
        patch_size=c.patch, num_classes=c.num_classes, embed_dims=c.embed_dim,
        num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, depths=c.depth,
    )  # fmt: skip
    for layer in _layers(c.depth):
        _set(op, theirs, layer.neuron, model, layer.parts("lif"), NEURON)
        _set_surrogate(op, theirs, layer.neuron, model, layer.parts("lif"))
        _set(op, theirs, f"{layer.theirs}.1", model, layer.parts("bn"), ("eps", "momentum"))
    for number in range(c.depth):
        attention, ours = f"blocks.{number}.attn", f"block.{number}.attn"
        _set(op, theirs, f"{attention}.attn_lif", model, [f"{ours}.attn_lif"], NEURON)
        _set_surrogate(op, theirs, f"{attention}.attn_lif", model, [f"{ours}.attn_lif"])
        _set(op, theirs, attention, model, [ours], ("scale",))
    return theirs


def _one(op: str, model: nn.Module, names: list[str], setting: str) -> Any:
    """A setting of these modules of ours, which are one module there."""
    values = [getattr(model.get_submodule(name), setting) for name in names]
    if any(value != values[0] for value in values):
        raise InvalidValue(
            f"{op}: {', '.join(names)} must have the same {setting}, as they are one layer there, "
            f"got {', '.join(map(repr, values))}"
        )
    return values[0]


def _set(
    op: str, theirs: nn.Module, name: str, model: nn.Module, ours: list[str],
    settings: tuple[str, ...],
) -> None:  # fmt: skip
    target = theirs.get_submodule(name)
    for setting in settings:
        setattr(target, setting, _one(op, model, ours, setting))


def _set_surrogate(
    op: str, theirs: nn.Module, name: str, model: nn.Module, ours: list[str]
) -> None:
    from spikingjelly.activation_based import surrogate

    make = getattr(surrogate, SURROGATE_CLASSES[_one(op, model, ours, "surrogate")])
    node: Any = theirs.get_submodule(name)
    node.surrogate_function = make(alpha=float(_one(op, model, ours, "alpha")))


def _configuration(op: str, model: Any) -> SpikformerConfig:
    """What the first layers of ``model`` say; the others are then compared with them."""
    try:
        stem, blocks = model.patch_embed, model.blocks
        conv, norm = stem.stages[0].conv_bn.block[:2]
        node, attention = stem.stages[0].neuron, blocks[0].attn
        surrogate, alpha = _surrogate(op, "patch_embed.stages.0.neuron", node)
        height, width = stem.image_size
        if height != width:
            raise InvalidValue(
                f"{op}: patch_embed must have square images, got {height} by {width}"
            )
        hidden, dim = blocks[0].mlp.fc1[0].out_channels, model.embed_dims
        return SpikformerConfig(
            image_size=height, in_channels=conv.in_channels, num_classes=model.head.out_features,
            embed_dim=dim, depth=len(blocks), num_heads=attention.num_heads,
            mlp_ratio=ratio_of(hidden, dim), T=model.T, pool="before_lif", bias=False,
            stem={patch: name for name, patch in STEMS.items()}[stem.patch_size],
            attn_scale=attention.scale, attn_threshold=attention.attn_lif.v_threshold,
            bn_eps=norm.eps, tau=node.tau, surrogate=surrogate,
            alpha=None if alpha == SURROGATES[surrogate].alpha else alpha,
        )  # fmt: skip
    except (AttributeError, IndexError, KeyError) as error:
        raise InvalidValue(
            f"{op}: model must have the layers that Spikformer's constructor makes, got one "
            f"without: {error}"
        ) from error


def _surrogate(op: str, name: str, node: Any) -> tuple[str, float]:
    """Our name of a neuron's surrogate, and its ``alpha``."""
    from spikingjelly.activation_based import neuron, surrogate

    if not _is_kind(node, neuron.LIFNode):
        raise InvalidValue(f"{op}: {name} must be a LIFNode, got {type(node).__name__}")
    for ours, theirs in SURROGATE_CLASSES.items():
        if type(node.surrogate_function) is getattr(surrogate, theirs):
            return ours, float(node.surrogate_function.alpha)
    raise InvalidValue(
        f"{op}: {name}.surrogate_function must be one of {', '.join(SURROGATE_CLASSES.values())}, "
        f"got {type(node.surrogate_function).__name__}"
    )


def _check_as_built(op: str, model: nn.Module, config: SpikformerConfig) -> None:
    """Refuse a model that differs in any layer or setting from the one of ``config``."""
    with torch.device("meta"):
        want = _like(op, ATSpikformer(config))
    # With duplicates: SpikingJelly's neurons share their surrogate where it is the default.
    theirs = dict(model.named_modules(remove_duplicate=False))
    wanted = dict(want.named_modules(remove_duplicate=False))
    for name, module in wanted.items():
        kind, got = type(module), theirs.get(name)
        if got is None or not _is_kind(got, kind):
            raise InvalidValue(
                f"{op}: {name} must be a {kind.__name__}, "
                f"got {'none' if got is None else type(got).__name__}"
            )
        for setting, value in _settings(module).items():
            if getattr(got, setting, None) != value:
                raise InvalidValue(
                    f"{op}: {name or 'model'} must have {setting} = {value!r}, as the other "
                    f"layers and ATSpikformer have it, got {getattr(got, setting, None)!r}"
                )
    extra = sorted({*theirs, *model.state_dict()} - {*wanted, *want.state_dict()})
    if extra:
        raise InvalidValue(
            f"{op}: model must have the layers that Spikformer's constructor makes, "
            f"got {extra[0]} besides"
        )


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that say what it computes."""
    kept = ("_step_mode", "_neuron_precision")
    return {
        name: value
        for name, value in vars(module).items()
        if (name in kept or not name.startswith("_"))
        and name not in ("training", "v_seq")
        and (value is None or isinstance(value, bool | int | float | str | tuple))
    }


def _is_kind(module: object, kind: type) -> bool:
    """Whether ``module`` is of exactly this class, or of one that this package made of it."""
    own = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
    return type(module) is kind or (own and isinstance(module, kind))
