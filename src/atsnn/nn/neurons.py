"""Spiking neurons as modules, with the constructors and behaviour of SpikingJelly's."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import functional as F
from ..checks import InvalidValue, check_choice, check_number
from ..layout import TokenLayout
from ..reference import SURROGATES, arithmetic_dtype

STEP_MODES = ("s", "m")


class Neuron(nn.Module):
    """What LIF, IF and PLIF share: the state, the step mode and the call of the operation.

    The membrane ``v`` is kept from call to call until :meth:`reset`. ``step_mode="m"`` takes
    ``[T, ...]``, ``"s"`` one timestep ``[...]``.
    """

    kind = ""

    def __init__(
        self,
        v_threshold: float,
        v_reset: float | None,
        surrogate: str,
        alpha: float | None,
        detach_reset: bool,
        step_mode: str,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.v_threshold = check_number(name, "v_threshold", v_threshold)
        self.v_reset = None if v_reset is None else check_number(name, "v_reset", v_reset)
        check_choice(name, "surrogate", surrogate, SURROGATES)
        self.surrogate = surrogate
        self.alpha = SURROGATES[surrogate].alpha if alpha is None else alpha
        check_number(name, "alpha", self.alpha, above=0)
        self.detach_reset = bool(detach_reset)
        check_choice(name, "step_mode", step_mode, STEP_MODES)
        self.step_mode = step_mode
        self.v: Tensor | None = None

    def _settings(self) -> dict[str, Any]:
        return {}

    def run(
        self, x: Tensor, v: Tensor | None = None, layout: TokenLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(spikes, final membrane)`` of ``x [T, ...]``, or of rows ``[R, C]``, from ``v``.

        The module keeps nothing of it.
        """
        return F.neuron(
            x, v, kind=self.kind, v_threshold=self.v_threshold, v_reset=self.v_reset,
            detach_reset=self.detach_reset, surrogate=self.surrogate, alpha=self.alpha,
            layout=layout, **self._settings(),
        )  # fmt: skip

    def run_linear(
        self,
        x: Tensor,
        packed: F.PackedLinear,
        v: Tensor | None = None,
        layout: TokenLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`run` of a linear map of spikes ``x``, as one operation for inference."""
        found = F.spike_linear_lif(
            x, packed, v=v, kind=self.kind, v_threshold=self.v_threshold, v_reset=self.v_reset,
            layout=layout, return_state=True, **self._settings(),
        )  # fmt: skip
        return cast(tuple[Tensor, Tensor], found)

    def forward(self, x: Tensor) -> Tensor:
        single = self.step_mode == "s"
        spikes, self.v = self.run(x.unsqueeze(0) if single else x, self.v)
        return spikes.squeeze(0) if single else spikes

    def functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Tensor | float | None, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A call that keeps nothing: ``((spikes,), (v,))`` of ``(x,)`` from the state ``(v,)``.

        The form of SpikingJelly's ``MemoryModule.functional_forward``. ``v`` is a tensor, a number
        that all neurons begin at, or ``None``: at rest.
        """
        name = f"{type(self).__name__}.functional_forward"
        for what, given in (("inputs", inputs), ("states", states)):
            if not isinstance(given, tuple) or len(given) != 1:
                raise InvalidValue(f"{name}: {what} must be a tuple of one, got {given!r:.60}")
        (x,), (v,) = inputs, states
        single = self.step_mode == "s"
        steps = x.unsqueeze(0) if single else x
        if v is not None and not isinstance(v, Tensor):
            dtype = arithmetic_dtype(x.dtype)
            v = torch.full(steps.shape[1:], float(v), dtype=dtype, device=x.device)
        spikes, v = self.run(steps, v)
        return (spikes.squeeze(0) if single else spikes,), (v,)

    def reset(self) -> None:
        """Forget the membrane; the next call starts at rest."""
        self.v = None

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
            f"surrogate={self.surrogate!r}, alpha={self.alpha}, "
            f"detach_reset={self.detach_reset}, step_mode={self.step_mode!r}"
        )


class IF(Neuron):
    """Integrate-and-fire neuron; see :func:`atsnn.functional.neuron`."""

    kind = "if"

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate, alpha, detach_reset, step_mode)


class LIF(Neuron):
    """Leaky integrate-and-fire neuron; see :func:`atsnn.functional.neuron`.

    Parameters
    ----------
    tau : float
        Membrane time constant in timesteps, greater than 1.
    decay_input : bool
        Whether the input is divided by ``tau`` too.
    """

    kind = "lif"

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate, alpha, detach_reset, step_mode)
        self.tau = check_number("LIF", "tau", tau, above=1)
        self.decay_input = bool(decay_input)

    def _settings(self) -> dict[str, Any]:
        return {"tau": self.tau, "decay_input": self.decay_input}

    def extra_repr(self) -> str:
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class PLIF(Neuron):
    """Parametric LIF: ``1 / tau = sigmoid(w)`` is learned; see :func:`atsnn.functional.neuron`.

    Parameters
    ----------
    init_tau : float
        Time constant to begin with, greater than 1; ``w = -log(init_tau - 1)``.
    """

    kind = "plif"

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate: str = "sigmoid",
        alpha: float | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate, alpha, detach_reset, step_mode)
        check_number("PLIF", "init_tau", init_tau, above=1)
        self.decay_input = bool(decay_input)
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    def _settings(self) -> dict[str, Any]:
        return {"inv_tau": self.w.sigmoid(), "decay_input": self.decay_input}

    def extra_repr(self) -> str:
        return f"decay_input={self.decay_input}, {super().extra_repr()}"
