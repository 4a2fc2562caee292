# SPDX-License-Identifier: MIT
"""Layers that never run as modules: their weights go to functions.

`nn.MultiheadAttention` hands its weights to one function, inside which they are two ordinary dense
layers with attention between them. That function is run with its calls in sight, and a dense
layer is known by its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.typing import Tensor

#: Functions made of calls that matter; torch shows them as one call.
COMPOSITE = frozenset({F.multi_head_attention_forward})
#: Functions of two matrices that multiply them.
PRODUCTS = frozenset(
    {torch.matmul, torch.mm, *(getattr(torch.Tensor, n) for n in ("matmul", "mm"))}
)
PRODUCTS |= {torch.Tensor.__matmul__}


class Layers(Protocol):
    """What is done where a layer runs."""

    def begin(self, name: str, module: nn.Module, x: Tensor) -> None:
        """It is reached."""

    def end(self, name: str, module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        """It has computed h; returns h, or what takes its place."""


def parts(module: nn.Module) -> dict[str, nn.Module]:
    """The dense layers inside a module that runs them through functions, by name.

    Args:
        module: Any module.
    """
    if type(module) is not nn.MultiheadAttention or module.in_proj_weight is None:
        return {}
    inward = dense(module.in_proj_weight, module.in_proj_bias)
    return {"in_proj": inward, "out_proj": module.out_proj}


def dense(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A dense layer with these parameters."""
    layer = nn.Linear(1, 1, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def product(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """What a dense layer's function is given, (x, weight, bias); None for other functions.

    A product with the transpose of a tensor is one, too.
    """
    if func is F.linear:
        given = [*args, *(kwargs[key] for key in ("input", "weight", "bias") if key in kwargs)]
        return given[0], given[1], given[2] if len(given) > 2 else None
    if func not in PRODUCTS or len(args) != 2 or not isinstance(args[1], Tensor):
        return None
    base, other = args[1]._base, args[1]
    if base is None or base.dim() != 2 or other.dim() != 2:
        return None
    turned = other.shape == base.shape[::-1] and other.stride() == base.stride()[::-1]
    return (args[0], base, None) if turned and other.numel() == base.numel() else None


@cache
def unfolded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A composite function whose own calls a mode sees, one by one."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
