# SPDX-License-Identifier: MIT
"""Layers that never run as modules: their weights go to functions.

`nn.MultiheadAttention` hands its weights to one function, inside which they are two ordinary dense
layers with attention between them. That function is run with its calls in sight, and a dense
layer is known by its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Protocol

import torch.nn.functional as F
from torch import nn

from ddpnopt.typing import Tensor

#: Functions made of calls that matter; torch shows them as one call.
COMPOSITE = frozenset({F.multi_head_attention_forward})


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
    inward = nn.Linear(1, 1, device="meta")
    inward.weight = module.in_proj_weight
    inward.bias = module.in_proj_bias
    return {"in_proj": inward, "out_proj": module.out_proj}


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
