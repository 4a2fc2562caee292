# SPDX-License-Identifier: MIT
"""What the open loop does to p.grad at the ends of a backward pass.

In one process; what several ranks have to sum for it is in `distributed.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ddpnopt.checks import usable
from ddpnopt.dtensors import local
from ddpnopt.errors import INTERRUPTED, NonFiniteError, UnsupportedModelError
from ddpnopt.front import corrections
from ddpnopt.gradients import added
from ddpnopt.report import StepReport
from ddpnopt.reporting import report
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.engine import Engine


def keep(engine: Engine) -> None:
    """Keep what p.grad holds already, so that a pass's own gradient can be told from it."""
    engine.host.begin()
    engine.base = {p: p.grad.clone() for p in engine.parameters() if p.grad is not None}
    if not any(bool(local(g).any()) for g in engine.base.values()):
        engine.base, engine.carried = {}, {}


@dataclass(frozen=True, eq=False)
class Reweighing:
    """What a backward pass adds to p.grad.

    Attributes:
        found: d - gbar by parameter.
        kept: What M was fed with besides p.grad (None for nothing), of parameters whose borrowed
            optimizer asks for the plain gradient, too.
        report: The record of the step that is prepared.
    """

    found: Mapping[Tensor, Tensor]
    kept: Mapping[Tensor, Tensor | None]
    report: StepReport

    @staticmethod
    def of(engine: Engine, step: Step, found: Mapping[Tensor, Tensor]) -> Reweighing:
        """By a step and what it adds."""
        kept = {p: step.extra.get(p) for p in found if step.borrowed.needs_plain(p)}
        made = report(engine.options, step, "open_loop", skipped=engine.skipped)
        return Reweighing(found, kept, made)


def reweigh(engine: Engine, trajectories: list[Trajectory]) -> None:
    """Write the re-weighted gradients to p.grad, or leave it plain.

    Args:
        engine: Its backward pass is over.
        trajectories: The passes that it came through.
    """
    if not trajectories or not all(map(usable, trajectories)):
        return
    trajectories[0].error = RuntimeError(INTERRUPTED)
    try:
        shortcut = engine.shortcut
        find = partial(reweighing, engine) if shortcut is None else shortcut.reweigh
        write(engine, find(trajectories))
        trajectories[0].error = None
    except (NonFiniteError, UnsupportedModelError) as error:  # p.grad is still plain
        trajectories[0].error = error


def reweighing(engine: Engine, trajectories: list[Trajectory]) -> Reweighing:
    """What is to be added to p.grad."""
    step = engine.new_step(trajectories, engine.rescale, 1.0)
    return Reweighing.of(engine, step, corrections(step))


def write(engine: Engine, made: Reweighing) -> None:
    """Make p.grad the re-weighted gradient."""
    for p, correction in made.found.items():
        assert p.grad is not None
        p.grad.add_(correction)
        if p in made.kept:
            before, extra = engine.carried.get(p, (None, None))
            engine.carried[p] = added(before, correction), added(extra, made.kept[p])
    engine.open_report = made.report
