# SPDX-License-Identifier: MIT
"""Optimizers of other packages, measured where they are installed: none of them is required."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn


def _pytorch_optimizer(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    kind = getattr(importlib.import_module("pytorch_optimizer"), name)
    made: torch.optim.Optimizer = kind(model.parameters(), lr=1e-3, **options)
    return made


def soap(model: nn.Module) -> torch.optim.Optimizer:
    """SOAP of the package `pytorch_optimizer`, eigenbases every tenth step."""
    return _pytorch_optimizer("SOAP", model, precondition_frequency=10)


def shampoo(model: nn.Module) -> torch.optim.Optimizer:
    """Scalable Shampoo of the package `pytorch_optimizer`, roots every tenth step."""
    return _pytorch_optimizer(
        "ScalableShampoo", model, start_preconditioning_step=1, preconditioning_compute_steps=10
    )


def singd(model: nn.Module) -> torch.optim.Optimizer:
    """SINGD of the package `singd`, dense factors, refreshed every step."""
    return _singd(model, 1)


def singd_every_10(model: nn.Module) -> torch.optim.Optimizer:
    """The same, refreshed every tenth step."""
    return _singd(model, 10)


def _singd(model: nn.Module, period: int) -> torch.optim.Optimizer:
    kind = importlib.import_module("singd.optim.optimizer").SINGD
    made: torch.optim.Optimizer = kind(model, lr=1e-3, T=period, structures=("dense", "dense"))
    return made
