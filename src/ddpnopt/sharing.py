# SPDX-License-Identifier: MIT
"""Layers that are used more than once, or tied to others: one control each."""

from __future__ import annotations

from collections.abc import Sequence

from ddpnopt.layers import tied
from ddpnopt.ledger import FROZEN, SHARED
from ddpnopt.parameters import parameters
from ddpnopt.stages import Stage, Trajectory


def repeated(trajectory: Trajectory) -> None:
    """Join the executions of a layer that is used more than once, or tied to another: one control.

    Those of one module are alike but for their samples' states; those of different modules that
    hold the same weight are a tied embedding and head.
    """
    stages = [s for s in trajectory.stages if s.rule is not None and s.plain != FROZEN]
    owned = [set(map(id, parameters(stage.module))) for stage in stages]
    if len(set().union(*owned)) == sum(map(len, owned)):
        return  # nothing is used twice
    for first, *others in _together(stages, owned):
        parts = [first, *others]
        if not others or all(stage.plain for stage in parts):
            continue
        reason = SHARED if any(stage.plain for stage in parts) else ""
        if all(stage.module is first.module for stage in others):
            alike = all(
                stage.rule is first.rule
                and not stage.unbatched
                and stage.x.shape[1:] == first.x.shape[1:]
                for stage in parts
            )
            reason = reason or ("" if alike else SHARED)
        else:
            reason = reason or tied.refusal(parts)
        if not reason:
            first.repeats = others
        for stage in parts if reason else ():
            stage.plain = stage.plain or reason


def _together(stages: Sequence[Stage], owned: Sequence[set[int]]) -> list[list[Stage]]:
    """The executions of each layer, and of layers that share parameters with it, in order.

    Args:
        stages: The executions.
        owned: Identities of their parameters.
    """
    groups: list[tuple[set[int], list[Stage]]] = []
    met: set[int] = set()
    for stage, own in zip(stages, owned, strict=True):
        if met.isdisjoint(own):
            met |= own
            groups.append((own, [stage]))
            continue
        met |= own
        mine = [group for group in groups if group[0] & own]
        rest = [group for group in groups if not group[0] & own]
        ids = own.union(*(group[0] for group in mine))
        groups = [*rest, (ids, [*(one for group in mine for one in group[1]), stage])]
    return [group[1] for group in groups]
