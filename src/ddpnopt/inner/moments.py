# SPDX-License-Identifier: MIT
"""Optimizers with a second moment for every coordinate: Adam's family, RMSprop, Adagrad, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ddpnopt.curvature import AdamW as AdamWCurvature
from ddpnopt.curvature import RMSprop as RMSpropCurvature
from ddpnopt.curvature.base import Curvature, seen
from ddpnopt.curvature.base import State as ReadState
from ddpnopt.decisions import as_number
from ddpnopt.hyperparameters import Hyper
from ddpnopt.inner.base import Group, Reader, State, coupled, excess, feed_average
from ddpnopt.typing import Tensor


@dataclass(frozen=True)
class _Adam(AdamWCurvature):
    """M of Adam; weight decay enters the gradient where the group says so."""

    decoupled: ClassVar[bool] = False
    amsgrad: bool = False

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(v^) + eps), v^ the largest so far with amsgrad."""
        largest = state.get("max_exp_avg_sq") if self.amsgrad else None
        if largest is not None and moment is not None:
            moment = torch.maximum(moment, largest)
        # Torch counts in float32, in which 1 - beta2^t is not exact.
        step = as_number(state.get("step", 0))
        step = step.double() if isinstance(step, Tensor) else step
        return super().inverse({**state, "step": step}, moment)


@dataclass(frozen=True)
class _RAdam(_Adam):
    """M of RAdam: the identity while the variance of v is unknown, then Adam's over a factor."""

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """The rectified step's own."""
        assert moment is not None
        step = float(state.get("step", 0)) + 1
        decay = self.betas[1] ** step
        most = 2 / (1 - self.betas[1]) - 1
        length = most - 2 * step * decay / (1 - decay)
        if length <= 5:
            return torch.ones_like(moment)
        rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
        return super().inverse(state, moment).mul_(float(rectified) ** 0.5)


class Adam(Reader):
    """Adam, AdamW, NAdam: P = lr / (sqrt(v^) + eps).

    Args:
        curvature: M.
        blank: What the state starts with where that is not 0.
    """

    moment = "exp_avg_sq"

    def __init__(self, curvature: type[_Adam] = _Adam, blank: dict[str, float] | None = None):
        self.curvature, self.blank = curvature, blank or {}

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """The factor 1 - beta1 of one step is made up for by those that follow."""
        betas = tuple(float(b) for b in group["betas"])
        assert len(betas) == 2
        amsgrad = bool(group.get("amsgrad", False))
        curvature = self.curvature(betas, float(group["eps"]), amsgrad)
        return Hyper(as_number(group["lr"]), 0.0, coupled(group), curvature)

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """v is an average."""
        feed_average(state["exp_avg_sq"], float(group["betas"][1]), plain, d)


class RMSprop(Reader):
    """P = lr / ((sqrt(v) + eps) (1 - momentum))."""

    moment = "square_avg"

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """Centred or not: the mean that centring takes away only makes the step longer."""
        curvature = _RMSprop(float(group["alpha"]), float(group["eps"]), "batch", group["centered"])
        return Hyper(as_number(group["lr"]), float(group["momentum"]), coupled(group), curvature)

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """v is an average."""
        feed_average(state["square_avg"], float(group["alpha"]), plain, d)


@dataclass(frozen=True)
class _RMSprop(RMSpropCurvature):
    """M of RMSprop; of the variance where it is centred."""

    centered: bool = False

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(v - mean^2) + eps)."""
        mean = state.get("grad_avg") if self.centered else None
        if mean is None or moment is None:
            return super().inverse(state, moment)
        variance = seen(moment).sub_(mean.square()).clamp_(min=0)
        return variance.sqrt_().add_(self.eps).reciprocal_()


@dataclass(frozen=True)
class _Read(Curvature):
    """M that is read from a state, never stepped with."""

    eps: float

    name: ClassVar[str] = "read"
    strength: ClassVar[float] = AdamWCurvature.strength

    @property
    def statistics(self) -> str:
        """Squares of the batch gradient."""
        return "gradient"

    def update(
        self,
        p: Tensor,
        d: Tensor,
        state: ReadState,
        moment: Tensor | None,
        lr: float | Tensor,
        momentum: float,
    ) -> dict[str, Any]:
        """The optimizer's own affair."""
        raise NotImplementedError("the wrapped optimizer makes its own updates")


@dataclass(frozen=True)
class _Adagrad(_Read):
    def moment(self, state: ReadState, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """sum <- sum + g^2."""
        total = state.get("sum")
        return gradient.square() if total is None else total.addcmul(gradient, gradient)

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(sum) + eps)."""
        assert moment is not None
        return seen(moment).sqrt_().add_(self.eps).reciprocal_()


class Adagrad(Reader):
    """P = lr / (sqrt(sum) + eps); the decay of its rate is left out, which errs safely."""

    moment = "sum"

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group."""
        return Hyper(as_number(group["lr"]), 0.0, coupled(group), _Adagrad(float(group["eps"])))

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """The sum takes what d^2 lacks."""
        state["sum"].add_(excess(plain, d))


@dataclass(frozen=True)
class _Adadelta(_Read):
    rho: float = 0.9

    def moment(self, state: ReadState, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """v <- rho v + (1 - rho) g^2."""
        v = state.get("square_avg")
        v = torch.zeros_like(gradient) if v is None else v.mul(self.rho)
        return v.addcmul_(gradient, gradient, value=1 - self.rho)

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """sqrt(mean of squared steps + eps) / sqrt(v + eps)."""
        assert moment is not None
        steps = state.get("acc_delta")
        scale = torch.zeros_like(moment) if steps is None else steps
        return (scale + self.eps).sqrt_().div_((moment + self.eps).sqrt_())


class Adadelta(Reader):
    """P = lr sqrt(mean of squared steps + eps) / sqrt(v + eps)."""

    moment = "square_avg"

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group."""
        curvature = _Adadelta(float(group["eps"]), float(group["rho"]))
        return Hyper(as_number(group["lr"]), 0.0, coupled(group), curvature)

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """v is an average."""
        feed_average(state["square_avg"], float(group["rho"]), plain, d)


@dataclass(frozen=True)
class _Adamax(_Read):
    betas: tuple[float, float] = (0.9, 0.999)

    def moment(self, state: ReadState, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """u <- max(beta2 u, |g| + eps)."""
        u = state.get("exp_inf")
        size = gradient.abs().add_(self.eps)
        return size if u is None else torch.maximum(u * self.betas[1], size)

    def inverse(self, state: ReadState, moment: Tensor | None) -> Tensor:
        """1 / u."""
        assert moment is not None
        return seen(moment).reciprocal_()


class Adamax(Reader):
    """P = lr / u."""

    moment = "exp_inf"

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group."""
        first, second = (float(b) for b in group["betas"])
        curvature = _Adamax(float(group["eps"]), (first, second))
        return Hyper(as_number(group["lr"]), 0.0, coupled(group), curvature)

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """u takes the plain gradient's size where that is the larger one."""
        u, decay = state["exp_inf"], float(group["betas"][1])
        if decay > 0:
            size = plain.abs().add_(float(group["eps"])).div_(decay)
            u.copy_(torch.where(plain.abs() > d.abs(), torch.maximum(u, size), u))
