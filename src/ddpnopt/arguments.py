# SPDX-License-Identifier: MIT
"""What modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from ddpnopt.typing import Tensor


def ordered(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call's arguments in the order of the module's own signature."""
    if kwargs:
        try:
            bound = _signature(type(module).forward).bind(module, *args, **kwargs)
            return (*bound.args[1:], *bound.kwargs.values())
        except (TypeError, ValueError):
            pass  # it takes anything: in the order of the call
    return (*args, *kwargs.values())


@lru_cache(maxsize=256)  # bounded: classes made in a loop are not held for ever
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, tuple | list) else []
