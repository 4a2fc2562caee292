# SPDX-License-Identifier: MIT
"""What the recursion needs to know of a parametrised layer h = g(x, u), as linear maps.

A rule is stateless. It is registered for a module type, and serves every module whose forward
is that type's own. To add a layer: one file here with a subclass and its decorator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ddpnopt.layers.positions import Gain
from ddpnopt.typing import Tensor


class LayerRule(ABC):
    """Linear maps between a layer's state x, control u = (weight, bias) and pre-activation h.

    Vectors in h-space have h's own shape; a leading axis r holds columns. Dimension 0 of x and h
    is samples times a fold m (m consecutive rows belong to one sample).
    """

    #: The axis of h that holds the features (classes, at the last layer).
    feature_axis: int = -1
    #: Number of dimensions of an input with a batch axis; one fewer means a single sample.
    batched_dim: int = 2

    @abstractmethod
    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """The map x -> g_x x (the layer without its bias), with the layer's present weights."""

    @abstractmethod
    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """Pull-back to the control, g_u^T V summed over the batch, by parameter name."""

    @abstractmethod
    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Gram matrices V_u^T P V_u per sample.

        Args:
            module: The layer.
            x: Its input.
            V: Columns in h-space, (r, *h.shape).
            gain: P = eta M^-1 by parameter name; a parameter that is not named is fixed.
            samples: Number of samples B in dimension 0.
            sketch: Generator for an unbiased estimate where the rule has one; None for exact.

        Returns:
            (B, r, r).
        """

    @abstractmethod
    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """Sum over samples of the squared per-sample gradient, by parameter name."""

    def bias_gradient(self, V: Tensor) -> Tensor:
        """The bias's part of `gradient`: the sum over all axes but the features'."""
        axis = self.feature_axis % V.dim()
        return V.sum([d for d in range(V.dim()) if d != axis])

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """Pull-back to the state, g_x^T V for columns V (r, *h.shape); returns (r, *x.shape)."""
        columns = V.shape[0]
        tiled = x.new_zeros((columns * x.shape[0], *x.shape[1:]))
        vjp: Any = torch.func.vjp(lambda s: self.linear(module, s), tiled)[1]
        pulled: Tensor = vjp(V.reshape(-1, *V.shape[2:]))[0]
        return pulled.reshape(columns, *x.shape)


RULES: dict[type[nn.Module], LayerRule] = {}
R = TypeVar("R", bound=type[LayerRule])


def register(module_type: type[nn.Module]) -> Callable[[R], R]:
    """Class decorator: the rule serves modules of ``module_type``."""

    def add(rule: R) -> R:
        RULES[module_type] = rule()
        return rule

    return add


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, or None.

    A subclass counts as its base only if it neither changes ``forward`` nor computes its weights
    (parametrisations, weight norm): the rule would describe another function.
    """
    for module_type, rule in RULES.items():
        if not isinstance(module, module_type) or type(module).forward is not module_type.forward:
            continue
        if "forward" in vars(module) or not isinstance(module._parameters.get("weight"), Tensor):
            continue
        if not isinstance(module.bias, nn.Parameter | None) or hasattr(module, "parametrizations"):
            continue
        return rule
    return None
