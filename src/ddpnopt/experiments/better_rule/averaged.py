# SPDX-License-Identifier: MIT
"""How schedule-free optimizers (Defazio et al. 2024) answer a gradient.

The gradient is taken at y = (1 - beta) z + beta x, the step moves z by -eta M^-1 d at once, and x,
the average of all z, and so y, by the whole of it in time: over its life the gain is eta M^-1, as
with momentum. (Only watched, the gain is that of one step, (1 - beta) eta: S is ten times too
small.) M is the identity, or Adam's with its own counter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ddpnopt
from ddpnopt.curvature import Identity
from ddpnopt.experiments.names import call, split
from ddpnopt.hyperparameters import Hyper
from ddpnopt.inner import READERS
from ddpnopt.inner.base import Group, Reader, State, feed_average
from ddpnopt.inner.moments import _Adam
from ddpnopt.typing import Tensor
from ddpnopt.value import Moreau

#: Of an extra, and without types.
schedulefree: Any = importlib.import_module("schedulefree")


class AveragedSGD(Reader):
    """P = eta."""

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group alone."""
        return Hyper(float(group["lr"]), 0.0, 0.0, Identity())


@dataclass(frozen=True)
class _Counted(_Adam):
    """Its counter stands in the group."""

    before: int = 0

    def inverse(self, state: Any, moment: Tensor | None) -> Tensor:
        """1 / (sqrt(v^) + eps)."""
        return super().inverse({**state, "step": float(self.before)}, moment)


class AveragedAdam(Reader):
    """P = eta / (sqrt(v^) + eps)."""

    moment = "exp_avg_sq"

    def hyper(self, group: Group, gain: float | Tensor) -> Hyper:
        """From the group alone."""
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        M = _Counted(betas, float(group["eps"]), before=int(group["k"]))
        return Hyper(float(group["lr"]), 0.0, 0.0, M)

    def feed(self, group: Group, state: State, plain: Tensor, d: Tensor) -> None:
        """v is an average."""
        feed_average(state["exp_avg_sq"], float(group["betas"][1]), plain, d)


READERS[schedulefree.SGDScheduleFree] = AveragedSGD()
READERS[schedulefree.AdamWScheduleFree] = AveragedAdam()


class _Answering(ddpnopt.Feedback):
    """Answers with the average where the training loop asks for it."""

    def eval(self) -> None:
        """x."""
        for one in self.optimizers:
            getattr(one, "eval")()  # noqa: B009 - torch's class has none

    def train(self) -> None:
        """y."""
        for one in self.optimizers:
            getattr(one, "train")()  # noqa: B009 - torch's class has none


def averaged(
    kind: str,
) -> Callable[[nn.Module, float, dict[str, Any]], torch.optim.Optimizer]:
    """A factory of `ddpnopt.Feedback` around a schedule-free optimizer.

    Args:
        kind: Its class's name in the package schedulefree.
    """

    def build(model: nn.Module, lr: float, options: dict[str, Any]) -> torch.optim.Optimizer:
        value, rest = split(options, "value")
        own = {k: rest.pop(k) for k in ("feedback", "terminal") if k in rest}
        inner = getattr(schedulefree, kind)(model.parameters(), lr, foreach=False, **rest)
        inner.train()
        for p in model.parameters():  # before the first step feeds v: z starts at the weights
            inner.state[p]["z"] = p.detach().clone()
            if kind == "AdamWScheduleFree":
                inner.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        return _Answering(model, inner, value=call(Moreau, options=value), **own)

    return build
