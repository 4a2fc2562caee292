# SPDX-License-Identifier: MIT
"""Hyperparameters: curvatures as the plain values of ``param_groups``, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from ddpnopt.curvature import CURVATURES, Curvature
from ddpnopt.decisions import as_number
from ddpnopt.typing import Tensor


def curvature_options(curvature: str | Mapping[str, Any] | Curvature) -> dict[str, Any]:
    """A curvature as the plain values that ``param_groups`` carry.

    Raises:
        ValueError: Unknown name; the message lists the names.
    """
    if isinstance(curvature, Curvature):
        if CURVATURES.get(curvature.name) is not type(curvature):
            raise ValueError(
                f"curvature {type(curvature).__name__} is not registered: add it to "
                f"ddpnopt.curvature.CURVATURES under its name {curvature.name!r}"
            )
        return {"name": curvature.name, **asdict(curvature)}  # type: ignore[call-overload]
    if not isinstance(curvature, str | Mapping):
        raise ValueError(
            f"curvature={curvature!r}: choose from {', '.join(CURVATURES)}, or give an object"
        )
    options = {"name": curvature} if isinstance(curvature, str) else dict(curvature)
    name = options.pop("name", None)
    if name not in CURVATURES:
        raise ValueError(f"curvature={name!r}: choose from {', '.join(CURVATURES)}")
    return curvature_options(CURVATURES[name](**options))


@lru_cache(maxsize=64)
def _curvature(options: tuple[tuple[str, Any], ...]) -> Curvature:
    known = dict(options)
    return CURVATURES[known.pop("name")](**known)


def _object(options: str | Mapping[str, Any] | Curvature) -> Curvature:
    if not isinstance(options, Mapping):  # set by hand in a group
        options = curvature_options(options)
    found: Curvature = _curvature(hashable(options))
    return found


def hashable(value: Any) -> Any:
    """Plain values with everything in them that can be changed in place turned into tuples."""
    if isinstance(value, Mapping):
        return tuple(sorted((k, hashable(v)) for k, v in value.items()))
    return tuple(value) if isinstance(value, list) else value


def curvatures(groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, Curvature]:
    """By parameter, where the groups name one: a wrapped optimizer's don't."""
    found: dict[Tensor, Curvature] = {}
    for group in groups:
        if "curvature" in group:
            found.update(dict.fromkeys(group["params"], _object(group["curvature"])))
    return found


def needs_squares(options: Mapping[str, Any]) -> bool:
    """Whether a group's curvature is fed with the samples' squared gradients."""
    return _object(options).statistics == "squares"


def own_momentum(options: Mapping[str, Any]) -> bool:
    """Whether a group's curvature has a momentum of its own."""
    return not _object(options).heavy_ball


@dataclass(frozen=True)
class Hyper:
    """One parameter's hyperparameters in this step.

    Attributes:
        lr: A number; while a step is traced a tensor without dimensions.
        layers: How many weights with two dimensions or more are trained, in all groups.
    """

    lr: float | Tensor
    momentum: float
    weight_decay: float
    curvature: Curvature
    layers: int = 1

    @property
    def gradient_step(self) -> bool:
        """The update is -eta d and nothing else."""
        plain = self.curvature.name == "identity"
        return plain and self.momentum == 0 and self.weight_decay == 0

    @cached_property
    def life(self) -> float | Tensor:
        """eta / (1 - momentum): the step's total effect over the momentum's life."""
        return self.lr / (1 - self.momentum)

    def seen(self, p: Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A parameter's state as its curvature reads it."""
        if not self.curvature.relative:
            return state
        return {**state, "weights": p, "rate": self.life, "layers": self.layers}


def hyperparameters(groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, Hyper]:
    """By parameter, from the parameter groups as they are now."""
    groups = list(groups)
    layers = sum(p.dim() > 1 and p.requires_grad for group in groups for p in group["params"])
    found: dict[Tensor, Hyper] = {}
    for group in groups:
        rate, momentum = as_number(group["lr"]), float(group["momentum"])
        decay = float(group["weight_decay"])
        hyper = Hyper(rate, momentum, decay, _object(group["curvature"]), layers)
        found.update(dict.fromkeys(group["params"], hyper))
    return found
