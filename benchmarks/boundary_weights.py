# SPDX-License-Identifier: MIT
"""Other weights of the samples in front of BatchNorm: `python benchmarks/boundary_weights.py`.

The library weights each sample once, at the boundary behind the last mixing (docs/batchnorm.md), by
c_i = c(S_i), S_i = S_i^+ + K |g_i|^2 / w. Here are other c_i, each in a closed loop of its own; the
layers behind the boundary keep their feedback.

The best founded, `coupled`, has no K: with h_i the gradient of sample i's loss in the front's
parameters (BatchNorm or not, it exists) the step of rate eta on sum_j c_j h_j changes that loss by
-sum_j H_ij c_j / w, H_ij = h_i^T P h_j. In the limit of many short steps along the samples' lines
l_i, and with what the layers behind do at the same time, the predicted changes flow by

    delta' = -(H / w + diag(S^+)) l'(delta),    c_i = mean of l_i' over the flow.

The rule is this with H replaced by the diagonal K |g_i|^2. `own` keeps each sample's own row sum
alone: S_i = S_i^+ + sum_j H_ij / w, where that is positive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar
from unittest.mock import patch

import torch
import typer
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ddpnopt import front
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import train
from ddpnopt.experiments.when_it_helps.problems import PROBLEMS
from ddpnopt.positions import Kronecker
from ddpnopt.step import Step
from ddpnopt.value import VALUES, Moreau
from ddpnopt.value.base import Blocks, Maps, Policy, Recursion, TerminalCost
from ddpnopt.value.line import Line
from ddpnopt.value.moreau import MoreauRecursion
from judged import AROUND, Protocol, show

_gain = front._gain
#: Implicit steps of the coupled flow, the first `FIRST` of its length, each longer than the last.
FLOW_STEPS, FIRST = 48, 1e-4


@dataclass(frozen=True)
class Boundary:
    """What weights may be made of.

    Attributes:
        of: The value function's coefficients for S.
        line: The samples' line models.
        S, above: S_i, and S_i^+ of the layers behind.
        squares: |g_i|^2 in the gradient's units, times the strength, over w: what K multiplies.
        gram: (B, B) H times the strength, over w; only if the weights `need` it.
    """

    of: Callable[[Tensor], Tensor]
    line: Line
    S: Tensor
    above: Tensor
    squares: Tensor
    gram: Tensor

    @property
    def rule(self) -> Tensor:
        """The library's own weights."""
        return self.of(self.S)


def instantaneous(at: Boundary) -> Tensor:
    """K of this step's plain gradient."""
    return at.of(at.above + at.squares * (at.gram.sum() / at.squares.sum()))


def coupled(at: Boundary) -> Tensor:
    """The mean slopes of the coupled flow, by linearly implicit steps: to 3 % up to S = 1000."""
    Lambda, omega, start = at.line.logistic
    A = (at.gram + at.above.diag()).to(omega.dtype)
    edges = torch.logspace(0, 1, FLOW_STEPS, 1 / FIRST, dtype=A.dtype) * FIRST
    delta, c = torch.zeros_like(omega), torch.zeros_like(omega)
    for h in torch.cat([edges[:1], edges.diff()]):
        share = torch.sigmoid(omega * delta + start)
        bend = omega * Lambda * share * (1 - share)
        slope = torch.linalg.solve(torch.eye(len(A)) + h * bend[:, None] * A, Lambda * share)
        delta, c = delta - h * (A @ slope), c + h * slope
    return c


#: Weights by name.
WEIGHTS: dict[str, Callable[[Boundary], Tensor]] = {
    "rule": lambda at: at.rule,
    "one": lambda at: torch.ones_like(at.S),
    "behind": lambda at: at.of(at.above),
    "mean": lambda at: at.rule.mean().expand_as(at.S),
    "sum kept": lambda at: at.rule / at.rule.mean(),
    "instantaneous": instantaneous,
    "own": lambda at: at.of(at.above + at.gram.sum(1).clamp(min=0)),
    "coupled": coupled,
}
#: Those that need H.
NEED = ("instantaneous", "own", "coupled")


