# SPDX-License-Identifier: MIT
"""Writes the record of a step that has been taken."""

from __future__ import annotations

from dataclasses import replace

from ddpnopt.options import Options
from ddpnopt.report import LayerReport, StepReport
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step


def report(
    options: Options,
    step: Step,
    depth: str,
    rescale: float = 1.0,
    skipped: int = 0,
) -> StepReport:
    """The record of a step.

    Args:
        options: The optimizer's choices.
        step: The step.
        depth: What was really done.
        rescale: r.
        skipped: Steps skipped so far.
    """
    plain = {s.name: s.plain for t in step.trajectories for s in t.stages if s.plain}
    fronts = [t for t in step.trajectories if t.front is not None]
    costs = [t.cost.name for t in step.trajectories if t.cost is not None]
    terminal = costs[0] if costs else "unrecognised"
    return StepReport(
        depth,
        "none" if options.feedback is False else terminal,
        sum(t.samples for t in step.trajectories),
        rescale,
        tuple(step.reports),
        tuple(plain.items()),
        skipped,
        _front(fronts[0]) if fronts and options.feedback is not False else None,
    )


def outcome(
    options: Options,
    step: Step,
    active: bool,
    opened: StepReport | None,
    rescale: float,
    skipped: int,
) -> StepReport:
    """The record of a step at the depth that it had.

    Args:
        options: The optimizer's choices.
        step: The step.
        active: Some layer was in feedback.
        opened: The record that the backward pass has made, in open loop.
        rescale: r.
        skipped: How many steps have been skipped.
    """
    if opened is not None:
        return replace(opened, rescale=rescale)
    depth = options.depth if active else "off"
    if depth == "closed_loop" and any(t.call is None for t in step.trajectories):
        depth = "open_loop"  # a pass that can't be run again
    return report(options, step, depth, rescale, skipped)


def _front(trajectory: Trajectory) -> LayerReport:
    front, at = trajectory.front, trajectory.boundary
    assert front is not None
    stages = trajectory.stages
    place = f"the input of '{stages[at].name}'" if at < len(stages) else "the output"
    return LayerReport(place, front.coefficient, front.S)
