# SPDX-License-Identifier: MIT
"""M = M_0 max(1, eta |M_0^-1 g|_u / (tau |u|)): no step is longer than tau times the unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch

from ddpnopt.curvature.adamw import AdamW
from ddpnopt.curvature.base import Curvature, Rate, State, larger
from ddpnopt.curvature.identity import Identity
from ddpnopt.curvature.rmsprop import RMSprop
from ddpnopt.decisions import as_number
from ddpnopt.ranges import check_choice, check_number, positive
from ddpnopt.typing import Tensor

#: What the bound may be put on: curvatures with one number for every weight.
DIAGONAL: dict[str, type[Curvature]] = {kind.name: kind for kind in (Identity, RMSprop, AdamW)}
#: Of a unit that is bounded.
SHORTEST = 1e-3


class _Relative(Curvature):
    """M_0 with one factor a unit.

    Attributes:
        base: M_0.
        tau: As for `Trust`.
        shortest: Likewise.
    """

    name: ClassVar[str] = "trust"
    relative: ClassVar[bool] = True
    base: Curvature
    tau: float | int | None
    shortest: float | int

    @property
    def decoupled(self) -> bool:  # type: ignore[override]
        """As M_0's."""
        return self.base.decoupled

    @property
    def heavy_ball(self) -> bool:  # type: ignore[override]
        """As M_0's."""
        return self.base.heavy_ball

    @property
    def strength(self) -> float:  # type: ignore[override]
        """As M_0's."""
        return self.base.strength

    @property
    def statistics(self) -> str:
        """The gradient's norms, and what M_0 is fed with."""
        return "gradient" if self.base.statistics == "none" else self.base.statistics

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor:
        """M_0's statistics and the factor on M_0, shape (2, *u)."""
        return self._with_factor(state, gradient, self.base.moment(state, gradient, squares))

    def factor(self, moment: Tensor) -> Tensor:
        """The factor on M_0, of u's shape: 1 or more."""
        return moment[1]

    def inverse(self, state: State, moment: Tensor | None) -> Tensor:
        """M_0^-1 over the factor."""
        assert moment is not None
        own, factor = self.base.inverse(state, self._own(moment)), self.factor(moment)
        return factor.reciprocal() if own is None else own / factor

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """M_0's own, on d over the factor."""
        assert moment is not None
        step = d / self.factor(moment)
        return self.base.update(p, step, state, self._own(moment), lr, momentum)

    def follow(
        self, state: State, gradient: Tensor, d: Tensor, moment: Tensor | None
    ) -> Tensor | None:
        """M_0's own; the factor is that of max(|g|, |d|), so that the bound holds for d."""
        own = self.base.follow(state, gradient, d, None if moment is None else self._own(moment))
        return self._with_factor(state, larger(d, gradient), own)

    def longest(self, state: State) -> Tensor:
        """tau |u| of every unit, shaped to multiply u."""
        tau = math.log(2) / max(1, int(state["layers"])) if self.tau is None else self.tau
        return lengths(state["weights"]).clamp_(min=self.shortest) * tau

    def _own(self, moment: Tensor) -> Tensor | None:
        return None if self.base.statistics == "none" else moment[0]

    def _with_factor(self, state: State, gradient: Tensor, own: Tensor | None) -> Tensor:
        inverse = self.base.inverse(state, own)
        step = gradient if inverse is None else gradient * inverse
        factor = lengths(step) * as_number(state["rate"]) / self.longest(state)
        factor = factor.clamp_(min=1.0).to(gradient.dtype).expand_as(gradient)
        return torch.stack([torch.zeros_like(gradient) if own is None else own, factor])


@dataclass(frozen=True)
class Trust(_Relative):
    """Another curvature's, made larger where its step would be long beside the weights.

    Every unit u (the first dimension of a weight; a vector is one unit) gets one factor, so that
    eta |M^-1 g| <= tau |u|. With L layers a gradient changes along a step by less than
    prod_l (1 + |du_l| / |u_l|), which tau = log(2) / L keeps below 2: the line along which
    `ddpnopt.value.Moreau` looks is then still the loss's, at any learning rate.

    Args:
        inner: M_0: "identity", "rmsprop", "adamw", or an object of theirs with its options.
        tau: Largest length of a step beside the unit's own; None: log(2) / L, L the number of
            weights with two dimensions or more that are trained.
        shortest: Units shorter than this count as so long: fresh biases are zero.

    Raises:
        ValueError: An option is out of range.
    """

    inner: str | Mapping[str, Any] | Curvature = "identity"
    tau: float | int | None = None
    shortest: float | int = SHORTEST

    def __post_init__(self) -> None:
        """Check the options."""
        options = _plain(self.inner)
        check_choice("Trust", "inner", options.get("name"), tuple(DIAGONAL))
        object.__setattr__(self, "inner", options["name"] if len(options) == 1 else options)
        if self.tau is not None:
            check_number("Trust", "tau", self.tau, positive, "must be positive and finite, or None")
        check_number("Trust", "shortest", self.shortest, positive, "must be positive and finite")
        given = {name: value for name, value in options.items() if name != "name"}
        object.__setattr__(self, "base", DIAGONAL[options["name"]](**given))


@dataclass(frozen=True)
class Bounded(_Relative):
    """The same around a curvature that is read off somebody else's optimizer.

    Args:
        base: M_0, diagonal.
        tau: As for `Trust`.
        shortest: Likewise.
    """

    base: Curvature
    tau: float | int | None = None
    shortest: float | int = SHORTEST


def _plain(inner: Any) -> dict[str, Any]:
    if isinstance(inner, Curvature):
        return {"name": inner.name, **asdict(cast(Any, inner))}
    # Groups' options are hashed as pairs.
    pairs = isinstance(inner, tuple) and all(isinstance(o, tuple) and len(o) == 2 for o in inner)
    return dict(inner) if pairs or isinstance(inner, Mapping) else {"name": inner}


def lengths(t: Tensor) -> Tensor:
    """Norms over all dimensions but the first, which counts units; of a vector over that, too."""
    axes = tuple(range(1, t.dim())) or None
    wide = torch.promote_types(t.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(t, dim=axes, keepdim=axes is not None, dtype=wide)
    return found
