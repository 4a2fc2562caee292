# SPDX-License-Identifier: MIT
"""Vanilla differential dynamic programming: the batch as one augmented state, a line search.

The recursion is `value.Augmented` with the exact Q_uu of a layer's controls; a step of
Levenberg-Marquardt's M / eta keeps it positive. What is left for this file is DDP's own outer loop:
a size that fits the memory, and a feedforward that is halved until the loss has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ddpnopt.baselines.chain import ChainEngine
from ddpnopt.baselines.memory import check_memory
from ddpnopt.checks import check_usable
from ddpnopt.curvature import Curvature
from ddpnopt.cuts import hooked_outputs
from ddpnopt.errors import TerminalError
from ddpnopt.layer import Layer
from ddpnopt.notices import Notices
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.ranges import check_choice, check_number, not_negative
from ddpnopt.recognition import Terminal
from ddpnopt.replay import preserved
from ddpnopt.rollout import recurse, rollout
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.terminal import SquaredError
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor
from ddpnopt.undoing import insist
from ddpnopt.value import Augmented, Dense, LowRank
from ddpnopt.value.base import Blocks, Maps, Policy

FORMS = ("auto", "dense", "low_rank")
#: "exact": Q_uu = M / eta + f_u^T V_xx f_u; "curvature": Q_uu = M / eta.
HESSIANS = ("exact", "curvature")
NO_SEARCH = (
    "VanillaDDP: the loss is known neither from the last layer's output and its gradient nor by a "
    "closure, so steps are taken without a line search; give step(closure), or line_search=False"
)


@dataclass(eq=False)
class Scaled(Policy):
    """alpha k + K dx: the feedforward scaled, the feedback kept.

    Attributes:
        inner: k + K dx.
        alpha: Step length.
    """

    inner: Policy
    alpha: float

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors of alpha k + K dx, less g."""
        forward, g = self.inner(maps, None), maps.split(maps.gradient())
        both = forward if dx is None else self.inner(maps, dx)
        return [
            v + (self.alpha - 1) * (f + one) for v, f, one in zip(both, forward, g, strict=True)
        ]

    def bend(self, maps: Maps, dx: Blocks) -> Blocks | None:
        """Feedback, too."""
        return self.inner.bend(maps, dx)


@dataclass(eq=False)
class Search:
    """One sweep of vanilla DDP; a `ddpnopt.rollout.Method`.

    Attributes:
        search: Look for a step length.
        halvings: Step lengths tried: 1, 1/2, .., 2^-halvings.
        sufficient: Share of the predicted first-order decrease that must be reached (Armijo).
        memory: Bytes that a sweep may take; None: what is free.
        alpha: The last step's length; 0 where none was accepted and the weights stayed.
        rejected: Steps in which none was.
    """

    search: bool
    halvings: int
    sufficient: float
    memory: int | None
    alpha: float = 1.0
    rejected: int = 0
    notices: Notices = field(default_factory=Notices)

    def __call__(self, recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
        """Recursion, then rollouts until one is accepted."""
        value = step.settings.value
        assert isinstance(value, Augmented)
        check_memory(step, value, self.memory)
        for layer in step.layers.values():
            layer.keep_gain = True
        recurse(recorder, step, trajectories)
        policies = {name: layer.policy for name, layer in step.layers.items()}
        known = self._objective(recorder, step, trajectories)
        if known is None:
            self.alpha = 1.0
            rollout(recorder, trajectories, step.layers, step.apply)
            return
        before, after = known
        slope = self.sufficient * _slope(step)
        for halving in range(self.halvings + 1):
            alpha = 0.5**halving
            now = after(self._trial(recorder, step, trajectories, policies, alpha))
            if math.isfinite(now) and now <= before - alpha * max(slope, 0.0) and now < before:
                self.alpha = alpha
                return
            step.borrowed.restart()
            step.reports.clear()
        self.alpha, self.rejected = 0.0, self.rejected + 1

    def _trial(
        self,
        recorder: Recorder,
        step: Step,
        trajectories: Sequence[Trajectory],
        policies: dict[str, Policy | None],
        alpha: float,
    ) -> list[Tensor]:
        """Roll out with a step length; the model's new outputs, one a pass."""
        outputs: list[Tensor] = []

        def apply(layer: Layer, dx: Blocks | None) -> None:
            policy = policies[layer.name]
            assert policy is not None
            layer.policy = Scaled(policy, alpha)
            step.apply(layer, dx)

        last = trajectories[0].stages[-1].module
        with hooked_outputs(last, outputs.append):
            rollout(recorder, trajectories, step.layers, apply)
        calls = len(outputs) // len(trajectories)  # of a module that is used more than once
        if calls == 0:  # the output is made behind the last layer: the closure tells the loss
            return []
        pairs = zip(outputs[calls - 1 :: calls], trajectories, strict=True)
        return [z.reshape(t.z.shape) for z, t in pairs if t.z is not None]

    def _objective(
        self, recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]
    ) -> tuple[float, Callable[[list[Tensor]], float]] | None:
        """The loss as it is, and as a function of new outputs; None for no search."""
        if not self.search:
            return None
        costs = [t.cost if t.stages[-1].rule is not None else None for t in trajectories]
        values = [cost.value if cost is not None else None for cost in costs]
        if all(v is not None for v in values):

            def total(outputs: Sequence[Tensor]) -> float:
                terms = [v(z) for v, z in zip(values, outputs, strict=True) if v is not None]
                return float(torch.stack(terms).sum())

            return total([t.z for t in trajectories if t.z is not None]), total
        if step.closure is not None:
            loss = partial(_evaluated, step.closure, recorder, list(step.borrowed.hyper))
            return loss(), lambda _: loss()
        self.notices.say(NO_SEARCH)
        return None


