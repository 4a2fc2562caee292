# SPDX-License-Identifier: MIT
"""The extended method of successive approximations (Li, Chen, Tai and E 2018), in the plain loop.

A sweep: the recorded forward pass has the states x_t, the backward pass the costates p_t, and every
layer maximises its own augmented Hamiltonian over its weights, with the states and costates held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ddpnopt.baselines.chain import ChainEngine
from ddpnopt.borrowed import Borrowed
from ddpnopt.cuts import paths, segment
from ddpnopt.errors import NonFiniteError
from ddpnopt.layer import Layer
from ddpnopt.linearise import cast_state, pulled
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.ranges import check_number, count, finite
from ddpnopt.report import LayerReport
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.step import Step
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor

Controls = Mapping[str, Tensor]
#: A solve ends where it changes weights by less.
TOLERANCE = 1e-9


@dataclass(eq=False)
class _Dynamics:
    """x' = f(x, u) of one layer in one pass, up to the next layer's state.

    Attributes:
        trajectory: The pass.
        model: The recorded model, whose weights are those of the pass.
        at: Index among the layers in feedback.
        path: The modules up to the next layer, where they are known (`ddpnopt.cuts.paths`).
        p_end: Costate at the next layer's state (at the output of the last layer).
        dtype: What the sums are made in.
        nominal: The next layer's state and this one's costate at the weights of the pass, which
            the residuals compare with; None before the first evaluation.
    """

    trajectory: Trajectory
    model: nn.Module
    at: int
    path: Sequence[nn.Module] | None
    p_end: Tensor
    dtype: torch.dtype
    nominal: tuple[Tensor, Tensor | None] | None = None

    @property
    def stage(self) -> Stage:
        """The layer's record."""
        return self.trajectory.active[self.at]

    @cached_property
    def x(self) -> Tensor:
        """The layer's state, a leaf."""
        x = cast_state(self.stage.x.detach(), self.dtype)
        return x.clone().requires_grad_(x.is_floating_point())

    def end(self, u: Controls) -> Tensor:
        """f(x, u)."""
        stage = self.stage
        assert stage.rule is not None and stage.G is not None
        h = stage.rule.output(stage.module, self.x, u).to(stage.G.dtype)
        h = h[0] if stage.unbatched else h
        if self.path is None:
            end = segment(self.trajectory, self.model, self.at, h)
        else:
            end = h.clone()  # a module may work in place
            for module in self.path:
                end = module(end)
        return end.to(self.dtype).reshape(self.p_end.shape)

    def costate(self, along: Tensor) -> Tensor | None:
        """d/dx of the sum of p' . f, on the graph of the controls; None at indices."""
        if not self.x.requires_grad:
            return None
        (p,) = torch.autograd.grad(along, self.x, create_graph=True)
        return p


@dataclass(eq=False)
class _Hamiltonian:
    """A layer's augmented Hamiltonian as a function of its controls.

    Attributes:
        passes: The layer in each pass.
        samples: B of all passes together.
        rho: Weight of the residuals.
        decay: Weight decay by parameter name.
    """

    passes: Sequence[_Dynamics]
    samples: int
    rho: float
    decay: Mapping[str, float]

    def __call__(self, u: Controls) -> Tensor:
        """H~(u); the first u are the nominal ones."""
        total = torch.stack([self._along(one, u) for one in self.passes]).sum() / self.samples
        for name, decay in self.decay.items():
            if decay:
                total = total - decay / 2 * u[name].square().sum()
        return total

    def _along(self, one: _Dynamics, u: Controls) -> Tensor:
        """Sum over a pass's samples."""
        now = one.end(u)
        along = (one.p_end * now).sum()
        if not self.rho:
            return along
        slope = one.costate(along)
        if one.nominal is None:
            one.nominal = now.detach(), None if slope is None else slope.detach()
        end, p = one.nominal
        residual = (end - now).square().sum()
        if slope is not None and p is not None:
            residual = residual + (p - slope).square().sum()
        return along - self.rho / 2 * residual


