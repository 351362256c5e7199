"""Attention, MLP and block of Spikformer, restricted to active cells.

Tokens are dense, ``[T, B, N, C]`` with the inactive cells zero ("masked"), or the rows of the
active cells alone, ``[R, C]`` ("packed").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue, check_integer, check_shape, check_tensor
from ..layout import TokenLayout
from ..reference import batch_norm_rows, masked_batch_norm
from .folding import Folded
from .neurons import LIF, Neuron

Record = Callable[[str, Tensor, TokenLayout | None], None]


@dataclass
class Context:
    """What accompanies the tokens through the blocks.

    Attributes
    ----------
    layout : TokenLayout, optional
        The active cells; ``None``: all.
    sizes : Tensor, optional
        ``[B, N]``, how many original tokens each token stands for.
    state : dict, optional
        Membranes by layer name, read and replaced; ``None``: every layer starts at rest.
    record : callable, optional
        Called with the name, the spikes and the layout of every spiking layer.
    packed : bool
        Whether tokens are the rows of ``layout`` alone.
    fused : bool
        Whether a linear layer, its BatchNorm and its neuron run as one operation (inference,
        without state or record).
    """

    layout: TokenLayout | None = None
    sizes: Tensor | None = None
    state: dict[str, Tensor] | None = None
    record: Record | None = None
    name: str = field(default="")
    packed: bool = False
    fused: bool = False

    def path(self, name: str) -> str:
        """The full name of the layer ``name`` inside this one."""
        return f"{self.name}.{name}" if self.name else name

    def at(self, name: str) -> Context:
        """The same context inside the layer ``name``."""
        return replace(self, name=self.path(name))

    @property
    def rows(self) -> TokenLayout | None:
        """The layout of the tokens as an operation takes it: ``None`` where they are dense."""
        return self.layout if self.packed else None

    def mask(self, x: Tensor) -> Tensor:
        """``x`` with inactive cells zero; rows have none."""
        if self.layout is None or self.packed:
            return x
        return x * self.layout.factor(x.dtype)

    def norm(self, bn: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """BatchNorm over the active cells."""
        return batch_norm_rows(bn, x) if self.packed else masked_batch_norm(bn, x, self.layout)

    def fire(self, name: str, neuron: Neuron, x: Tensor) -> Tensor:
        """Spikes of ``neuron``, zero in inactive cells: a zero input can still fire there."""
        full = self.path(name)
        spikes, v = neuron.run(x, None if self.state is None else self.state.get(full), self.rows)
        if self.state is not None:
            self.state[full] = v
        spikes = self.mask(spikes)
        if self.record is not None:
            self.record(full, spikes, self.layout)
        return spikes

    def layer(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        """``module``'s linear layer, BatchNorm and neuron of this name on ``x``."""
        linear, bn, neuron = (getattr(module, f"{name}_{part}") for part in ("linear", "bn", "lif"))
        if self.fused:
            folded = module.__dict__.setdefault("_folded", {}).setdefault(name, Folded())
            return neuron.run_linear(x, folded.packed(linear, bn), layout=self.rows)[0]
        return self.fire(f"{name}_lif", neuron, self.norm(bn, linear(x)))

    def note(self, name: str, x: Tensor) -> None:
        """Record what goes into a layer: the integers of the residual stream, or pooled spikes."""
        if self.record is not None:
            self.record(self.path(name), self.mask(x), self.layout)


def _check_tokens(op: str, x: Tensor, dim: int) -> None:
    check_tensor(op, "x", x)
    check_shape(op, "x", x, T=None, B=None, N=None, C=dim)


def _lif(tau: float, surrogate: str, alpha: float | None, v_threshold: float = 1.0) -> LIF:
    return LIF(
        tau=tau, v_threshold=v_threshold, surrogate=surrogate, alpha=alpha, detach_reset=True
    )


