# SPDX-License-Identifier: MIT
"""What happens between a recorded pass and new weights; the optimizer's shell is `optimizer.py`.

The engine holds what outlives a step: the recorder, the recognised loss, the running coupling, and
in open loop what has been added to p.grad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from ddpnopt.arrivals import Arrivals
from ddpnopt.binding import Unbound
from ddpnopt.chains import verify_once
from ddpnopt.checks import (
    check_backward,
    takes_part,
)
from ddpnopt.company import Company
from ddpnopt.distributed import backward_ended
from ddpnopt.errors import NonFiniteError, TerminalError, UnsupportedModelError
from ddpnopt.front import weigh
from ddpnopt.gradients import Consumed, Fingerprint, finite
from ddpnopt.host import Host
from ddpnopt.inert import weakly
from ddpnopt.linearise import linearise
from ddpnopt.notices import Notices
from ddpnopt.options import Options
from ddpnopt.outputs import Outputs
from ddpnopt.ranks import Ranks
from ddpnopt.report import Report, StepReport
from ddpnopt.reweighting import keep, reweigh
from ddpnopt.rollout import Method, policies
from ddpnopt.scaling import expected_rescaling
from ddpnopt.shortcuts import Shortcut
from ddpnopt.spread import check_parts
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.step import Settings, Step
from ddpnopt.taking import take
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor


class Engine:
    """Feedback for one optimizer.

    Attributes:
        method: How a step moves the layers in feedback.
        graphs: The method needs no chain of layers.
        writes: In open loop, backward writes the re-weighted gradients to p.grad.
        waiting: The model is not known yet: nothing is recorded.
        needs_cost: The method uses the terminal cost: a step whose loss is not recognised is the
            borrowed optimizer's, and the front is weighted by it.
        alone: What needs all samples in one process, if anything does.

    Args:
        model: The network.
        options: The optimizer's choices.
        host: The optimizer itself, seen from here.
        company: The ranks to train with.
    """

    graphs = writes = True
    alone = ""

    def __init__(
        self, model: nn.Module, options: Options, host: Host, company: Company | None = None
    ) -> None:
        self.model, self.options, self.host = model, options, host
        self.company = company or Company()
        self.method: Method = policies
        self.needs_cost, self.diagnose, self.skipped, self.rescale = True, False, 0, 1.0
        early = self.writes and options.weight_gradients
        self.in_backward = early and options.feedback == "open_loop"
        self.copies: dict[int, Tensor] = {}
        self.running: dict[str, float | Tensor] = {}
        self.sketch = torch.Generator().manual_seed(0)
        self.carried: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
        self.base: dict[Tensor, Tensor] = {}
        self.open_report: StepReport | None = None
        self.notices = Notices()
        self.outputs = Outputs(options.terminal, self.notices)
        self.fingerprint, self.consumed = Fingerprint(), Consumed()
        self.recorder: Recorder | None = None
        self.shortcut: Shortcut | None = None
        self.waiting = isinstance(model, Unbound)
        self.attach()

    def bind(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model is known, by a call of it that has begun with these positional arguments."""
        self.model, known = model, self.recorder
        self.attach()
        self.waiting = False  # not before: an interrupted call is begun again by the next
        if self.recorder is not None and known is None:
            self.recorder.join(args)

    @property
    def records(self) -> bool:
        """Passes have to be recorded, for feedback or for some group's curvature."""
        feedback = self.options.feedback is not False
        return feedback or self.host.squares() or self.company.averages

    def attach(self) -> None:
        """Record passes, where feedback or some group's curvature needs them."""
        self.refresh()
        self.company.look(self.model)
        check_parts(self)
        if self.recorder is not None or isinstance(self.model, Unbound) or not self.records:
            return
        feedback = self.options.feedback is not False
        gradient = self.options.value.linearization == "gradient"
        arrivals = Arrivals(
            weakly(self.expected),
            adds_up=not self.in_backward,
            at_output=weakly(self._at_output),
            at_boundary=weakly(self._at_boundary),
            started=weakly(self._backward_started),
            ended=weakly(self._backward_ended),
        )
        self.recorder = Recorder(
            self.model,
            weakly(self.trainable),
            weakly(self._begin_pass),
            closed_loop=self.options.closed_loop,
            state_gradients=self.options.closed_loop and gradient,
            links=feedback and not gradient,
            weight_gradients=self.options.weight_gradients or not feedback,
            graphs=self.graphs and self.options.value.graphs,
            logits=self.options.logits,
            arrivals=arrivals,
            shortcut=weakly(self._shortcut),
        )

    def _shortcut(self) -> Shortcut | None:
        return self.shortcut

    def expected(self) -> list[Tensor]:
        """Parameters that a backward pass gives gradients to."""
        if self.recorder is None:
            return [p for p in self.parameters() if p.requires_grad]
        return self.recorder.anatomy.receiving(self.recorder.weight_gradients)

    def refresh(self) -> None:
        """Parameters are looked up anew for each pass and step: FSDP and others swap them."""
        self._members = {id(p) for p in self.parameters()}
        if len(self.copies) > len(self._members):
            self.copies.clear()

    def _begin_pass(self) -> None:
        self.refresh()
        self.company.look(self.model)

    def trainable(self, p: Tensor) -> bool:
        """Whether a parameter is the optimizer's and not frozen."""
        return p.requires_grad and id(p) in self._members

    def parameters(self) -> list[Tensor]:
        """All parameters of the groups."""
        return self.host.parameters()

    def names(self) -> dict[Tensor, str]:
        """Paths of the model's parameters."""
        return {p: name for name, p in self.model.named_parameters()}

    def detach(self) -> None:
        """Remove every hook."""
        self.company.leave()
        self.waiting = False
        if self.recorder is not None:
            self.recorder.detach()
            self.recorder = None

    def forget(self) -> None:
        """The gradients are cleared: so are the passes they came from."""
        self.carried = {}
        self.forget_passes()

    def forget_passes(self) -> None:
        """Drop the recorded passes."""
        if self.recorder is not None:
            self.recorder.forget()
        if self.shortcut is not None:
            self.shortcut.forget()

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, as tensors and plain values."""
        return {
            "rescale": self.rescale,
            "coupling": {name: float(rho) for name, rho in self.running.items()},
            "recogniser": self.outputs.state_dict(),
            "sketch": self.sketch.get_state(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.rescale, self.skipped = state["rescale"], state["skipped"]
        self.running = dict(state["coupling"])
        self.outputs.load_state_dict(state["recogniser"])
        self.sketch.set_state(state["sketch"].cpu())
        self.refresh()

    def _at_output(
        self, trajectory: Trajectory, stage: Stage, link: Link | None, G: Tensor
    ) -> None:
        """An output's gradient has arrived: which loss was it, and what has to be linearised."""
        main = stage is trajectory.stages[-1]
        trajectory.pending = trajectory.pending or (None, None)
        asked = self.options.feedback and self.needs_cost
        if not asked or trajectory.z is None or G.numel() == 0:
            return  # nobody asks, or an empty batch, which tells nothing
        with torch.no_grad():
            if not finite(G):
                return  # GradScaler probes with overflows: the last decision stands
            try:
                found, cost = self.outputs.cost(trajectory, stage, G)
            except TerminalError as error:
                trajectory.pending = (None, error)
                return
        if trajectory.pending[1] is None:
            trajectory.pending = (cost, None)
        if found is not None and self.in_backward:
            self.rescale = expected_rescaling(self.fingerprint, self.rescale, found, trajectory)
        if found is not None and not all(s.plain for s in trajectory.stages):
            z = trajectory.z if main else trajectory.heads[stage].z
            linearise(trajectory, z, link, found, self.options.value)

    def _at_boundary(self, trajectory: Trajectory, G: Tensor, edge: GradientEdge) -> None:
        """The gradient has arrived where the samples' mixing begins: weight them there."""
        assert trajectory.pending is not None
        cost = trajectory.pending[0]
        if cost is None or trajectory.refusal or not finite(G):
            return
        try:
            step = self.new_step([trajectory], self.rescale, 1.0, early=True)
            trajectory.fresh_front = weigh(trajectory, G, edge, cost, step, self.parameters())
        except (NonFiniteError, UnsupportedModelError) as error:
            trajectory.pending = (cost, error)

    def _backward_started(self) -> None:
        """What p.grad holds already is told from this pass's own gradient."""
        self.outputs.begin()
        if self.in_backward or self.company.averages:
            keep(self)

    @torch.no_grad()
    def _backward_ended(self, trajectories: list[Trajectory]) -> None:
        """Verify the chain; average p.grad over the ranks; in open loop, re-weight it."""
        with self.host.whole(self):
            for trajectory in trajectories if self.options.feedback is not False else ():
                verify_once(trajectory, self.recorder is not None and self.recorder.state_gradients)
            if self.company.ranks.several:
                backward_ended(self, trajectories)
            elif self.in_backward:
                reweigh(self, trajectories)
        self.base = {}
        self.fingerprint.take(self.parameters())
        self.outputs.settle()

    # Step -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """After a step, whether taken or skipped."""
        self.forget_passes()
        self.consumed.mark(self.parameters())
        self.fingerprint.clear()
        self.carried, self.open_report = {}, None

    def step(self, closure: Callable[[], float] | None = None) -> Report:
        """Take one step, ``closure`` called; raises before anything is changed, or puts it back."""
        trajectories = list(self.recorder.arrivals.completed) if self.recorder else []
        parameters = [p for p in self.parameters() if p.requires_grad]
        fresh = self.consumed.fresh(parameters) or not parameters
        check_backward(fresh, trajectories, self.recorder if self.options.feedback else None)
        rescale = self.fingerprint.rescaling()
        if self.shortcut is not None and closure is None and rescale == 1.0:
            return self.shortcut.take(trajectories)
        return take(self, trajectories, rescale, closure)

    def new_step(
        self,
        trajectories: list[Trajectory],
        rescale: float,
        correction_scale: float,
        early: bool = False,
    ) -> Step:
        """A step of these passes, with nothing in it yet."""
        value, weights = self.options.value, self.options.weight_gradients
        sketch = self.sketch if self.options.gram == "sketch" else None
        settings = Settings(value, rescale, correction_scale, weights, sketch, self.diagnose, early)
        borrowed = self.host.borrow(self.copies)
        # Inside the backward pass the ranks are not at one place: each has its own samples.
        ranks = Ranks() if early else self.company.ranks
        return Step(
            trajectories, borrowed, settings, self.trainable, self.running, self.base, ranks=ranks
        )

    def usable(self, trajectories: list[Trajectory]) -> bool:
        """Whether all passes take part in feedback; raises where they must not be ignored."""
        return takes_part(self, trajectories)