@torch.enable_grad()
def _maximise(
    H: _Hamiltonian, u: dict[str, Tensor], iterations: int
) -> tuple[float, float, dict[str, Tensor]]:
    """H~ before and after, and the controls found; the old ones where none are better."""
    leaves = list(u.values())
    found: list[tuple[float, dict[str, Tensor]]] = []

    def closure() -> Tensor:
        value = H(u)
        gradients = torch.autograd.grad(-value, leaves, allow_unused=True)
        for leaf, g in zip(leaves, gradients, strict=True):
            leaf.grad = None if g is None else g.contiguous()  # L-BFGS makes one vector of them
        if not found or found[-1][0] < value.item() < math.inf:
            found.append((value.item(), {name: one.detach().clone() for name, one in u.items()}))
        return -value.detach()

    first = [closure()]
    before = found[0][0]
    solver = torch.optim.LBFGS(
        leaves,
        lr=1.0,
        max_iter=iterations,
        tolerance_change=TOLERANCE / max(1.0, H.rho),  # steps are as short as 1 / rho
        line_search_fn="strong_wolfe",
    )
    if math.isfinite(before):
        solver.step(lambda: first.pop() if first else closure())  # type: ignore[no-untyped-call]
    return before, *found[-1]


@dataclass(eq=False)
class Sweep:
    """One sweep of E-MSA; a `ddpnopt.rollout.Method`.

    Attributes:
        rho: Weight of the residuals.
        iterations: L-BFGS iterations of each layer.
        hamiltonians: H~ of each layer before and after, of the last sweep.
    """

    rho: float
    iterations: int
    hamiltonians: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
        """Solve every layer at the nominal weights, then write all of them."""
        check_hyperparameters(step.borrowed, step.layers.values())
        samples = sum(t.samples for t in trajectories)
        scale = samples * step.settings.rescale
        found: dict[nn.Parameter, Tensor] = {}
        hamiltonians: dict[str, tuple[float, float]] = {}
        known = [paths(t) for t in trajectories]
        for at, layer in enumerate(step.layers.values()):
            lr = float(step.borrowed.hyper[next(iter(layer.params.values()))].lr)
            if lr == 0:
                continue
            u = {
                name: p.detach().to(layer.dtype, copy=True).requires_grad_()
                for name, p in layer.params.items()
            }
            decay = {n: step.borrowed.hyper[p].weight_decay for n, p in layer.params.items()}
            passes = [
                _Dynamics(
                    t, recorder.model, at, way[at], _end_costate(t, at, scale, layer), layer.dtype
                )
                for t, way in zip(trajectories, known, strict=True)
            ]
            before, after, new = _maximise(
                _Hamiltonian(passes, samples, self.rho / lr, decay), u, self.iterations
            )
            if not math.isfinite(before):
                raise NonFiniteError(
                    f"'{layer.name}': the augmented Hamiltonian is not finite; nothing was "
                    "changed. Scale the loss or the inputs down, or use nonfinite='skip'"
                )
            hamiltonians[layer.name] = before, after
            found.update({p: new[name] for name, p in layer.params.items()})
        for p, value in found.items():
            step.borrowed.put(p, value)
        step.reports.extend(LayerReport(name) for name in hamiltonians)
        self.hamiltonians = hamiltonians


def _end_costate(trajectory: Trajectory, at: int, scale: float, layer: Layer) -> Tensor:
    """-B r dLoss/dx' where the layer's dynamics end, r what p.grad has been multiplied by."""
    stages = trajectory.active
    last = at == len(stages) - 1
    stage = stages[at if last else at + 1]
    assert stage.G is not None
    G = stage.G if last else pulled(stage, stage.G[None])[0]
    return -scale * G.detach().to(layer.dtype)


