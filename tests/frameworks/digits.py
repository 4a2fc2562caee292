# SPDX-License-Identifier: MIT
"""A small real task, and the plain loop of torch on it that frameworks are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIZE, TRAINED = 64, 1280
Make = Callable[[nn.Module], torch.optim.Optimizer]


def digits(dtype: torch.dtype = torch.float32) -> tuple[TensorDataset, TensorDataset]:
    """1280 digits to learn from and 517 to be tested on, in the order of the file."""
    x, y = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(x / 8 - 1, dtype=dtype), torch.tensor(y)
    return (
        TensorDataset(inputs[:TRAINED], labels[:TRAINED]),
        TensorDataset(inputs[TRAINED:], labels[TRAINED:]),
    )


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10))
    return nn.Sequential(*layers).to(dtype)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def accuracy(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    x, y = digits(dtype)[1].tensors
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def plain_loop(
    make: Make,
    epochs: int = 2,
    passes: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    model: nn.Module | None = None,
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """Torch's own loop, as its documentation has it."""
    model = network(dtype) if model is None else model
    call = (lambda net, x: net(x)) if call is None else call
    optimizer = make(model)
    batches: Iterable[Any] = (
        pair for _ in range(epochs) for pair in DataLoader(digits(dtype)[0], SIZE)
    )
    for number, (x, y) in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(call(model, x), y)
        (loss / passes).backward()
        if number % passes:
            continue
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model
