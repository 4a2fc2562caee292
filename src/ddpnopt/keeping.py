# SPDX-License-Identifier: MIT
"""What a forward pass puts on its modules for its later layers: masks, features, buffers.

Accumulated passes are run again side by side, layer by layer: each is to find its own there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ddpnopt.typing import Tensor

#: What every module has: nothing that a forward pass puts there.
_COMMON = frozenset(vars(nn.Module()))
#: Where attributes lie, and which they are.
Kept = list[tuple[dict[str, Any], dict[str, Any]]]


def kept_on(modules: Sequence[nn.Module]) -> Kept:
    """The attributes and buffers of modules, as they are now.

    Torch's own modules put nothing there in a forward pass, and write to their buffers in place.
    """
    found: Kept = []
    for module in modules:
        if type(module).__module__.startswith("torch.nn."):
            continue
        own = {name: one for name, one in vars(module).items() if name not in _COMMON}
        found.append((vars(module), own))
        found.append((module._buffers, dict(module._buffers)))
    return found


def buffers_of(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer with the module and the name that hold it."""
    return [
        (module, name, buffer)
        for module in modules
        if module._buffers
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def untrained(modules: Iterable[nn.Module]) -> list[tuple[Tensor, int]]:
    """Parameters that ask for no gradient, with their versions."""
    return [
        (p, p._version)
        for module in modules
        for p in module._parameters.values()
        if p is not None and not p.requires_grad and not p.is_inference()
    ]
