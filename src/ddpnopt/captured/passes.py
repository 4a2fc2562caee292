# SPDX-License-Identifier: MIT
"""What a step is given besides the optimizer: a recorded pass, as tensors and as facts."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from ddpnopt.captured.recording import reported
from ddpnopt.engine import Engine
from ddpnopt.replay import Call
from ddpnopt.stages import Trajectory
from ddpnopt.typing import Tensor


def gradients(engine: Engine) -> list[Tensor | None]:
    """What a pass has left in p.grad, and in open loop how it has come there."""
    found: list[Tensor | None] = []
    for p in engine.parameters():
        found += (p.grad, *engine.carried.get(p, (None, None)))
    return [*found, *reported(engine.open_report)]


def tensors(trajectory: Trajectory) -> list[Tensor | None]:
    """All tensors of a pass; always in the same order."""
    found: list[Tensor | None] = [trajectory.z]
    for s in trajectory.stages:
        found += (s.x, *s.inputs, s.G, s.g_x, s.Z_h, s.Z_x, s.J)
    for one in trajectory.crossings:
        found += (one.y, one.g, one.Z)
    found += [head.z for head in trajectory.heads.values()]
    cost, front = trajectory.cost, trajectory.front
    if cost is not None:
        found += (cost.w, cost.kappa, cost.excess)
    if front is not None:
        found += (front.weighted, front.coefficient, front.S, *front.corrections.values())
    if trajectory.call is not None:
        found += _given(trajectory.call)[0]
        found += [buffer for _, _, buffer in trajectory.call.buffers]
    return found


def facts(trajectory: Trajectory) -> Hashable:
    """What a step on a pass depends on besides the tensors' numbers and shapes."""
    t = trajectory
    stages = [
        (len(s.inputs), s.rows, s.unbatched, s.pulls, s.plain, s.layout, s.samples, len(s.repeats))
        for s in t.stages
    ]
    crossings = [(one.call, one.born, one.used, one.layout, one.beside) for one in t.crossings]
    front = None if t.front is None else tuple(map(id, t.front.corrections))
    cost = None if t.cost is None else (t.cost.name, t.cost.excess is None, t.cost.value is None)
    call = None if t.call is None else _facts(t.call)
    path: Hashable = None
    if t.path is not None:  # else time is only known of passes that were watched
        times = tuple([s.time for s in t.stages])
        path = times, tuple(map(_hashable, t.path.steps[: t.path.end]))
    heads = tuple([s.name for s in t.heads])
    blind = tuple([(span.born, span.used) for span in t.blind])
    own = t.key, t.samples, t.boundary, t.share, tuple(t.calls), blind
    return own, tuple(stages), tuple(crossings), front, cost, call, path, heads


def _hashable(step: tuple[Any, tuple[Any, ...]]) -> Hashable:
    """A call on the way, slices spelt out."""
    func, given = step
    if any(type(one) is slice for one in given):
        given = tuple((s.start, s.stop, s.step) if type(s) is slice else s for s in given)
    return func, given


def _facts(call: Call) -> Hashable:
    """How a call is to be run again, apart from its tensors."""
    _, others, tree = _given(call)
    autocast = tuple([(kind, *how) for kind, how in call.autocast.items()])
    return call.name, id(call.module), call.training, call.compiled, autocast, others, str(tree)


def _given(call: Call) -> tuple[list[Tensor], tuple[Any, ...], Any]:
    """A call's arguments: tensors, others, and how they are nested."""
    if len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], torch.Tensor):
        return [call.args[0]], (), None  # the usual case
    leaves, tree = tree_flatten((call.args, call.kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    others = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return given, others, tree
