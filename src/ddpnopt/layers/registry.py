# SPDX-License-Identifier: MIT
"""Which rule serves a module: by its type, or the general one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from ddpnopt.layers.base import LayerRule


class _General(LayerRule):
    """The complete rule itself, for modules of any type."""

    general = True

    def refusal(self, module: nn.Module) -> str:
        """Fused recurrent layers: their states can't be reached."""
        if not isinstance(module, nn.RNNBase):
            return ""
        cell = {"LSTM": "LSTMCell", "GRU": "GRUCell"}.get(module.mode, "RNNCell")
        return (
            f"the fused {type(module).__name__} hides the states between its time steps: it takes "
            f"the borrowed optimizer's step, or is weighted; unroll nn.{cell} for feedback"
        )


#: By type, or by qualified name where the library must not import the type's package.
RULES: dict[type[nn.Module] | str, LayerRule] = {}
#: Serves every type that is not in RULES, after a check against autograd on its first pass.
FALLBACK: LayerRule = _General()
R = TypeVar("R", bound=type[LayerRule])


def register(*module_types: type[nn.Module] | str) -> Callable[[R], R]:
    """Class decorator: the rule serves modules of ``module_types``.

    A type may be given by its qualified name, as "transformers.pytorch_utils.Conv1D": then nothing
    is imported for it.
    """

    def add(rule: R) -> R:
        RULES.update({module_type: rule() for module_type in module_types})
        return rule

    return add


def registered(module: nn.Module) -> LayerRule | None:
    """The rule of a module's type, or None.

    A subclass counts as its base only if it neither changes ``forward`` nor computes its weights
    (parametrisations, weight norm): the rule would describe another function.
    """
    kind, own = type(module), vars(module)
    if "forward" in own or "parametrizations" in module._modules:
        return None
    for module_type in kind.__mro__:
        rule = RULES.get(module_type)
        if rule is None:
            rule = RULES.get(f"{module_type.__module__}.{module_type.__qualname__}")
        if rule is None or kind.forward is not getattr(module_type, "forward", None):
            continue
        if not own.keys().isdisjoint(rule.parameters):
            continue
        others = module._parameters.keys() - rule.parameters
        if others and any(module._parameters[name] is not None for name in others):
            continue
        return rule
    return None


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that serves a module as it is now: its type's, or the fallback; None if refused."""
    rule = registered(module) or FALLBACK
    return None if rule.refusal(module) else rule
