# SPDX-License-Identifier: MIT
"""A module's own forward, as a function of its parameters and without anyone's hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.func import functional_call

from ddpnopt.typing import Tensor


class _Bare(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


def own_parameters(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The module's parameters, in the dtype of the state: the gradients are to have it, too."""
    return {
        name: p.to(x.dtype) if x.is_floating_point() else p for name, p in module.named_parameters()
    }


def called(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's forward at other parameters."""
    h: Tensor = functional_call(_Bare(module), {f"module.{n}": p for n, p in params.items()}, (x,))
    return h
