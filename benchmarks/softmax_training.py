# SPDX-License-Identifier: MIT
"""Trainings along the exact softmax line: `python benchmarks/softmax_training.py`.

The default rule models a sample's loss along its gradient by a logistic line, of the same slope,
curvature and bound as the softmax line has where the sample stands. Here the flow follows the exact
line itself, so that the two can be told apart by what they train; and the logistic line's envelope
(`strength=1`) shows what more damping alone does. `softmax_lines.py` has the coefficients.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import LOSSES, Objective, train
from ddpnopt.experiments.when_it_helps.problems import PROBLEMS
from ddpnopt.value import VALUES, Moreau
from ddpnopt.value.base import Recursion, TerminalCost
from ddpnopt.value.moreau import MoreauRecursion
from judged import AROUND, Protocol, show

#: Points on a line at which its slope is taken.
POINTS = 96
#: Floors of |g|^2, of a slope and of its relative change.
SQUARE, SLOPE, CHANGE = 1e-24, 1e-290, 1e-9


@dataclass(frozen=True, eq=False)
class ExactFlow:
    """Mean slope along the flow delta' = -l'(delta), delta(0) = q, of length S, l exact.

    With g = p - e_y and the logits z + delta g / |g|^2 of probabilities w(delta),
    l'(delta) = sum_c w_c (g_c - g_y) / |g|^2. The flow needs the time of a distance d,
    the integral of 1 / l', which is taken with log l' linear between points.

    Attributes:
        z: (B, C) logits, in float64.
        g: (B, C) their gradient.
        label: (B, 1).
        S: (.., B) lengths.
    """

    z: Tensor
    g: Tensor
    label: Tensor
    S: Tensor

    @staticmethod
    def of(z: Tensor, label: Tensor, S: Tensor) -> ExactFlow:
        """A flow of length S."""
        z, label = z.double(), label[:, None]
        p = torch.softmax(z, 1)
        wrong = p.scatter(1, label, 0.0)
        return ExactFlow(z, wrong.scatter(1, label, -wrong.sum(1, keepdim=True)), label, S)

    def slope(self, delta: Tensor) -> Tensor:
        """l' at (.., B, points)."""
        square = self.g.square().sum(1, keepdim=True).clamp(min=SQUARE)
        above = (self.g - self.g.gather(1, self.label)) / square
        moved = self.z[:, None] + delta[..., None] * (self.g / square)[:, None]
        return (torch.softmax(moved, -1) * above[:, None]).sum(-1).clamp(min=SLOPE)

    def __call__(self, q: Tensor | None) -> Tensor:
        """The coefficient."""
        S = self.S.double()[..., None].clamp(min=1e-30)
        q = torch.zeros_like(S) if q is None else q.double().expand(self.S.shape)[..., None]
        square = self.g.square().sum(1, keepdim=True).clamp(min=SQUARE)
        fastest = (self.g.amax(1, keepdim=True) - self.g.gather(1, self.label)) / square
        fastest = fastest.clamp(min=CHANGE)  # of -d log l' / d d, by the variance's bound
        first = self.slope(q)
        longest, least = S * first, torch.log1p(fastest * S * first) / fastest
        share = torch.linspace(0, 1, POINTS, dtype=S.dtype)
        d = least / 4 * (4 * longest / least) ** share
        d = torch.cat([torch.zeros_like(d[..., :1]), d], -1)
        logs = self.slope(q - d).log()
        rate = -logs.diff() / d.diff()
        rate = torch.where(rate.abs() > CHANGE, rate, CHANGE)
        pieces = torch.expm1(rate * d.diff()) / rate * (-logs[..., :-1]).exp()
        time = torch.cat([torch.zeros_like(first), pieces.cumsum(-1)], -1)
        at = (torch.searchsorted(time, S, right=True) - 1).clamp(0, POINTS - 1)
        rest = (S - time.gather(-1, at)).clamp(min=0)
        rate, last = rate.gather(-1, at), logs.gather(-1, at).exp()
        way = d.gather(-1, at) + torch.log1p(rate * rest * last) / rate
        return (way / S)[..., 0].to(self.S.dtype)

    def rows(self) -> Sequence[ExactFlow]:
        """One for each row of S."""
        return [ExactFlow(self.z, self.g, self.label, S) for S in self.S.unbind()]


@dataclass(frozen=True)
class Exact(Moreau):
    """The default value function along the exact line of the batch that the loss saw last."""

    name: ClassVar[str] = "exact-softmax"
    batch: ClassVar[tuple[Tensor, Tensor]]

    def start(self, terminal: TerminalCost) -> Recursion:
        """With the other rule."""
        recursion = super().start(terminal)
        assert isinstance(recursion, MoreauRecursion)
        z, label = Exact.batch
        recursion.slope = lambda line, S: ExactFlow.of(z, label, S)
        return recursion


def _loss(z: Tensor, label: Tensor) -> Tensor:
    if z.requires_grad:
        Exact.batch = z.detach(), label
    return F.cross_entropy(z, label)


def run(config: RunConfig) -> RunResult:
    """One training."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    VALUES[Exact.name] = Exact
    LOSSES[Exact.name] = lambda classes, device: Objective(_loss, lambda z: z.argmax(-1))
    return train(config)


def main(
    network: Annotated[list[str] | None, typer.Option(help="Default: tanh, cnn.")] = None,
    around: Annotated[list[str] | None, typer.Option(help="Default: sgd, adamw.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    fresh: Annotated[int, typer.Option(min=2)] = 8,
    rate: Annotated[list[float] | None, typer.Option(help="Only these.")] = None,
    open_loop: Annotated[bool, typer.Option(help="The open loop, too.")] = True,
    jobs: int = -1,
) -> None:
    """Print a table for each network and optimizer."""
    how = Protocol(run, range(seeds), range(100, 100 + fresh), jobs)
    exact = (("value", Exact.name),)
    for name in network or ("tanh", "cnn"):
        base = PROBLEMS[name].base.model_copy(update={"loss": Exact.name})
        for inner in around or AROUND:
            at = AROUND[inner]
            rates = tuple(rate or at.rates)
            methods = {
                "off": Contender(at.off, rates),
                "logistic, open": Contender(f"{at.closed}-open-loop", rates),
                "exact, open": Contender(f"{at.closed}-open-loop", rates, exact),
                "logistic": Contender(at.closed, rates),
                "exact": Contender(at.closed, rates, exact),
                "envelope": Contender(at.closed, rates, (("value.strength", 1.0),)),
            }
            methods = {m: c for m, c in methods.items() if open_loop or "open" not in m}
            show(f"{name} around {inner}", how.judge(base, methods), "logistic")


if __name__ == "__main__":
    typer.run(main)
