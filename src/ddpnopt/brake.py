# SPDX-License-Identifier: MIT
"""The control-limited brake: each layer's only control is how far it follows its optimizer.

The optimizer makes its own step for all layers at once, Delta. Layer t then takes gamma_t Delta_t,
gamma_t in [0, 1]. Along the samples' gradients the step moves the loss of sample i by -gamma_t D_i,
D_i = -g_u,i . Delta_t, and differential dynamic programming over the scalars gamma_t has the value
function V(q) = a . q + q . C q / 2 over the batch, one coordinate a sample:

    gamma_t = ((a + C q) . D + r) / (D . C D + r), clamped to [0, 1]
    a <- a - C D gamma_t(0)
    C <- C - C D (C D)^T / (D . C D + r)     unless the clamp held

from the output backwards, with a = w and C = diag(w kappa) there; r draws gamma to 1. No Gram
matrices, no second weight gradient: one product a layer, and the rollout of the closed loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ddpnopt.borrowed import Borrowed
from ddpnopt.company import Company
from ddpnopt.engine import Engine
from ddpnopt.host import Host
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.options import Options
from ddpnopt.replay import ALONE, preserve
from ddpnopt.report import LayerReport
from ddpnopt.rollout import rollout
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.terminal import concatenated
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor
from ddpnopt.updates import Update
from ddpnopt.value.base import Blocks

#: r as a share of what the step is to win.
DRAW = 0.3


@dataclass(frozen=True, eq=False)
class Value:
    """V(q) = a . q + q . C q / 2, C = diag(c) - U U^T.

    Attributes:
        a: (B,) slope.
        c: (B,) diagonal of the curvature.
        U: (B, t) what the layers behind take from it.
    """

    a: Tensor
    c: Tensor
    U: Tensor

    def curvature(self, v: Tensor) -> Tensor:
        """C v."""
        return self.c * v - self.U @ (self.U.T @ v)


@dataclass(frozen=True, eq=False)
class Brake:
    """One layer's policy.

    Attributes:
        value: V behind the layer.
        D: (B,) what the layer's whole step takes from each sample's coordinate.
        r: What draws gamma to 1.
    """

    value: Value
    D: Tensor
    r: Tensor

    @property
    def stiffness(self) -> Tensor:
        """D . C D + r."""
        return self.D @ self.value.curvature(self.D) + self.r

    def __call__(self, q: Tensor | None) -> Tensor:
        """gamma before it is clamped; 1 where the step changes nothing.

        Args:
            q: (B,) how far the layers before have moved the samples; None: not at all.
        """
        slope = self.value.a if q is None else self.value.a + self.value.curvature(q)
        stiffness = self.stiffness
        gamma = (slope @ self.D + self.r) / stiffness
        return torch.where(stiffness > 0, gamma, torch.ones_like(gamma))

    def back(self) -> Value:
        """V in front of the layer."""
        free = self(None)
        gamma = free.clamp(0.0, 1.0)
        CD = self.value.curvature(self.D)
        a, U = self.value.a - CD * gamma, self.value.U
        if bool((free == gamma) & (self.stiffness > 0)):
            U = torch.cat([U, (CD / self.stiffness.sqrt())[:, None]], 1)
        return Value(a, self.value.c, U)


def brake(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
    """Take the optimizer's own step, and of it as much in each layer as the batch can bear.

    Args:
        recorder: The recorder of the passes.
        step: The step, its layers built.
        trajectories: Its passes.
    """
    borrowed, layers = step.borrowed, step.layers
    updates = []
    for layer in layers.values():
        for name, p in layer.params.items():
            plain = step.plain_gradient(name, p)
            assert plain is not None
            updates.append(Update(p, plain, fed=plain))
    borrowed.apply(updates)
    after = {update.p: update.p.clone() for update in updates}
    for stepped in after:
        stepped.copy_(borrowed.before(stepped))

    cost = concatenated([t.cost for t in trajectories if t.cost is not None])
    w = cost.w
    value = Value(w, w * cost.kappa, w.new_zeros(len(w), 0))
    policies: dict[str, Brake] = {}
    with ALONE, recorder.pause() as undoing:
        preserve(undoing, recorder.anatomy.modules)
        for name, layer in reversed(layers.items()):
            D = _progress(layer, borrowed, after).to(w) / w
            policies[name] = Brake(value, D, DRAW * (w * D.abs()).sum())
            value = policies[name].back()

    def apply(layer: Layer, dx: Blocks | None) -> None:
        q = None if dx is None else layer.project(dx)[:, 0].to(w) / w
        gamma = policies[layer.name](q).clamp(0.0, 1.0)
        _follow(layer, borrowed, after, float(gamma))
        step.reports.append(LayerReport(layer.name, gamma.expand(len(w))))

    if all(t.call is not None for t in trajectories):
        rollout(recorder, trajectories, layers, apply)
    else:  # open loop
        for layer in layers.values():
            apply(layer, None)


class _Bare(nn.Module):
    """A module's own function, without the user's hooks around it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the module's."""
        found: Tensor = self.module.forward(*inputs)
        return found


def _progress(layer: Layer, borrowed: Borrowed, after: dict[Tensor, Tensor]) -> Tensor:
    """-g_u,i . Delta of every sample, (B,): by what the step alone changes in the output."""
    linear, bare = isinstance(layer.rule, MatrixRule), _Bare(layer.module)
    moved: dict[str, Tensor] = {}
    for name, p in layer.module.named_parameters():
        start: Tensor = torch.zeros_like(p) if linear else p.detach()
        moved[f"module.{name}"] = start + (after[p] - borrowed.before(p)) if p in after else start
    parts = []
    for stage, samples in layer.pairs():
        shift = torch.func.functional_call(bare, moved, stage.inputs)
        if not linear:
            shift = shift - bare(*stage.inputs)
        shift = stage.arranged(shift)
        G = layer.G(stage).reshape(samples, -1)
        parts.append(-(G * shift.reshape(samples, -1).to(G.dtype)).sum(1))
    return torch.cat(parts)


def _follow(layer: Layer, borrowed: Borrowed, after: dict[Tensor, Tensor], gamma: float) -> None:
    """u + gamma Delta; the momentum is shortened likewise, or it would make up for it later."""
    for p in layer.params.values():
        if gamma == 1.0:
            p.copy_(after[p])
        else:
            p.lerp_(after[p], gamma)
            borrowed.shorten(p, gamma)


class BrakeEngine(Engine):
    """An engine whose layers are braked; in open loop, too, nothing is written to p.grad."""

    writes, alone = False, "mode='brake'"

    def __init__(
        self, model: nn.Module, options: Options, host: Host, company: Company | None = None
    ) -> None:
        super().__init__(model, options, host, company)
        self.method = brake
