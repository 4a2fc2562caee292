# SPDX-License-Identifier: MIT
"""A layer's parameters, looked up at each use: FSDP and others swap them."""

from __future__ import annotations

from torch import nn


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What ``module.named_parameters()`` gives, without a generator where nothing is nested."""
    if not module._modules:
        found = [(name, p) for name, p in module._parameters.items() if p is not None]
        if _distinct([p for _, p in found]):
            return found
    return list(module.named_parameters())


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters alone."""
    if not module._modules:
        found = [p for p in module._parameters.values() if p is not None]
        if _distinct(found):
            return found
    return list(module.parameters())


def _distinct(found: list[nn.Parameter]) -> bool:
    if len(found) == 2:
        return found[0] is not found[1]
    return len(found) < 2 or len(set(map(id, found))) == len(found)