class _Attention(nn.Module):
    """Projections, operation and output of a spiking attention; subclasses give the operation."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: bool,
        tau: float,
        surrogate: str,
        alpha: float | None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_integer(op, "dim", dim, at_least=1)
        check_integer(op, "num_heads", num_heads, at_least=1)
        if dim % num_heads:
            raise InvalidValue(f"{op}: num_heads must divide dim = {dim}, got {num_heads}")
        self.dim, self.num_heads = dim, num_heads
        for name in ("q", "k", "v", "proj"):
            setattr(self, f"{name}_linear", nn.Linear(dim, dim, bias=bias))
            setattr(self, f"{name}_bn", nn.BatchNorm1d(dim))
            setattr(self, f"{name}_lif", _lif(tau, surrogate, alpha))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        raise NotImplementedError

    def forward_with_keys(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Output spikes and key spikes, both shaped as ``x``."""
        q, k, v = (context.layer(self, name, x) for name in ("q", "k", "v"))
        return context.layer(self, "proj", self.attend(q, k, v, context)), k

    def forward(self, x: Tensor) -> Tensor:
        """``x [T, B, N, C]`` to spikes ``[T, B, N, C]``."""
        _check_tokens(type(self).__name__, x, self.dim)
        return self.forward_with_keys(x, Context())[0]


class SpikingSelfAttention(_Attention):
    """Spiking self-attention of Spikformer: linear, BN, LIF for q, k, v; attention; LIF; output.

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads; ``num_heads`` divides ``dim``.
    scale : float
        Factor of the attention (Spikformer: 0.125).
    attn_threshold : float
        Threshold of the LIF after the attention (Spikformer: 0.5).
    bias : bool
        Whether the linear layers have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float = 0.125,
        *,
        attn_threshold: float = 0.5,
        bias: bool = True,
        tau: float = 2.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
    ) -> None:
        super().__init__(dim, num_heads, bias, tau, surrogate, alpha)
        self.scale = scale
        self.attn_lif = _lif(tau, surrogate, alpha, attn_threshold)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        out = F.spiking_attention(
            q, k, v, num_heads=self.num_heads, scale=self.scale, sizes=context.sizes,
            layout=context.rows,
        )  # fmt: skip
        return context.fire("attn_lif", self.attn_lif, out)


class SpikeDrivenSelfAttention(_Attention):
    """Spike-driven self-attention (Spike-driven Transformer V1): ``q * LIF(sum_n k * v)``.

    Parameters
    ----------
    dim, num_heads : int
        Channels and heads.
    attn_threshold : float
        Threshold of the LIF on the sums over tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attn_threshold: float = 0.5,
        bias: bool = True,
        tau: float = 2.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
    ) -> None:
        super().__init__(dim, num_heads, bias, tau, surrogate, alpha)
        self.attn_lif = _lif(tau, surrogate, alpha, attn_threshold)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        name = context.path("attn_lif")
        lif = self.attn_lif
        out, v_gate = F.spike_driven_attention(
            q, k, v, num_heads=self.num_heads, v_threshold=lif.v_threshold, sizes=context.sizes,
            tau=lif.tau, surrogate=lif.surrogate, alpha=lif.alpha,
            state=None if context.state is None else context.state.get(name), return_state=True,
            layout=context.rows,
        )  # fmt: skip
        if context.state is not None:
            context.state[name] = v_gate
        if context.record is not None:
            context.record(name, out, context.layout)
        return out


class MLP(nn.Module):
    """Spikformer's MLP: linear, BN, LIF, twice."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool = True,
        tau: float = 2.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.fc1_linear = nn.Linear(dim, hidden, bias=bias)
        self.fc1_bn = nn.BatchNorm1d(hidden)
        self.fc1_lif = _lif(tau, surrogate, alpha)
        self.fc2_linear = nn.Linear(hidden, dim, bias=bias)
        self.fc2_bn = nn.BatchNorm1d(dim)
        self.fc2_lif = _lif(tau, surrogate, alpha)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        if context is None:
            _check_tokens("MLP", x, self.dim)
            context = Context()
        return context.layer(self, "fc2", context.layer(self, "fc1", x))


class SpikformerBlock(nn.Module):
    """``x + attention(x)``, then ``x + mlp(x)``; halted tokens pass unchanged.

    Parameters
    ----------
    attention : SpikingSelfAttention or SpikeDrivenSelfAttention
    mlp : MLP
    """

    def __init__(self, attention: _Attention, mlp: MLP) -> None:
        super().__init__()
        self.attn = attention
        self.mlp = mlp

    def forward_with_keys(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Tokens after the block and the keys it attended with, both shaped as ``x``."""
        context.note("attn.input", x)
        attended, keys = self.attn.forward_with_keys(x, context.at("attn"))
        x = x + attended
        context.note("mlp.input", x)
        return x + self.mlp(x, context.at("mlp")), keys

    def forward(self, x: Tensor) -> Tensor:
        _check_tokens("SpikformerBlock", x, self.attn.dim)
        return self.forward_with_keys(x, Context())[0]
