# SPDX-License-Identifier: MIT
"""A model's parametrised modules, by its modules alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ddpnopt.functional import dense, parts
from ddpnopt.layers import rule_for
from ddpnopt.layers.embedding import LookupRule
from ddpnopt.layers.linear import LinearRule
from ddpnopt.parameters import STANDS_FOR, identity, own, parameters
from ddpnopt.typing import Tensor


class Anatomy:
    """A model's parametrised modules: which are layers, which share parameters, who owns them all.

    Args:
        model: The network.
        trainable: Whether a parameter belongs to the optimizer.

    Attributes:
        hooked: Parametrised modules without parametrised children, by path.
        containers: The modules above them (and the model itself), by path.
        functional: Layers that run as functions, with their paths, by the identity of their weight.
        heads: Products with a weight that a module holds, outside of it, as they have been found:
            dense layers, with their names, by the identities of weight and bias.
        shared: Identities of parameters that several modules hold.
        own: Identities of the layers' parameters.
        partial: Identities of modules a call of which has been found not to run every layer's uses.
    """

    def __init__(self, model: nn.Module, trainable: Callable[[Tensor], bool]) -> None:
        self.model, self.trainable = model, trainable
        self.hooked: dict[str, nn.Module] = {}
        self.containers: dict[str, nn.Module] = {}
        self.functional: dict[int, tuple[str, nn.Module]] = {}
        self.heads: dict[tuple[int, int], tuple[str, nn.Module]] = {}
        #: Where weights are that a product may be made with: paths of modules.
        self._weights: dict[int, str] = {}
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            direct = any(p is not None for p in module._parameters.values())
            inner = any(True for m in module.children() for _ in m.parameters())
            if hasattr(module, "parametrizations"):  # computes its weights: one layer as a whole
                inside, direct, inner = (*inside, f"{name}." if name else ""), True, False
            if direct and not inner:
                self.hooked[name] = module
            if inner or module is model:
                self.containers[name] = module
        self.modules = list(model.modules())
        self._children = [tuple(module._modules.values()) for module in self.modules]
        self._inside: dict[int, list[nn.Module]] = {id(model): self.modules}
        self.shared: set[int] = set()
        self.own: set[int] = set()
        self.partial: set[int] = set()
        self._owners: set[int] = set()
        self._outer: dict[int, nn.Module] = {}
        self._state: list[tuple[int, bool]] = []

    def outdated(self) -> bool:
        """Whether modules have been added, removed or replaced."""
        for module, known in zip(self.modules, self._children, strict=True):
            now = module._modules
            if len(now) != len(known) or (now and any(map(operator.is_not, now.values(), known))):
                return True
        return False

    def inside(self, module: nn.Module) -> list[nn.Module]:
        """The modules of a container, as of the last look."""
        if id(module) not in self._inside:
            self._inside[id(module)] = list(module.modules())
        return self._inside[id(module)]

    def is_layer(self, module: nn.Module) -> bool:
        """Whether a module has a rule and a parameter to optimise, now."""
        return rule_for(module) is not None and any(map(self.trainable, parameters(module)))

    def layers(self) -> dict[str, nn.Module]:
        """All such modules."""
        return {name: module for name, module in self.named.items() if self.is_layer(module)}

    @property
    def named(self) -> dict[str, nn.Module]:
        """All modules that may be layers."""
        return {**self.hooked, **dict(self.functions.values())}

    @property
    def functions(self) -> dict[int, tuple[str, nn.Module]]:
        """All layers that run as functions, with their names, by the identity of their weight."""
        if not self.heads:
            return self.functional
        return {**self.functional, **{identity(one[1].weight): one for one in self.heads.values()}}

    def head_of(self, weight: Tensor, bias: Tensor | None) -> tuple[str, nn.Module] | None:
        """The dense layer that a product with a module's weight is, outside that module.

        Args:
            weight: (o, i).
            bias: (o,), or None.

        Returns:
            Its name and the layer; None where the weight is no embedding's or dense layer's, or the
            bias no parameter.
        """
        key = identity(weight), identity(bias)
        known = key in self.heads or key[0] not in self._weights
        if not known and isinstance(weight, nn.Parameter) and torch.is_grad_enabled():
            if bias is None or isinstance(bias, nn.Parameter):
                name = f"F.linear({self._weights[key[0]]}.weight)"
                self.heads[key] = name, dense(weight, bias)
                self._count()
        return self.heads.get(key)

    def receiving(self, weight_gradients: bool) -> list[Tensor]:
        """Parameters that a backward pass gives gradients to.

        Args:
            weight_gradients: Whether the layers' weights are among them.
        """
        held_by = [
            p
            for m in self.modules
            if m._parameters
            for p in m._parameters.values()
            if p is not None
        ]
        found = {id(p): p for p in (map(own, held_by) if STANDS_FOR else held_by)}
        used: list[Tensor] = list(filter(self.trainable, found.values()))
        if weight_gradients:
            return used
        held = {id(w) for m in self.layers().values() if (w := held_weight(m)) is not None}
        held -= self.shared
        return [p for p in used if id(p) not in held]

    def refresh(self) -> None:
        """Look at the parameters again: some may be frozen, or swapped for others."""
        state = [
            (identity(p) if STANDS_FOR else id(p), p.requires_grad)
            for module in self.modules
            if module._parameters
            for p in module._parameters.values()
            if p is not None
        ]
        if state != self._state:
            self._find_functional()
            self._count()
            layers = self.layers().values()
            wanted = {id(self._outer.get(id(m), m)) for m in layers}
            self._owners = {id(m) for m in self.modules if wanted <= {id(c) for c in m.modules()}}
            self._state = state

    def _count(self) -> None:
        """Which parameters are layers', and which are several layers'."""
        modules = [*self.hooked.values(), *(module for _, module in self.heads.values())]
        uses = Counter(id(p) for module in modules for p in parameters(module))
        self.shared = {identity for identity, n in uses.items() if n > 1}
        self.own = {id(p) for m in self.layers().values() for p in parameters(m)}

    def _find_functional(self) -> None:
        """Their weights may have been swapped for others."""
        self.functional, self._outer, self.heads = {}, {}, {}
        self._weights = {
            identity(module._parameters.get("weight")): path
            for path, module in self.hooked.items()
            if isinstance(rule := rule_for(module), LookupRule) or type(rule) is LinearRule
        }
        for path, outer in self.containers.items():
            for name, module in parts(outer).items():
                self.functional[identity(module.weight)] = (f"{path}.{name}".lstrip("."), module)
                self._outer[id(module)] = outer

    def owns_all(self, module: nn.Module) -> bool:
        """Whether a module contains every layer, as of the last `refresh`, in one call."""
        return id(module) in self._owners and id(module) not in self.partial


def held_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight whose gradient the layer's rule makes unnecessary, if there is one."""
    rule = rule_for(module)
    return module._parameters.get("weight") if rule is not None and rule.holds_weight else None


def apart_bias(module: nn.Module) -> nn.Parameter | None:
    """The bias whose gradient is found apart from the weight's, if there is one."""
    rule = rule_for(module)
    return module._parameters.get("bias") if rule is not None and rule.bias_apart else None
