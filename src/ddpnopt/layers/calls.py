# SPDX-License-Identifier: MIT
"""Which rule serves a call of a module, and why none does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ddpnopt.arguments import tensors_of
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.registry import FALLBACK, registered


def reason_against(module: nn.Module, given: Sequence[object], outputs: int | None = None) -> str:
    """Why a module called with these arguments has no rule; empty if it has one.

    Args:
        module: The module.
        given: Its arguments.
        outputs: How many tensors it returned; None before it has.
    """
    return rule_of_call(module, given, outputs)[1]


def rule_of_call(
    module: nn.Module,
    given: Sequence[object],
    outputs: int | None = None,
    inputs: int | None = None,
) -> tuple[LayerRule | None, str]:
    """The rule of a module called with these arguments; or None, and why it has none.

    Args:
        module: The module.
        given: Its arguments.
        outputs: How many tensors it returned; None before it has.
        inputs: How many tensors the arguments are, where that is known.
    """
    rule = registered(module) or FALLBACK
    inputs = len(tensors_of(given)) if inputs is None else inputs
    reason = _refusal(rule, module, given, inputs, outputs)
    return (None, reason) if reason else (rule, "")


def _refusal(
    rule: LayerRule,
    module: nn.Module,
    given: Sequence[object],
    inputs: int,
    outputs: int | None,
) -> str:
    kind = type(module).__name__
    if reason := rule.refusal(module):
        return reason
    for p in module._parameters.values():
        if p is not None and p.numel() == 0:
            return f"{kind} has a width of 0"
    if inputs not in rule.arguments:
        known = " or ".join(map(str, rule.arguments))
        return f"{kind} was called with {inputs} tensors, and its rule takes {known}"
    if outputs is not None and outputs not in rule.results:
        known = " or ".join(map(str, rule.results))
        return f"{kind} returned {outputs} tensors, and its rule describes {known}"
    return rule.call_refusal(module, given)
