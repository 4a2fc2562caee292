# SPDX-License-Identifier: MIT
"""A curvature that bounds every unit's step by its weights' size, on top of another one.

Gradient clipping by unit (AGC, Brock et al. 2021) is a step with the diagonal curvature
M = max(1, |g_u| / (tau |u|)), one number a unit u; so it can be given to the recursion, whose S
then counts the step that is really taken. Two bounds:

- ``bound="gradient"``: |M^-1 g| <= tau |u|, AGC as it is; the step still grows with the rate.
- ``bound="step"``: eta |M^-1 g| <= tau |u|. With L layers the gradient changes along a step by the
  factor prod_l (1 + |du_l| / |u_l|) at most (deep relative trust, Bernstein et al. 2020), and the
  line model is one of the gradient as it stands: tau = log(2) / L keeps that factor below 2, and
  no learning rate, however large, leaves it.
- ``bound="relative"``: the limit of the latter at an infinite rate, |M^-1 g| = tau |u| always; the
  rate is then a number near 1 that schedules may lower: no learning rate is left to choose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

import ddpnopt
from ddpnopt.curvature import CURVATURES, AdamW, Curvature, Identity
from ddpnopt.curvature.base import State, larger
from ddpnopt.experiments.names import call, split
from ddpnopt.experiments.rival_steps import SHORTEST, unit_norms
from ddpnopt.typing import Tensor

BOUNDS = ("gradient", "step", "relative")
#: What the bound is put on.
_INNER: dict[str, Curvature] = {"identity": Identity(), "adamw": AdamW()}


@dataclass(frozen=True)
class Trust(Curvature):
    """M = M_0 max(1, eta |M_0^-1 g|_u / (tau |u|)), M_0 the inner curvature.

    Args:
        tau: Largest ratio of the norms.
        bound: "gradient" (without eta), "step" or "relative".
        inner: "identity" or "adamw".
    """

    tau: float = 0.02
    bound: str = "gradient"
    inner: str = "identity"

    name: ClassVar[str] = "trust"
    relative: ClassVar[bool] = True

    @property
    def heavy_ball(self) -> bool:  # type: ignore[override]
        """AdamW has its own."""
        return _INNER[self.inner].heavy_ball

    @property
    def strength(self) -> float:  # type: ignore[override]
        """The inner one's."""
        return _INNER[self.inner].strength

    @property
    def statistics(self) -> str:
        """Norms of the batch gradient."""
        return "gradient"

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """The inner curvature's own, and the factor behind it, in one tensor (2, ...)."""
        base = _INNER[self.inner]
        own = base.moment(state, gradient, squares)
        inverse = base.inverse(state, own)
        step = gradient if inverse is None else gradient * inverse
        rate = float(state["rate"]) if self.bound == "step" else 1.0
        longest = unit_norms(state["weights"]).clamp(min=SHORTEST) * self.tau
        least = 1e-30 if self.bound == "relative" else 1.0
        factor = (unit_norms(step) * rate / longest).clamp(min=least).expand_as(gradient)
        return torch.stack([torch.zeros_like(gradient) if own is None else own, factor])

    def inverse(self, state: State, moment: Tensor | None) -> Tensor:
        """M_0^-1 over the factor."""
        assert moment is not None
        own = _INNER[self.inner].inverse(state, self._own(moment))
        return moment[1].reciprocal() if own is None else own / moment[1]

    def _own(self, moment: Tensor) -> Tensor | None:
        return None if self.inner == "identity" else moment[0]

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: float, momentum: float
    ) -> dict[str, Any]:
        """The inner curvature's, on d over the factor."""
        assert moment is not None
        base = _INNER[self.inner]
        return base.update(p, d / moment[1], state, self._own(moment), lr, momentum)

    def follow(
        self, state: State, gradient: Tensor, d: Tensor, moment: Tensor | None
    ) -> Tensor | None:
        """Fed with max(g^2, d^2)."""
        return self.moment(state, larger(d, gradient), None)


CURVATURES[Trust.name] = Trust


def layers_of(model: nn.Module) -> int:
    """L: modules that own a matrix, an attention counted as one."""
    owners = [list(m.parameters(recurse=False)) for m in model.modules()]
    return sum(any(p.dim() > 1 for p in own) for own in owners)


def trusted(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
    """`ddpnopt.DDPNOpt` with `Trust`; tau is log(2) / L where it is not given and bounds the step.

    Args:
        model: The network.
        lr: Learning rate.
        options: Those of `Trust` as "curvature.<option>", all others `ddpnopt.DDPNOpt`'s.
    """
    own, rest = split(options, "curvature")
    if own.get("bound", BOUNDS[0]) != BOUNDS[0] and "tau" not in own:
        own["tau"] = math.log(2) / layers_of(model)
    kind = Averaging if rest.pop("averaged", False) else ddpnopt.DDPNOpt
    return kind(model, lr, curvature=call(Trust, options=own), **rest)


class Averaging(ddpnopt.DDPNOpt):
    """Answers with the weights' running average, of weights t^8 (about the last ninth)."""

    def step(self, closure: Any = None) -> Any:
        """A step, and the average after it."""
        found = super().step(closure)
        with torch.no_grad():
            if not hasattr(self, "_mean"):
                self._mean: list[Tensor] = [p.detach().clone() for p in self._all()]
                self._steps = 0
            self._steps += 1
            torch._foreach_lerp_(self._mean, self._all(), min(1.0, 9 / (self._steps + 8)))
        return found

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _swap(self) -> None:
        for p, mean in zip(self._all(), getattr(self, "_mean", []), strict=False):
            kept = p.detach().clone()
            p.copy_(mean)
            mean.copy_(kept)

    def eval(self) -> None:
        """The average."""
        self._swap()

    def train(self) -> None:
        """The weights."""
        self._swap()