def _slope(step: Step) -> float:
    """First-order decrease of the loss along the feedforward, gbar^T P d."""
    total = 0.0
    for layer in step.layers.values():
        assert layer.policy is not None
        vectors = layer.policy(layer, None)
        g = layer.split(layer.gradient())
        d = layer.weighted([one + v for one, v in zip(g, vectors, strict=True)])
        moved = layer.applied({name: d[name] for name in layer.params})
        for name, p in layer.params.items():
            if p.grad is not None:
                total += float((p.grad * moved[name]).sum())
    return total


class DDPEngine(ChainEngine):
    """Refuses what the sweep does not move."""

    title: ClassVar[str] = "vanilla DDP"

    def usable(self, trajectories: list[Trajectory]) -> bool:
        """As in DDPNOpt, but a loss that is not known is refused: there is no plain step.

        Raises:
            TerminalError: The loss is not recognised.
        """
        check_usable(trajectories)
        if all(t.cost is not None for t in trajectories):
            super().usable(trajectories)
            costs = {t.cost.name for t in trajectories if t.cost is not None}
            if self.outputs.main.terminal == "auto" and len(costs) == 1:
                # Known once, it stays so: gradients of confident samples show less and less.
                self.outputs.main.terminal = costs.pop()
            return bool(trajectories)
        raise TerminalError(
            "the loss was not recognised from the output's gradient (of a batch that can't tell, "
            "or of an unknown form), and vanilla DDP needs its Hessian: name it with terminal= "
            "('cross_entropy', 'mse', ..., MSE(...), or a callable output -> factor)"
        )


