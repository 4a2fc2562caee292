# SPDX-License-Identifier: MIT
"""What the open loop does to p.grad at the ends of a backward pass.

In one process; what several ranks have to sum for it is in `distributed.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ddpnopt.checks import usable
from ddpnopt.dtensors import local
from ddpnopt.errors import INTERRUPTED, NonFiniteError, UnsupportedModelError
from ddpnopt.front import corrections
from ddpnopt.gradients import added
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


def reweigh(engine: Engine, trajectories: list[Trajectory]) -> None:
    """Write the re-weighted gradients to p.grad, or leave it plain.

    Args:
        engine: Its backward pass is over.
        trajectories: The passes that it came through.
    """
    if not trajectories or not all(map(usable, trajectories)):
        return
    step = engine.new_step(trajectories, engine.rescale, 1.0)
    trajectories[0].error = RuntimeError(INTERRUPTED)
    try:
        write(engine, step, corrections(step))
        trajectories[0].error = None
    except (NonFiniteError, UnsupportedModelError) as error:  # p.grad is still plain
        trajectories[0].error = error


def write(engine: Engine, step: Step, found: Mapping[Tensor, Tensor]) -> None:
    """Make p.grad the re-weighted gradient.

    Args:
        engine: Remembers what was added, where the borrowed optimizer asks for the plain gradient.
        step: The step that is prepared.
        found: What to add, by parameter.
    """
    for p, correction in found.items():
        assert p.grad is not None
        p.grad.add_(correction)
        if step.borrowed.needs_plain(p):
            before, extra = engine.carried.get(p, (None, None))
            engine.carried[p] = added(before, correction), added(extra, step.extra.get(p))
    engine.open_report = report(engine.options, step, "open_loop", skipped=engine.skipped)
