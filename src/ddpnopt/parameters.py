# SPDX-License-Identifier: MIT
"""A layer's parameters, looked up at each use: FSDP and others swap them."""

from __future__ import annotations

from typing import Any

from torch import nn

#: What stands for a parameter while its layer runs (fully_shard), by identity: the optimizer's own.
STANDS_FOR: dict[int, nn.Parameter] = {}


def own(p: nn.Parameter) -> nn.Parameter:
    """The parameter that the optimizer has, for one that may stand for it."""
    return STANDS_FOR.get(id(p), p)


def identity(tensor: Any) -> int:
    """Of what may be a parameter, or None: that of the optimizer's own."""
    return id(STANDS_FOR.get(id(tensor), tensor))


def leaf(node: Any) -> int:
    """The identity of the parameter whose gradient a node of the graph accumulates; 0 for none."""
    variable = getattr(node, "variable", None)
    return 0 if variable is None else identity(variable)


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What ``module.named_parameters()`` gives, without a generator where nothing is nested."""
    found = None
    if not module._modules:
        found = [(name, p) for name, p in module._parameters.items() if p is not None]
        if not _distinct([p for _, p in found]):
            found = None
    found = list(module.named_parameters()) if found is None else found
    return [(name, own(p)) for name, p in found] if STANDS_FOR else found


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters alone."""
    if STANDS_FOR or module._modules:
        return [p for _, p in named_parameters(module)]
    found = [p for p in module._parameters.values() if p is not None]
    if len(found) < 2 or (len(found) == 2 and found[0] is not found[1]):
        return found
    return found if _distinct(found) else list(module.parameters())


def _distinct(found: list[nn.Parameter]) -> bool:
    return len(set(map(id, found))) == len(found)