class VanillaDDP(DDPNOpt):
    """Differential dynamic programming as it is (Mayne 1966), the batch as one augmented state.

    Q_uu = M / eta + f_u^T V'_xx f_u over all of a layer's controls (with second-order dynamics
    also V'_x . f_uu), with V_xx over all samples; M / eta is Levenberg and Marquardt's term. The
    policy alpha k + K dx is rolled out with alpha = 1, 1/2, .. until the loss falls enough. The
    cost of the dense form is cubic in B X, which restricts it to small problems; with first-order
    dynamics the same step is found in terminal coordinates, cubic in B r.

    Args:
        model: A chain of layers that keep samples apart; all its trainable parameters in them.
        lr: eta, one over the damping of Levenberg and Marquardt.
        Q_uu: "exact", or "curvature": M / eta alone.
        dynamics: "first_order" (Gauss-Newton) or "second_order".
        form: "low_rank" (first-order dynamics, no Tikhonov), "dense", or "auto": the first where
            it is right.
        regularization: Tikhonov, added to the diagonal of V_xx at every state.
        line_search: False: alpha = 1 always.
        halvings: Of alpha at most; then the step is given up and counted in `rejected`.
        terminal: The loss, as in `ddpnopt.DDPNOpt`; it is evaluated from the output and its
            gradient, or by the closure given to ``step`` where that is not possible.
        curvature: M, as in `ddpnopt.DDPNOpt`.
        memory: Bytes that a sweep may take; None: what is free.
        nonfinite: "raise" or "skip" a step whose numbers are not finite.
        params: Parameter groups, as in `ddpnopt.DDPNOpt`.

    Raises:
        ValueError: An option is out of range, or options contradict each other.
        MemoryError: At a step: it would not fit; nothing was changed.
        UnsupportedModelError: At a step: a parameter is not in the chain (named).
    """

    _engine_type = DDPEngine
    _kept = (*DDPNOpt._kept, "_search")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        Q_uu: str = "exact",
        dynamics: str = "first_order",
        form: str = "auto",
        regularization: float = 0.0,
        line_search: bool = True,
        halvings: int = 10,
        terminal: Terminal | SquaredError = "auto",
        curvature: str | Curvature = "identity",
        memory: int | None = None,
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
    ) -> None:
        check_choice("VanillaDDP", "Q_uu", Q_uu, HESSIANS)
        check_choice("VanillaDDP", "form", form, FORMS)
        if isinstance(halvings, bool) or not isinstance(halvings, int) or halvings < 0:
            raise ValueError(f"halvings={halvings!r}: must be a whole number, at least 0")
        if memory is not None:
            bound = "must be positive, or None for what is free"
            check_number("", "memory", memory, lambda n: n > 0, bound)
        bound = "must not be negative"
        check_number("VanillaDDP", "regularization", regularization, not_negative, bound)
        exact = Q_uu == "exact"
        backup, fed = ("proximal", "plain") if exact else ("riccati", "value")
        simple = dynamics == "first_order" and not regularization
        if form == "low_rank" and not simple:
            raise ValueError(
                "form='low_rank': terminal coordinates have no second-order dynamics and no "
                "Tikhonov term; use form='dense'"
            )
        inner: Dense | LowRank
        if form == "dense" or not simple:
            inner = Dense(backup, exact, None, fed, regularization, dynamics)
        else:
            inner = LowRank(backup, exact, None, fed)
        self._search = Search(line_search, halvings, 1e-4, memory)
        super().__init__(
            model, lr, curvature, Augmented(inner), terminal, nonfinite=nonfinite, params=params
        )
        self.engine.method = self._search

    @property
    def alpha(self) -> float:
        """The last step's length; 0 where none was accepted."""
        return self._search.alpha

    @property
    def rejected(self) -> int:
        """Steps in which no step length was accepted; the weights stayed."""
        return self._search.rejected

    def state_dict(self) -> dict[str, Any]:
        """As in `ddpnopt.DDPNOpt`, with what the search has found and the loss once known."""
        state = super().state_dict()
        known = self.engine.outputs.main.terminal if self.options.terminal == "auto" else ""
        state["ddpnopt"]["search"] = {
            "alpha": self.alpha,
            "rejected": self.rejected,
            "terminal": known,
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: The state is another optimizer's, or of a newer format.
        """
        found = (state_dict.get("ddpnopt") or {}).get("search")
        if found is None:
            raise ValueError(
                "load_state_dict: no 'search'; expected the state_dict of a VanillaDDP"
            )
        super().load_state_dict(state_dict)
        self._search.alpha, self._search.rejected = found["alpha"], found["rejected"]
        if self.options.terminal == "auto":
            self.engine.outputs.main.terminal = found["terminal"] or "auto"


def _evaluated(closure: Callable[[], float], recorder: Recorder, parameters: list[Tensor]) -> float:
    """The closure's loss alone: gradients and recorded passes stay as they are."""
    gradients = [p.grad for p in parameters]
    completed, paused = recorder.arrivals.completed, recorder.paused

    def restore() -> None:
        recorder.arrivals.completed, recorder.paused = completed, paused
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g

    try:
        recorder.arrivals.completed, recorder.paused = [], True
        for p in parameters:  # a closure may clear gradients in place, or not at all
            p.grad = None
        with torch.enable_grad(), preserved(recorder.model):
            return float(closure())
    finally:
        insist(restore)
