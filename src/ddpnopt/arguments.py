# SPDX-License-Identifier: MIT
"""What modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution

from ddpnopt.modes import rebuilt
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


def fields_of(value: object) -> dict[str, Any]:
    """What a dataclass, a namespace or a distribution holds; nothing of other values."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name, None) for one in fields(value)}
    return dict(vars(value)) if isinstance(value, SimpleNamespace | Distribution) else {}


def with_fields(value: Any, held: Mapping[str, Any]) -> Any:
    """A copy of such an object that holds these."""
    made = copy(value)
    for name, one in held.items():
        object.__setattr__(made, name, one)  # it may be frozen
    return made


def tensors_of(value: object) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, tuple | list):
        value = list(fields_of(value).values())
    found: list[Tensor] = []
    for one in value:
        if isinstance(one, Tensor):
            found.append(one)
        else:
            found += tensors_of(one)
    return found


def frozen(value: Any, watched: list[tuple[Tensor, int]]) -> Any:
    """Arguments as detached aliases; tensors and their versions are added to ``watched``."""
    if isinstance(value, Tensor):
        alias = value.detach()
        if not alias.is_inference():
            watched.append((alias, alias._version))
            if value.requires_grad and value.is_leaf:  # the model may ask
                alias.requires_grad_()
        return alias
    if isinstance(value, tuple | list):
        return rebuilt(value, [frozen(v, watched) for v in value])
    if type(value) is dict:
        return {k: frozen(v, watched) for k, v in value.items()}
    held = fields_of(value) if not isinstance(value, dict) else {}
    return with_fields(value, {k: frozen(v, watched) for k, v in held.items()}) if held else value


def untouched(value: Any) -> bool:
    """Whether a value can be shown to be as it was made."""
    if isinstance(value, Tensor):
        return not value.is_inference() and value._version == 0
    if isinstance(value, tuple):
        return all(map(untouched, value))
    return value is None or isinstance(value, str | int | float | torch.dtype | torch.device)
