# SPDX-License-Identifier: MIT
"""Gradients as they arrive at recorded stages: which of them a step may use.

A tensor hook can't tell ``loss.backward()`` from ``torch.autograd.grad``: both run it. So what a
backward pass brings is kept apart until it ends, and counts only if it has really reached p.grad.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from ddpnopt.accounts import Accounts, Part, Sources, maker, unseen
from ddpnopt.company import several
from ddpnopt.crossing import Crossing
from ddpnopt.dtensors import local
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import Probing, probes
from ddpnopt.linearise import fill_columns, pulled
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.typing import Tensor


class Arrivals:
    """Collects gradients, and owns the trajectories that have received some.

    Args:
        expected: Parameters that a backward pass of the model gives gradients to.
        adds_up: A second backward pass through the same graph adds to the first (closed loop); in
            open loop each is re-weighted by itself.
        at_output: Called with (trajectory, stage, link, G) when an output's gradient has arrived.
        at_boundary: Called with (trajectory, G, edge) at its boundary, inside the node.
        started: Called when the first gradient of a backward pass arrives.
        ended: Called with its trajectories when p.grad is complete.
    """

    def __init__(
        self,
        expected: Callable[[], list[Tensor]],
        adds_up: bool,
        at_output: Callable[[Trajectory, Stage, Link | None, Tensor], None],
        at_boundary: Callable[[Trajectory, Tensor, GradientEdge], None],
        started: Callable[[], None],
        ended: Callable[[list[Trajectory]], None],
    ) -> None:
        self.expected, self.adds_up = expected, adds_up
        self.at_output, self.at_boundary = at_output, at_boundary
        self.started, self.ended = started, ended
        self.completed: list[Trajectory] = []
        #: Gets a gradient where a model has no parameter that does (no biases, no weights').
        self.token = torch.zeros((), requires_grad=True)
        #: A backward pass of the model has been seen.
        self.reached = False
        self._accounts = Accounts()
        self._during: list[Trajectory] = []
        self._before: list[tuple[Tensor, tuple[int, int] | None]] = []
        self._task: int | None = None

    def at_h(self, trajectory: Trajectory, stage: Stage, link: Link | None, G: Tensor) -> None:
        """A gradient has arrived at a stage's output."""
        self._begin()
        if trajectory.accounted:
            self._settle(trajectory, stage, G)
        last = stage is trajectory.stages[-1] or stage in trajectory.heads
        if stage.rule is None and not last:
            return
        G = stage.arranged(G.detach())
        stage.fresh_G = G if stage.fresh_G is None else stage.fresh_G + G
        if trajectory not in self._during:
            self._during.append(trajectory)
        if last and not trajectory.refusal:
            total = stage.fresh_G
            if self.adds_up and stage.G is not None:
                total = stage.G + total
            with Probing():
                self.at_output(trajectory, stage, link, total)

    def at_x(self, stage: Stage, G: Tensor) -> None:
        """A gradient has arrived at a stage's state."""
        G = stage.arranged(G.detach())
        stage.fresh_g_x = G if stage.fresh_g_x is None else stage.fresh_g_x + G

    def at_crossing(
        self, trajectory: Trajectory | None, one: Crossing, sources: Sources | None, G: Tensor
    ) -> None:
        """A gradient has arrived at one use of a tensor."""
        if not one.wanted and sources is None:
            return
        self._begin()
        G = G.detach()
        if one.wanted:
            one.fresh_g = G if one.fresh_g is None else one.fresh_g + G
        if trajectory is not None and trajectory.accounted and sources is not None:
            self._settle(trajectory, one, G)
            node, number = torch._C._current_autograd_node().next_functions[0]
            assert node is not None
            self._accounts.add(GradientEdge(node, number), G, sources)

    def _settle(self, trajectory: Trajectory, part: Part, G: Tensor) -> None:
        """On a pass that is looked at: does what is known account for a gradient?"""
        if not trajectory.accounted or trajectory.unaccounted or unseen(trajectory, part):
            return
        if not self._accounts.settles(part, G.detach()):
            trajectory.unaccounted = maker(trajectory, part)

    def at_boundary_state(self, trajectory: Trajectory, output: int, G: Tensor) -> None:
        """A gradient has arrived at the state in front of which samples are weighted once."""
        if trajectory in self._during and trajectory.pending is not None:
            # The running node itself: a hook that held its own node could never be collected.
            edge = GradientEdge(torch._C._current_autograd_node(), output)
            with Probing():
                self.at_boundary(trajectory, G.detach(), edge)

    def _begin(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        self.drop_stale()
        self._discard()  # of a backward pass that failed half-way
        self._accounts.clear()
        self._before = [(p, _identity(p)) for p in (*self.expected(), self.token)]
        self.started()
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_ended, weakref.ref(self), several()))

    def end(self) -> None:
        """The backward pass is over: keep what it brought if it changed any p.grad."""
        self._task = None
        self._accounts.clear()
        changed = any(_identity(p) != before for p, before in self._before)
        self._before = []
        self.token.grad = None
        if not changed:
            self._discard()
            return
        during, self._during = self._during, []
        self.reached = self.reached or bool(during)
        for trajectory in during:
            self._keep(trajectory)
            if trajectory not in self.completed:
                self.completed.append(trajectory)
        self.ended(during)

    def _keep(self, trajectory: Trajectory) -> None:
        if trajectory.pending is not None:
            trajectory.cost, trajectory.error = trajectory.pending
            trajectory.pending = None
        for stage, head in trajectory.heads.items():
            if head.crossing is not None:
                head.crossing.fresh_g = stage.fresh_G
        if trajectory.columns:
            fill_columns(trajectory)
        if trajectory.columns and len(trajectory.arrived) > 1 and trajectory in self.completed:
            trajectory.error = UnsupportedModelError(
                "several backward passes through the outputs of one pass: with this value function "
                "add the losses and call backward once, or use value='moreau'"
            )
        trajectory.columns = 0
        if not self.adds_up:
            trajectory.arrived = {}
        if trajectory.fresh_front is not None:
            before = trajectory.front if self.adds_up else None
            trajectory.front, trajectory.fresh_front = trajectory.fresh_front.plus(before), None
        for stage in trajectory.stages:
            add = self.adds_up
            if not add:  # what this pass has not reached is not its business
                stage.G = stage.g_x = stage.Z_h = stage.Z_x = stage.J = None
            if stage.fresh_G is not None:
                stage.G = stage.G + stage.fresh_G if add and stage.G is not None else stage.fresh_G
            if stage.fresh_g_x is not None:
                known = stage.g_x if add else None
                stage.g_x = stage.fresh_g_x if known is None else known + stage.fresh_g_x
            if stage.pulls and stage.G is not None:
                stage.g_x = pulled(stage, stage.G[None])[0]
            for name, columns in stage.fresh_Z.items():
                setattr(stage, name, columns)
            stage.fresh_G, stage.fresh_g_x, stage.fresh_Z = None, None, {}
        for one in trajectory.crossings:
            one.keep(self.adds_up)

    def _discard(self) -> None:
        for trajectory in self._during:
            trajectory.pending = trajectory.fresh_front = trajectory.unaccounted = None
            trajectory.arrived, trajectory.columns = {}, 0
            for stage in trajectory.stages:
                stage.fresh_G, stage.fresh_g_x, stage.fresh_Z = None, None, {}
            for one in trajectory.crossings:
                one.drop()
        self._during = []

    def drop(self) -> None:
        """The gradients have been used or cleared; the graphs may live on and bring new ones."""
        for trajectory in self.completed:
            trajectory.forget_gradients()
        self.completed = []

    def drop_stale(self) -> None:
        """Drop trajectories whose gradients were thrown away (a skipped step, model.zero_grad)."""
        if not self.completed:
            return
        parameters = self.expected()
        if parameters and not any(
            p.grad is not None and (p.grad.is_sparse or bool(local(p.grad).any()))
            for p in parameters
        ):
            self.drop()