def check_hyperparameters(borrowed: Borrowed, layers: Iterable[Layer]) -> None:
    """Refuse what a parameter group asks for and E-MSA has not.

    Raises:
        ValueError: The option and the parameter are named.
    """
    for layer in layers:
        rates = {name: borrowed.hyper[p].lr for name, p in layer.params.items()}
        if len(set(rates.values())) > 1:
            raise ValueError(
                f"lr of '{layer.name}' differs between its parameters ({rates}): E-MSA solves for "
                "all of a layer's weights at once; put them into one group"
            )
        for name, p in layer.params.items():
            hyper = borrowed.hyper[p]
            for option, given, only in (
                ("momentum", hyper.momentum, 0.0),
                ("curvature", hyper.curvature.name, "identity"),
            ):
                if given != only:
                    raise ValueError(
                        f"{option}={given!r} for '{layer.name}.{name}': E-MSA has no {option} "
                        f"(leave it at {only!r}); its step is set by opt.rho, about lr / rho"
                    )


class SweepEngine(ChainEngine):
    """Refuses what no sweep moves."""

    title: ClassVar[str] = "E-MSA"


class EMSA(DDPNOpt):
    """Extended method of successive approximations (Li, Chen, Tai and E 2018, JMLR 18:165).

    Training by Pontryagin's maximum principle: no gradient step, but every layer t maximises over
    its weights u, with the pass's states x and costates p (p = -B dLoss/dx of each sample) held,

    H~(u) = mean_i [ p' . f(x, u) - rho/2 |x' - f(x, u)|^2 - rho/2 |p - d/dx (p' . f(x, u))|^2 ]
    - weight_decay/2 |u|^2.

    f goes from the layer's state to the next layer's, x' and p' are the state and costate there; at
    the last layer f is its output. The paper's residual of the costate's equation, pdot + dH/dx, is
    p - dH/dx in discrete time. Both residuals vanish at the weights of the pass; p there is
    computed as d/dx (p' . f). For large rho the step is about 1 / rho times the gradient,
    preconditioned by how far the layer's weights move its state and costate. Any loss that is a
    mean over the batch will do; it needn't be recognised.

    A uniform rescaling of p.grad (clipping, a gradient scaler) is one of the costates. Accumulated
    passes count as one batch whose loss is the sum of theirs. Schedulers work: a group's ``lr``, 1
    at first, divides rho (0: its layers stay).

    Args:
        model: A chain of layers that keep samples apart; all its trainable parameters in them.
        rho: Weight of the residuals, at least 0; also an attribute, kept in ``state_dict``.
        iterations: L-BFGS iterations of each layer's problem.
        weight_decay: In H~, as above.
        nonfinite: "raise" or "skip" a step whose numbers are not finite.
        params: Parameter groups, as in `ddpnopt.DDPNOpt`; ``weight_decay`` may differ in them.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: At a step: a parameter is not in the chain (named).
    """

    _engine_type = SweepEngine
    _kept = (*DDPNOpt._kept, "_sweep")

    def __init__(
        self,
        model: nn.Module,
        rho: float = 1.0,
        iterations: int = 10,
        weight_decay: float = 0.0,
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
    ) -> None:
        check_number("", "iterations", iterations, count, "must be a whole number, at least 1")
        self._sweep = Sweep(_checked(rho), iterations)
        super().__init__(
            model, lr=1.0, weight_decay=weight_decay, nonfinite=nonfinite, params=params
        )
        self.engine.method = self._sweep
        self.engine.needs_cost = False

    @property
    def rho(self) -> float:
        """Weight of the residuals."""
        return self._sweep.rho

    @rho.setter
    def rho(self, rho: float) -> None:
        self._sweep.rho = _checked(rho)

    @property
    def hamiltonians(self) -> dict[str, tuple[float, float]]:
        """H~ before and after the last step, by layer; never lower after it."""
        return dict(self._sweep.hamiltonians)

    def state_dict(self) -> dict[str, Any]:
        """As in `ddpnopt.DDPNOpt`, with rho."""
        state = super().state_dict()
        state["ddpnopt"]["rho"] = self.rho
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state, rho included.

        Raises:
            ValueError: The state is another optimizer's, or of a newer format.
        """
        if "rho" not in (state_dict.get("ddpnopt") or {}):
            raise ValueError("load_state_dict: no 'rho'; expected the state_dict of an EMSA")
        super().load_state_dict(state_dict)
        self.rho = state_dict["ddpnopt"]["rho"]


def _checked(rho: float) -> float:
    check_number("", "rho", rho, finite, "must not be negative, nor infinite")
    return float(rho)
