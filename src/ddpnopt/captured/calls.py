# SPDX-License-Identifier: MIT
"""What a call of a captured iteration is told by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor


def kind_of(leaf: Any) -> Any:
    """What a program depends on of an argument: its value where it is no tensor."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), leaf


def copied(leaf: Any) -> Any:
    """A tensor's copy, where it has the same layout."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    copy = leaf.detach().clone()
    return copy if copy.stride() == leaf.stride() else leaf


def autocast_of(inputs: Sequence[Tensor]) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on for a batch, and to what."""
    kind = inputs[0].device.type if inputs else "cpu"
    on = torch.is_autocast_enabled(kind)
    return on, torch.get_autocast_dtype(kind) if on else None


def has_hooks(optimizer: Shell) -> bool:
    """Whether something is to be called with every step."""
    every = (optimizer, *getattr(optimizer, "optimizers", ()))
    own = any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in every)
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def first_line(error: Exception) -> str:
    """Of an error's message."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
