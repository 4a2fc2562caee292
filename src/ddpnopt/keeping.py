# SPDX-License-Identifier: MIT
"""What a forward pass puts on its modules for its later layers: masks, features, buffers.

Accumulated passes are run again side by side, layer by layer: each is to find its own there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

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
