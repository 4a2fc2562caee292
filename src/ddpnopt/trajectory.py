# SPDX-License-Identifier: MIT
"""Records nominal passes: states, gradients and the call that made them.

A trajectory belongs to the output that receives gradients: during the forward pass only the
recorder holds it, afterwards only the autograd graph does (through the tensor hooks), and once a
gradient has arrived the recorder takes it until the step. It holds detached aliases alone; a hook
closure over its own graph would be a cycle that can't be collected.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpnopt.arguments import ordered, tensors_of
from ddpnopt.arrivals import Arrivals, gradient_at_h, gradient_at_x
from ddpnopt.classification import Classifier
from ddpnopt.holding import Holding, seen
from ddpnopt.inert import Hook, edge_of, probes, removed
from ddpnopt.layers import reason_against, rule_for
from ddpnopt.ledger import Ledger
from ddpnopt.modes import quiet
from ddpnopt.parameters import parameters
from ddpnopt.recording import Executed
from ddpnopt.replay import Call
from ddpnopt.shortcuts import Shortcut
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.structure import Anatomy, apart_bias, held_weight
from ddpnopt.typing import Tensor
from ddpnopt.undoing import Undoing
from ddpnopt.watching import Watching


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
        graphs: The value function allows branches and layers that are used more than once.
        logits: The loss is of logits, or is to be recognised.
        arrivals: Where the gradients go.
        shortcut: What may run passes, or ask for their outputs.
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
        graphs: bool,
        logits: bool,
        arrivals: Arrivals,
        shortcut: Callable[[], Shortcut | None],
    ) -> None:
        self.model, self.trainable, self.refresh = model, trainable, refresh
        self.closed_loop, self.state_gradients, self.links = closed_loop, state_gradients, links
        self.weight_gradients, self.arrivals, self.logits = weight_gradients, arrivals, logits
        self.shortcut = shortcut
        self.classifier = Classifier(arrivals, trainable, graphs, closed_loop)
        self.paused, self._joined_late = False, False
        #: What puts back what the step now does to the model.
        self.undoing = Undoing()
        self.watching = Watching(closed_loop, graphs)
        self._open: Trajectory | None = None
        self._depth: list[nn.Module] = []
        #: The call that would be run again has returned.
        self._left = False
        self._ledger = Ledger(set())
        self._link: Link | None = None
        self._last: Tensor | None = None
        self._holding = Holding()
        self._newest: weakref.ref[Trajectory] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.anatomy = Anatomy(model, trainable)
        self._attach()
        weakref.finalize(self, removed, self._handles)
        weakref.finalize(self, self.watching.end)

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
            begin, hook = Hook(self, "_reach", name), Hook(self, "_record", name)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
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
        removed(self._handles)
        self.forget()

    def forget(self) -> None:
        """Drop the recorded passes, and what an interrupted one has left."""
        self.watching.end()
        self._holding.release()
        self.arrivals.drop()

    def pause(self) -> Undoing:
        """See nothing until what is returned is left, or undone."""
        undoing = self.undoing = Undoing()
        undoing.add(partial(setattr, self, "paused", False))
        self.paused = True
        return undoing

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
        # An interrupted call never left (torch runs no hook for Ctrl-C), or did so half-way.
        if module in self._depth or (self._open is not None and not self._depth):
            self._depth.clear()
            self._close(complete=False)
        if not self._recording():
            return
        if not self._depth:
            if (shortcut := self.shortcut()) and shortcut.enters(module, args, kwargs):
                return
            self._holding.release()
            self._look_again()
        if not self.anatomy.owns_all(module):
            return
        if self._open is None or not self._depth:
            self._begin(owned=True)
            assert self._open is not None
            self.watching.begin(self._open, self.arrivals, self, self.anatomy)
        assert self._open is not None
        self._depth.append(module)
        if self.closed_loop and not any(s.rule for s in self._open.stages):
            inside = self.anatomy.inside(module)
            with quiet(self.watching.watch):
                self._open.call = Call.capture(name, module, args, kwargs, inside)
            self._open.calls.clear()
            self._left = False
            if self.watching.watch is not None:
                self.watching.watch.restart()

    def join(self, args: tuple[Any, ...]) -> None:
        """A call of the model began before there were hooks; its kwargs are seen at its end."""
        self._enter("", self.model, args, {})
        self._joined_late = True

    def _look_again(self) -> None:
        """Parameters may have been swapped or frozen, layers replaced, since the last pass."""
        self.refresh()
        if self.anatomy.outdated():
            removed(self._handles)
            self.anatomy = Anatomy(self.model, self.trainable)
            self._attach()
            self.watching.forget()
        self.anatomy.refresh()

    def _begin(self, owned: bool) -> None:
        self.arrivals.drop_stale()
        self._open = Trajectory(owned=owned, to_verify=self.classifier.due())
        self._ledger, self._link, self._last = Ledger(self.anatomy.own), None, None
        self._left = self._joined_late = False

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The owner returns: the graph alone keeps the trajectory from here on."""
        replaced = None
        if self.paused or not self._depth or self._depth[-1] is not module:
            return None
        self._depth.pop()
        call = self._open.call if self._open is not None else None
        if call is not None and call.module is module and not self._left:
            self._left = True
            call.ends()
            self.watching.call_ends()
        if self._depth:
            return None
        late, self._joined_late, begun = self._joined_late, False, self._open
        if late and kwargs and begun and begun.call and begun.call.module is module:
            begun.call = begun.call.completed(kwargs)
        if output is not None and self._open is not None:
            self._find_output(output)
        if self.watching.watch is not None and output is not None:
            with quiet(self.watching.watch):
                used = self.watching.watch.leave(output)
            output, replaced = used, used if used is not output else None
        self._close(complete=output is not None)
        shortcut = self.shortcut()
        return shortcut.leaves(module, output, replaced) if shortcut else replaced

    def _find_output(self, output: Any) -> None:
        """The loss sees what the model returns, where that is not the last layer's output."""
        outputs = [t for t in tensors_of(output) if t.grad_fn is not None]
        with quiet(self.watching.watch):
            late = self._ledger.returned(outputs, self.classifier.graphs, self.logits)
            if late is not None:
                self._add("", Executed(nn.Identity(), (late,), (late,), None, ""), late)

    def begin(self, name: str, module: nn.Module, x: Tensor) -> None:
        """A layer that runs as a function is reached."""
        self._reach(name, module, (x,), {})
        if not self.weight_gradients:
            self._hold(name, module, (x,), {})

    def end(self, name: str, module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        """It has computed h."""
        replaced = self._record(name, module, (x,), {}, h)
        return h if replaced is None else replaced

    def _close(self, complete: bool) -> None:
        watch, trajectory = self.watching.stop(), self._open
        if complete and trajectory is not None and trajectory.stages and self._ledger.edges:
            assert self._last is not None
            self.watching.look(trajectory, watch, self._ledger, self.model, self.anatomy)
            z = self._last.detach()
            self.classifier.classify(trajectory, z, self._ledger, self.anatomy, watch)
        self._newest = weakref.ref(trajectory) if trajectory is not None else None
        self._open, self._link, self._last = None, None, None
        self._ledger = Ledger(set())
        self.classifier.passes += 1
        self.watching.end()

    def _reach(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a layer: a time step begins, unless it runs without gradients (a target)."""
        counts = self._recording()
        if self._open is None or (torch.is_grad_enabled() and not counts):
            return  # not a call of this pass
        if self.closed_loop and not self._left:
            self._open.calls.append((name, counts))
        if self.watching.watch is not None:
            self.watching.watch.time += counts
            self.watching.watch.inside = True

    def _hold(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a layer: its weight asks for no gradient while the layer runs."""
        if not torch.is_grad_enabled() or self.paused:
            return
        weight, bias = (
            p if p is not None and p.requires_grad and self._only(p) else None
            for p in (held_weight(module), apart_bias(module))
        )
        if weight is not None and not reason_against(module, ordered(module, args, kwargs)):
            self._holding.hold(name, *((weight,) if bias is None else (weight, bias)))

    def _only(self, p: Tensor) -> bool:
        """Whether a parameter is one layer's, and the optimizer's."""
        return id(p) not in self.anatomy.shared and self.trainable(p)

    def _record(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After a layer: note its state, and ask for its gradients."""
        if self.watching.watch is not None:
            self.watching.watch.inside = False
        with quiet(self.watching.watch):
            replaced: Any = None
            held = self._holding.let_go(name)
            if held and isinstance(output, Tensor):
                replaced = seen(output, module, held, self.arrivals.token, self.watching.watch)
                output = output if replaced is None else replaced
            outputs = tensors_of(output)
            if not self._recording() or not any([t.requires_grad for t in outputs]):
                return replaced
            orphan = self._open is None
            if orphan:
                self._begin(owned=False)
            call = Executed.of(module, ordered(module, args, kwargs), outputs)
            out = call.outputs[0]
            if call.rule is not None and len(call.outputs) > 1:
                out, replaced = call.joined(self.watching.watch)
            self._add(name, call, out)
            if orphan:
                self._close(complete=True)
            return replaced

    def _add(self, name: str, call: Executed, out: Tensor) -> None:
        trajectory = self._open
        assert trajectory is not None
        if self._left and call.rule is not None and trajectory.call is not None:
            self.anatomy.partial.add(id(trajectory.call.module))
            trajectory.cut_short = trajectory.call.name
            trajectory.call = None
        own, watch = parameters(call.module), self.watching.watch
        stage = call.stage(name, own, out, watch.time if watch is not None else 0)
        boundary = call.rule is not None and any(map(self.trainable, own))
        opaque = call.rule is None or call.rule.general
        self._ledger.enter(len(trajectory.stages), own, call.inputs, out, boundary, opaque)
        trajectory.stages.append(stage)
        self._last, trajectory.z_version = out, -1 if out.is_inference() else out._version
        if out.requires_grad:
            self._await_gradients(trajectory, stage, call.inputs, out)

    def _await_gradients(
        self, trajectory: Trajectory, stage: Stage, inputs: Sequence[Tensor], out: Tensor
    ) -> None:
        first, end = self._ledger.states[-1], self._ledger.edges[-1]
        edges = (first, *map(edge_of, inputs[1:])) if inputs else ()
        watch, upstream = self.watching.watch, None
        if watch is not None and end is not None:
            watch.goes_in(stage, end, stage.time)
        if self.links:
            taps = watch.fresh_taps() if watch is not None else ()
            upstream = Link(stage, edges, None, self._link, out.output_nr, taps)
            self._link = Link(stage, edges, end, self._link, out.output_nr, taps)
        ref = weakref.ref(self.arrivals)
        out.register_hook(partial(gradient_at_h, ref, trajectory, stage, upstream))  # type: ignore[no-untyped-call]
        wanted = (self.state_gradients or trajectory.to_verify) and not self.watching.branching
        if wanted and len(trajectory.stages) > 1 and stage.rule is not None:
            if len(inputs) > 1 or stage.x.numel() != inputs[0].numel():
                stage.pulls = any(edges)
            elif first is not None:
                inputs[0].register_hook(partial(gradient_at_x, ref, stage))  # type: ignore[no-untyped-call]
