# SPDX-License-Identifier: MIT
"""A layer's parameters, looked up at each use: FSDP and others swap them."""

from __future__ import annotations

from torch import nn


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What ``module.named_parameters()`` gives, without a generator where nothing is nested."""
    if not module._modules:
        found = [(name, p) for name, p in module._parameters.items() if p is not None]
        if len({id(p) for _, p in found}) == len(found):
            return found
    return list(module.named_parameters())


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters alone."""
    return [p for _, p in named_parameters(module)]
