# SPDX-License-Identifier: MIT
"""Records nominal passes: states, gradients and the call that made them.

A trajectory belongs to the output that receives gradients: during the forward pass only the
recorder holds it, afterwards only the autograd graph does (through the tensor hooks), and once a
gradient has arrived the recorder takes it until the step. It holds detached aliases alone; a hook
closure over its own graph would be a cycle that can't be collected.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ddpnopt.arrivals import Arrivals, gradient_at_boundary, gradient_at_h, gradient_at_x
from ddpnopt.certify import doubt
from ddpnopt.inert import Anchor, Hook, probes, probing
from ddpnopt.layers import FALLBACK, reason_against, rule_for, rule_of_call
from ddpnopt.parameters import parameters
from ddpnopt.replay import Call
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.structure import FROZEN, Anatomy, Ledger, boundary, held_weight, mixes, mixing_start
from ddpnopt.typing import Tensor

#: The first passes of each structure are probed for mixing, each at another sample, and then
#: one in so many.
PROBES, PROBE_EVERY = 3, 64


class Recorder:
    """Hooks on one model.

    Args:
        model: The network.
        trainable: Tells whether a parameter belongs to the optimizer.
        refresh: Called before a pass, so that swapped parameters are known.
        closed_loop: Record the calls, for the rollout.
        state_gradients: The rollout needs the gradients at the states.
        links: Edges of the graph are needed when the output's gradient arrives.
        weight_gradients: False: the layers' weights get no gradient.
        arrivals: Where the gradients go.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Callable[[Tensor], bool],
        refresh: Callable[[], None],
        closed_loop: bool,
        state_gradients: bool,
        links: bool,
        weight_gradients: bool,
        arrivals: Arrivals,
    ) -> None:
        self.model, self.trainable, self.refresh = model, trainable, refresh
        self.closed_loop, self.state_gradients, self.links = closed_loop, state_gradients, links
        self.weight_gradients, self.arrivals = weight_gradients, arrivals
        self.paused = False
        self.passes = 0
        self._open: Trajectory | None = None
        self._depth: list[nn.Module] = []
        self._ledger = Ledger(set())
        self._link: Link | None = None
        self._last: Tensor | None = None
        self._held: dict[str, nn.Parameter] = {}
        self._newest: weakref.ref[Trajectory] | None = None
        self._doubts: dict[tuple[Any, ...], str] = {}
        self._mixing: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.anatomy = Anatomy(model, trainable)
        self._attach()
        weakref.finalize(self, _remove, self._handles)

    # Structure of the model -----------------------------------------------------------------

    def _attach(self) -> None:
        for name, module in self.anatomy.containers.items():
            pre = module.register_forward_pre_hook(
                Hook(self, "_enter", name), prepend=True, with_kwargs=True
            )
            post = module.register_forward_hook(
                Hook(self, "_leave", name), with_kwargs=True, always_call=True
            )
            self._handles += [pre, post]
        for name, module in self.anatomy.hooked.items():
            hook = Hook(self, "_record", name)
            self._handles.append(
                module.register_forward_hook(
                    hook, prepend=True, with_kwargs=True, always_call=not self.weight_gradients
                )
            )
            if not self.weight_gradients and rule_for(module) is not None:
                self._handles.append(
                    module.register_forward_pre_hook(Hook(self, "_hold", name), with_kwargs=True)
                )

    def detach(self) -> None:
        """Remove every hook and forget everything recorded."""
        _remove(self._handles)
        self.arrivals.drop()

    @property
    def latest(self) -> Trajectory | None:
        """The last pass, while its graph lives."""
        return self._newest() if self._newest is not None else None

    # Forward pass ---------------------------------------------------------------------------

    def _recording(self) -> bool:
        return (
            torch.is_grad_enabled()
            and not self.paused
            and not probes.running
            and torch._C._current_graph_task_id() == -1  # recomputation inside a backward pass
        )

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is called: begin a trajectory, or take this call as the deeper owner."""
        if not self._recording():
            return
        if module in self._depth:  # an interrupted call never left
            self._depth.clear()
        if not self._depth:
            self._look_again()
        if not self.anatomy.owns_all(module):
            return
        if self._open is None or not self._depth:
            self._begin(owned=True)
        assert self._open is not None
        self._depth.append(module)
        if self.closed_loop and not any(s.rule for s in self._open.stages):
            inside = self.anatomy.inside(module)
            self._open.call = Call.capture(name, module, args, kwargs, inside)

    def _look_again(self) -> None:
        """Parameters may have been swapped or frozen, layers replaced, since the last pass."""
        self.refresh()
        if self.anatomy.outdated():
            _remove(self._handles)
            self.anatomy = Anatomy(self.model, self.trainable)
            self._attach()
        self.anatomy.refresh()

    def _begin(self, owned: bool) -> None:
        self.arrivals.drop_stale()
        self._open = Trajectory(owned=owned, to_verify=self.passes % PROBE_EVERY == 0)
        self._ledger, self._link, self._last = Ledger(self.anatomy.own), None, None

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The owner returns: the graph alone keeps the trajectory from here on."""
        if self.paused or not self._depth or self._depth[-1] is not module:
            return
        self._depth.pop()
        if not self._depth:
            self._close(complete=output is not None)

    def _close(self, complete: bool) -> None:
        trajectory = self._open
        if complete and trajectory is not None and trajectory.stages and self._ledger.edges:
            self._classify(trajectory)
        self._newest = weakref.ref(trajectory) if trajectory is not None else None
        self._open, self._link, self._last = None, None, None
        self._ledger = Ledger(set())
        self.passes += 1

    def _classify(self, trajectory: Trajectory) -> None:
        """Which stages take the plain step: mixing of samples, shared use, no rule."""
        assert self._last is not None
        z = self._last.detach()
        trajectory.z = z[None] if trajectory.stages[-1].unbatched else z
        trajectory.refusal = self._ledger.hidden(trajectory)
        if trajectory.refusal:
            return
        self._ledger.mark(trajectory, self.anatomy.shared, self.trainable)
        trajectory.key = (
            tuple(s.name for s in trajectory.stages),
            tuple([m.training for m in self.anatomy.modules]),
        )
        self._find_mixing(trajectory)
        self._certify(trajectory)
        trajectory.refusal = self._ledger.refusal(trajectory)
        if not trajectory.refusal:
            self._watch_boundary(trajectory)

    def _watch_boundary(self, trajectory: Trajectory) -> None:
        """Weight the samples once for everything in front of a mixing, or of the last branch."""
        start = max((i + 1 for i, s in enumerate(trajectory.stages) if mixes(s)), default=0)
        start = self._ledger.rejoined(trajectory, start)
        at = trajectory.boundary = boundary(trajectory, start, self._ledger.states)
        edge = [*self._ledger.states, self._ledger.edges[-1]][at] if at else None
        if edge is not None:
            ref = weakref.ref(self.arrivals)
            hook = partial(gradient_at_boundary, ref, trajectory, edge.output_nr)
            edge.node.register_prehook(hook)

    def _certify(self, trajectory: Trajectory) -> None:
        """Take the general rule from stages that it does not describe.

        Stages outside the feedback are looked at, too: a curvature may be fed by the rule.
        """
        for index, stage in enumerate(trajectory.stages):
            if stage.rule is not FALLBACK or stage.plain == FROZEN:
                continue
            case = (trajectory.key, stage.name)
            if case not in self._doubts or trajectory.to_verify:
                h, x = self._ledger.edges[index], self._ledger.states[index]
                whole = trajectory.samples and stage.rows % trajectory.samples == 0
                samples = trajectory.samples if whole else stage.rows
                self._doubts[case] = doubt(stage, h, x, samples)
            if self._doubts[case]:
                stage.rule = None
                stage.plain = stage.plain or self._doubts[case]

    def _find_mixing(self, trajectory: Trajectory) -> None:
        """Mark the stages in front of a layer that mixes samples; they don't tell B either."""
        start, probed = self._mixing.get(trajectory.key, (0, 0))
        self._ledger.front(trajectory, start)
        if probed >= PROBES and self.passes % PROBE_EVERY:
            return
        while True:
            with probing():
                found, conclusive = mixing_start(trajectory, self._ledger.edges, probed)
            if found <= start:
                break
            start = found
            self._ledger.front(trajectory, start)  # B may have come from what is mixed
        if conclusive or start:
            self._mixing[trajectory.key] = (start, probed + 1)

    def _hold(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a layer: its weight asks for no gradient while the layer runs."""
        weight = held_weight(module)
        if (
            torch.is_grad_enabled()
            and not self.paused
            and weight is not None
            and weight.requires_grad
            and id(weight) not in self.anatomy.shared
            and self.trainable(weight)
            and not reason_against(module, (*args, *kwargs.values()))
        ):
            weight.requires_grad_(False)
            self._held[name] = weight

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After a layer: note its state, and ask for its gradients."""
        held = self._held.pop(name, None)
        if held is not None:
            held.requires_grad_(True)
        replaced = None
        unseen = held is not None and module._parameters.get("bias") is None
        if unseen and isinstance(output, Tensor):  # no parameter here would get a gradient
            output = replaced = Anchor.apply(output, self.arrivals.token)  # type: ignore[no-untyped-call]
        if not self._recording() or output is None:
            return replaced
        given = (*args, *kwargs.values())
        tensors = [output] if isinstance(output, Tensor) else tensors_of(output)
        if not any(t.requires_grad for t in tensors):
            return replaced
        orphan = self._open is None
        if orphan:
            self._begin(owned=False)
        self._add(name, module, given, tensors)
        if orphan:
            self._close(complete=True)
        return replaced

    def _add(
        self, name: str, module: nn.Module, given: tuple[Any, ...], tensors: list[Tensor]
    ) -> None:
        trajectory = self._open
        assert trajectory is not None
        inputs = [a for a in given if isinstance(a, Tensor)]
        out = tensors[0]
        rule, against = rule_of_call(module, given, len(tensors))
        aliases = tuple(t.detach() for t in inputs)
        state = rule.pack(module, aliases) if rule is not None else (*aliases, out.detach())[0]
        unbatched = rule is not None and state.dim() < rule.batched_dim(module)
        rows = out.shape[0] if out.dim() and not unbatched else 1
        versions = tuple(-1 if t.is_inference() else t._version for t in inputs)
        state = state[None] if unbatched else state
        own = parameters(module)
        weights = sum([p._version for p in own])
        stage = Stage(
            name, module, rule, state, aliases, versions, rows, unbatched, weights, plain=against
        )
        index = len(trajectory.stages)
        boundary = rule is not None and any(map(self.trainable, own))
        self._ledger.enter(index, own, inputs, tensors, boundary)
        trajectory.stages.append(stage)
        self._last, trajectory.z_version = out, -1 if out.is_inference() else out._version
        if out.requires_grad:
            self._await_gradients(trajectory, stage, inputs, out)

    def _await_gradients(
        self, trajectory: Trajectory, stage: Stage, inputs: list[Tensor], out: Tensor
    ) -> None:
        edges = tuple(get_gradient_edge(x) if x.requires_grad else None for x in inputs)
        upstream = Link(stage, edges, None, self._link) if self.links else None
        ref = weakref.ref(self.arrivals)
        hook = partial(gradient_at_h, ref, trajectory, stage, upstream)
        out.register_hook(hook)  # type: ignore[no-untyped-call]
        wanted = self.state_gradients or trajectory.to_verify
        if wanted and len(trajectory.stages) > 1 and stage.rule is not None:
            if len(inputs) > 1:
                stage.pulls = any(edges)
            elif inputs[0].requires_grad:
                inputs[0].register_hook(partial(gradient_at_x, ref, stage))  # type: ignore[no-untyped-call]
        if self.links:
            self._link = Link(stage, edges, get_gradient_edge(out), self._link)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, tuple | list) else []


def _remove(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
