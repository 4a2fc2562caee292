# SPDX-License-Identifier: MIT
"""A step from its passes to its report, all or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ddpnopt.checks import check_gradients, check_states, check_update
from ddpnopt.distributed import agree
from ddpnopt.front import averaged, merged, remember
from ddpnopt.notices import CLIPPED_BIASES, FACTORISED_AGAIN
from ddpnopt.plain import plain_updates
from ddpnopt.report import StepReport
from ddpnopt.reporting import outcome
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.undoing import insist

if TYPE_CHECKING:
    from ddpnopt.engine import Engine


def take(
    engine: Engine,
    trajectories: list[Trajectory],
    rescale: float = 1.0,
    closure: Callable[[], float] | None = None,
    intact: bool = False,
) -> StepReport:
    """Take one step on these passes; raises before anything is changed, or puts it back.

    Args:
        engine: The optimizer's.
        trajectories: Recorded passes whose gradients have arrived.
        rescale: r, what p.grad has been multiplied by since.
        closure: What the step was called with.
        intact: States and weights are known to be those of the passes.
    """
    ranks = engine.company.ranks
    step = engine.new_step(trajectories, rescale / ranks.size, rescale / ranks.size)
    step.closure = closure
    held = not engine.options.weight_gradients
    sizes = check_gradients(step.borrowed, trajectories, engine.names, held)
    step.norms = {} if engine.in_backward else sizes
    in_feedback = agree(engine, trajectories, engine.usable(trajectories), sizes)
    if in_feedback and not intact:
        check_states(trajectories, engine.options.closed_loop)
    if rescale != 1.0 and held and in_feedback:
        engine.notices.say(CLIPPED_BIASES)
    undo = _undoing(engine, step)

    def conclude() -> None:
        engine.host.commit(step.borrowed)
        engine.rescale = rescale
        engine.finish()

    try:
        if in_feedback and not engine.in_backward:
            step.build()
        fronts = [t.front for t in trajectories if t.front is not None and in_feedback]
        front, known = averaged(merged(fronts), ranks), engine.in_backward
        length = plain_updates(step, engine.parameters(), engine.carried, front, rescale, known)
        if step.layers:
            assert engine.recorder is not None
            engine.method(engine.recorder, step, trajectories)
        check_update(step.borrowed, engine.names)
        if step.borrowed.factorised_again:
            engine.notices.say(FACTORISED_AGAIN)
        remember(step, fronts, length)
        told = engine.open_report if in_feedback and engine.in_backward else None
        active = in_feedback and bool(step.layers or fronts or engine.in_backward)
        made = outcome(engine.options, step, active, told, rescale, engine.skipped)
        ranks.meet()
    except BaseException:
        insist(undo)
        raise
    insist(conclude)
    return made


def _undoing(engine: Engine, step: Step) -> Callable[[], None]:
    """What puts everything back as it is now."""
    running, sketch = dict(engine.running), engine.sketch.get_state()

    def undo() -> None:
        if engine.recorder is not None:
            engine.recorder.undoing.run()
        step.borrowed.rollback()
        engine.running = running
        engine.sketch.set_state(sketch)

    return undo