@dataclass(frozen=True)
class Weighted(Moreau):
    """The default value function, with weights of `WEIGHTS` at the boundary."""

    weights: str = "rule"
    name: ClassVar[str] = "weighted"
    #: H of the backward pass that is running.
    gram: ClassVar[Tensor] = torch.zeros(())

    def start(self, terminal: TerminalCost) -> Recursion:
        """With other weights at the boundary."""
        return _Recursion(self, Line(terminal.kappa, terminal.excess), terminal.w)


class _Recursion(MoreauRecursion):
    def back(self, maps: Maps, bottom: bool) -> Policy:
        if not isinstance(maps, front.Boundary):
            return super().back(maps, bottom)
        assert isinstance(self.options, Weighted)
        return _AtBoundary(self, self.S.clone(), super().back(maps, bottom))


class _AtBoundary(Policy):
    def __init__(self, recursion: _Recursion, above: Tensor, own: Policy) -> None:
        self.recursion, self.above, self.own = recursion, above, own

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        line, options = self.recursion.line, self.recursion.options
        assert isinstance(options, Weighted) and self.own.S is not None
        factor = maps.strength / self.recursion.w
        squares = maps.gradient().square().sum(1) * factor
        gram = Weighted.gram.to(factor) * factor[:, None] if options.weights in NEED else squares
        slope = self.recursion.slope
        at = Boundary(lambda S: slope(line, S)(None), line, self.own.S, self.above, squares, gram)
        self.S, self.coefficient = self.own.S, WEIGHTS[options.weights](at).to(squares.dtype)
        return maps.combine(self.coefficient - 1, None)


def _measured(
    step: Step, edge: GradientEdge, G: Tensor, rows: Tensor, parameters: list[Tensor]
) -> float | Tensor:
    """`front._gain`, which is called just before the weights are: H, too."""
    value = step.settings.value
    if isinstance(value, Weighted) and value.weights in NEED:
        seeds = torch.diag_embed(G.reshape(len(G), -1).T).permute(1, 2, 0).reshape(-1, *G.shape)
        gradients = torch.autograd.grad(
            (edge,), parameters, (seeds,), retain_graph=True, is_grads_batched=True
        )
        Weighted.gram = torch.zeros(len(G), len(G))
        for p, h in zip(parameters, gradients, strict=True):
            own, rescale = step.borrowed, step.settings.rescale
            P = own.gain(p, own.moment(p, h.sum(0) * rescale), rescale)
            assert not isinstance(P, Kronecker)
            Weighted.gram += (h * P).flatten(1) @ h.flatten(1).T
    return _gain(step, edge, G, rows, parameters)


def run(config: RunConfig) -> RunResult:
    """One training, with the weights that its options name."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    VALUES[Weighted.name] = Weighted
    with patch.object(front, "_gain", _measured):
        return train(config)


def main(
    network: Annotated[list[str] | None, typer.Option(help="Default: the two dense ones.")] = None,
    around: Annotated[list[str] | None, typer.Option(help="Default: sgd, adamw.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="Only these, and the rule.")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Only these.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    fresh: Annotated[int, typer.Option(min=2)] = 8,
    jobs: int = -1,
) -> None:
    """Print a table for each network and optimizer."""
    how = Protocol(run, range(seeds), range(100, 100 + fresh), jobs)
    for name in network or ("dense-bn", "dense-bn-8"):
        for inner in around or AROUND:
            at = AROUND[inner]
            rates = tuple(rate or at.rates)
            methods = {"off": Contender(at.off, rates)}
            for one in dict.fromkeys(["rule", *(weights or WEIGHTS)]):
                options = (("value", Weighted.name), ("value.weights", one))
                methods[one] = Contender(at.closed, rates, options)
            show(f"{name} around {inner}", how.judge(PROBLEMS[name].base, methods), "rule")


if __name__ == "__main__":
    typer.run(main)
