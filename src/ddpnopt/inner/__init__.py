# SPDX-License-Identifier: MIT
"""Readers of other optimizers: one class a family, registered by the optimizer's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpnopt.inner.base import Reader
from ddpnopt.inner.linear import ASGD, SGD
from ddpnopt.inner.moments import Adadelta, Adagrad, Adam, Adamax, RMSprop, _RAdam
from ddpnopt.inner.watched import Watched

__all__ = ["READERS", "Reader", "own_step", "reader_of"]

#: By the optimizer's type; subclasses count where they keep its ``step``.
READERS: dict[type[torch.optim.Optimizer], Reader] = {
    torch.optim.SGD: SGD(),
    torch.optim.ASGD: ASGD(),
    torch.optim.Adam: Adam(),
    torch.optim.AdamW: Adam(),
    torch.optim.NAdam: Adam(blank={"mu_product": 1.0}),
    torch.optim.RAdam: Adam(_RAdam),
    torch.optim.Adamax: Adamax(),
    torch.optim.RMSprop: RMSprop(),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adadelta: Adadelta(),
}
WATCHED = Watched()


def own_step(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The step of a type without the wrapper that runs hooks around it."""
    step: Any = kind.step
    while getattr(step, "hooked", False):  # a subclass is wrapped once more than its base
        step = step.__wrapped__
    found: Callable[..., Any] = step
    return found


def reader_of(optimizer: torch.optim.Optimizer) -> Reader:
    """The reader of an optimizer's type; `Watched` for types that are not known."""
    step = own_step(type(optimizer))
    for kind, reader in READERS.items():
        if isinstance(optimizer, kind) and own_step(kind) is step:
            return reader
    return WATCHED
