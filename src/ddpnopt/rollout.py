# SPDX-License-Identifier: MIT
"""The feedback rollout (Algorithm 3, step 4): one more forward pass that writes the weights.

Each layer, before it computes, sees how far the earlier layers' updates have moved its state,
dx = x^ - x, and takes its own step u* = u + du(dx).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ddpnopt.changes import Changed
from ddpnopt.crossing import Moved, Predicted
from ddpnopt.cuts import cut, hook_replays
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.layer import Layer
from ddpnopt.replay import ALONE, Replay, interleave, preserve
from ddpnopt.retrace import Retrace
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.step import Step
from ddpnopt.trajectory import Recorder
from ddpnopt.two_bucket import TwoBuckets
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks

#: Moves the layers in feedback: (recorder, step with its layers built, its passes).
Method = Callable[[Recorder, Step, Sequence[Trajectory]], None]


def policies(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
    """DDPNOpt's method: Bellman's recursion, then each layer's policy in the rollout."""
    recurse(recorder, step, trajectories)
    step.announce()
    known = all(t.call is not None for t in trajectories)
    if known and step.ranks.two_bucket:
        buckets = TwoBuckets(step)
        rollout(recorder, trajectories, step.layers, buckets.move)
        buckets.settle()
    elif known:
        rollout(recorder, trajectories, step.layers, step.apply)
    else:  # open loop
        for layer in step.layers.values():
            step.apply(layer, None)
    step.settle()


def recurse(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
    """Bellman's recursion; for second-order dynamics with the functions between the layers.

    Those are taken, and differentiated, at the weights of the pass: layers outside the feedback
    have moved already.
    """
    if not step.settings.value.segments:
        step.recurse()
        return
    with step.borrowed.undone():
        for trajectory in trajectories:
            if [stage.name for stage in trajectory.active] != list(step.layers):
                raise UnsupportedModelError(
                    "second-order dynamics need a chain of layers and the closed loop: use "
                    "feedback=True, or dynamics='first_order'"
                )
            for one in cut(trajectory, recorder.model, outputs=True):
                step.layers[one.stage.name].segments.append(one)
        step.recurse()
    for layer in step.layers.values():
        layer.segments.clear()  # with their graphs


def rollout(
    recorder: Recorder,
    trajectories: Sequence[Trajectory],
    layers: dict[str, Layer],
    apply: Callable[[Layer, Blocks | None], None],
) -> None:
    """Run the recorded calls again with the new weights.

    Args:
        recorder: Sees the layers being reached.
        trajectories: The passes, all of one structure.
        layers: The layers that take part, in execution order.
        apply: Updates a layer, given dx (None where its state can't have moved).

    Raises:
        UnsupportedModelError: The calls can't be repeated, or take another path.
    """
    for trajectory in trajectories:
        trajectory.again().check_inputs()
    order = list(layers)
    reached: list[str] = []
    moved = [
        Moved(t.crossings, t.samples, t.blind) if t.path is not None else None for t in trajectories
    ]

    def meet(name: str, states: dict[int, Tensor]) -> None:
        if len(reached) >= len(order) or order[len(reached)] != name:
            raise _other_path(order, [*reached, name])
        reached.append(name)
        with torch.no_grad():  # the model may be run under gradients
            _move(layers[name], list(states.values()), moved, apply)

    with ALONE, recorder.pause() as undoing:
        preserve(undoing, recorder.anatomy.modules)
        current: list[Replay] = []
        named = recorder.anatomy.named
        modules = {name: named[name] for name in order}
        hook_replays(
            undoing, modules, lambda name, x: current[0].reach(name, x), lambda: current[0].trace
        )
        replays = [
            _replay(trajectory, one, layers, recorder.anatomy.functions)
            for trajectory, one in zip(trajectories, moved, strict=True)
        ]
        for one in replays:
            if one.trace is not None:
                undoing.add(one.trace.end)
        if len(replays) == 1:
            replays[0].arrive = lambda name, x: meet(name, {0: x})
            current.append(replays[0])
            current[0].run_in_place()
        else:
            interleave(dict(enumerate(replays)), meet, current)
    if reached != order:
        raise _other_path(order, reached)


def _move(
    layer: Layer,
    states: Sequence[Tensor],
    moved: Sequence[Moved | None],
    apply: Callable[[Layer, Blocks | None], None],
) -> None:
    """All passes have reached a layer, in these states: it moves."""
    dx = _changes(layer.blocks, states, moved)
    if not any(stage.repeats for stage in layer.blocks):
        apply(layer, dx)
        return
    before = {name: p.clone() for name, p in layer.params.items()}
    apply(layer, dx)
    _foresee(layer, {name: p - before[name] for name, p in layer.params.items()}, moved)


def _replay(
    trajectory: Trajectory,
    moved: Moved | None,
    layers: Mapping[str, Layer],
    functional: Mapping[int, tuple[str, nn.Module]],
) -> Replay:
    """A pass to be run again; watched if it is known by what crosses its cuts."""
    again = {n for n, layer in layers.items() if any(s.repeats for s in layer.blocks)}
    calls = [one for one in trajectory.calls if one[0] in layers]
    replay = Replay(trajectory.again(), again=frozenset(again), order=iter(calls))
    if trajectory.path is not None:
        replay.grad = trajectory.path.differentiates
    if moved is not None and trajectory.path is not None:
        replay.trace = Retrace(moved, trajectory.path)
        replay.trace.functional = {k: one for k, one in functional.items() if one[0] in layers}
        replay.trace.layers = weakref.proxy(replay)  # which holds the trace
    return replay


def _foresee(layer: Layer, change: Mapping[str, Tensor], moved: Sequence[Moved | None]) -> None:
    """A layer that runs again has moved: until then its weights are part of the state."""
    for stage, samples, one in zip(layer.blocks, layer.counts, moved, strict=True):
        for later in stage.repeats:
            if one is not None and later.G is not None:
                q = layer.predicted(later, samples, change)
                one.foresee(later.time, q)


def _changes(
    blocks: Sequence[Stage], states: Sequence[Tensor], moved: Sequence[Moved | None]
) -> Blocks | None:
    """dx of each pass; None where no layer lies below (q = 0)."""
    known = [one.q(s.time) for one, s in zip(moved, blocks, strict=True) if one is not None]
    if known:
        parts = [q for q in known if q is not None]
        return Predicted(parts) if len(parts) == len(blocks) else None
    now: list[Tensor] = []
    for stage, x in zip(blocks, states, strict=True):
        x = stage.arranged(x)
        if x.shape != stage.x.shape:
            raise UnsupportedModelError(
                f"'{stage.name}' received {tuple(x.shape)} in the rollout but "
                f"{tuple(stage.x.shape)} before: the model takes another path when run again; "
                "use feedback='open_loop'"
            )
        if stage.g_x is None and stage.Z_x is None and stage.J is None:
            return None
        now.append(x)
    return Changed(now, [stage.x for stage in blocks])


def _other_path(order: list[str], reached: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model took another path when run again: expected layers "
        f"{', '.join(order)}, reached {', '.join(reached) or 'none'}; use feedback='open_loop'"
    )
