# SPDX-License-Identifier: MIT
"""Learning rates over the steps of a training, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import lr_scheduler

from ddpnopt.experiments.names import lookup

Scheduler = lr_scheduler.LRScheduler
CONSTANT = "constant"


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _linear(optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    top = [float(group["lr"]) for group in optimizer.param_groups]
    # The momentum stays: not every optimizer has one.
    return lr_scheduler.OneCycleLR(optimizer, top, total_steps=steps, cycle_momentum=False)


#: Schedules by name: (optimizer, steps of the whole training) -> scheduler, stepped every step.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], Scheduler] | None] = {
    CONSTANT: None,
    "cosine": _cosine,
    "linear": _linear,
    "one-cycle": _one_cycle,
}
SCHEDULE_HELP = "Learning rate over the steps: " + ", ".join(SCHEDULES)


def fits_any_length(name: str) -> bool:
    """Whether the rates are the same however long the training is going to be."""
    return SCHEDULES.get(name) is None


def build_scheduler(name: str, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler | None:
    """Build the schedule `name`.

    Args:
        name: A name in `SCHEDULES`. "cosine" and "linear" fall from the optimizer's rate to 0,
            "one-cycle" rises to it first.
        optimizer: Whose rates change.
        steps: Steps of the whole training.

    Returns:
        The scheduler, to be stepped after every step; None for a constant rate.

    Raises:
        ValueError: Unknown name (the message lists the known ones).
    """
    build = lookup(SCHEDULES, name, "schedule")
    return None if build is None else build(optimizer, steps)