def _identity(p: Tensor) -> tuple[int, int] | None:
    return None if p.grad is None else (id(p.grad), local(p.grad)._version)


def counts() -> bool:
    """Whether a gradient hook runs for the user's own first-order backward pass.

    With create_graph the gradient is itself part of a loss: not the one to step on.
    """
    return not probes.running and not torch.is_grad_enabled()


def _sparse(module: nn.Module) -> bool:
    """Whether a layer's gradients may be sparse; modules are slow to tell what they do not have."""
    known = "sparse" in vars(module) or hasattr(type(module), "sparse")
    return known and bool(module.sparse)


def gradient_at_h(
    ref: weakref.ref[Arrivals], trajectory: Trajectory, stage: Stage, link: Link | None, G: Tensor
) -> Tensor | None:
    """Hook of a stage's output; what it returns is the gradient that the stage works on."""
    arrivals = ref()
    if arrivals is not None and counts():
        arrivals.at_h(trajectory, stage, link, G)
        if _sparse(stage.module):
            return G.clone()  # p.grad shares its memory, and is scaled in place by whoever clips
    return None


def gradient_at_x(ref: weakref.ref[Arrivals], stage: Stage, G: Tensor) -> None:
    """Hook of one of a stage's inputs."""
    arrivals = ref()
    if arrivals is not None and counts():
        arrivals.at_x(stage, G)


def gradient_at_crossing(
    ref: weakref.ref[Arrivals],
    trajectory: weakref.ref[Trajectory],
    one: Crossing,
    sources: Sources | None,
    G: Tensor,
) -> None:
    """Hook of one use of a tensor that crosses a cut."""
    arrivals = ref()
    if arrivals is not None and counts():
        arrivals.at_crossing(trajectory(), one, sources, G)


def gradient_at_boundary(
    ref: weakref.ref[Arrivals], trajectory: Trajectory, output: int, gradients: tuple[Any, ...]
) -> None:
    """Hook of the node that made the boundary state."""
    arrivals = ref()
    if arrivals is not None and counts() and gradients[output] is not None:
        arrivals.at_boundary_state(trajectory, output, gradients[output])


def _ended(ref: weakref.ref[Arrivals], again: bool) -> None:
    arrivals = ref()
    if again:  # behind the callbacks in which data parallelism finishes its reductions
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_ended, ref, False))
    elif arrivals is not None:
        arrivals.end()
