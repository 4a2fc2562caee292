# SPDX-License-Identifier: MIT
"""Samples weighted once, at the boundary above which the layers are a chain that keeps them apart.

Behind a layer that mixes samples (BatchNorm in training mode) a row of a layer's gradient contains
other samples' losses, and a coefficient per row would be wrong. So the whole front of the net is
treated as one layer of the recursion: at the boundary state y each sample's gradient g_i is
re-weighted by the value function's coefficient at q = 0, and what flows on from there is the true
gradient of a re-weighted loss, whatever the front does (open loop).

The front's Gram matrices are not known, only their sum over the batch: the update d changes the
loss by d^T P d, which is shared out in proportion to |c_i g_i|^2. So S_i = K |g_i|^2, with
K = d^T P d / sum_i |c_i g_i|^2 as seen in the previous steps (it contains the batch's coupling).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.autograd.graph import GradientEdge

from ddpnopt.bellman import backward
from ddpnopt.crossing import total
from ddpnopt.decisions import traced
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.linearise import per_sample
from ddpnopt.ranks import Ranks
from ddpnopt.stages import Front, Stage, Trajectory
from ddpnopt.step import Step
from ddpnopt.terminal import Cost
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks, Coupling

#: Key of K among the running couplings, and its decay.
FRONT, DECAY = "*", 0.9


@dataclass(eq=False)
class Boundary:
    """The front as one layer with the identity as its map and P = K I; a `value.base.Maps`.

    Attributes:
        G: Gradient at the boundary state, (rows, ...).
        Z: Columns of the terminal factor there, (r, rows, ...), or None.
        samples: B.
        K: The front's gain.
        strength: The factor on S that suits the curvatures in the front.
    """

    G: Tensor
    Z: Tensor | None
    samples: int
    K: float | Tensor
    strength: float = 1.0

    def _columns(self) -> Tensor:
        columns = self.G[None] if self.Z is None else torch.cat([self.G[None], self.Z])
        return per_sample(columns, self.samples)

    def h_gram(self) -> Tensor:
        """Inner products of the columns."""
        columns = self._columns()
        return columns @ columns.mT

    def gram(self) -> Tensor:
        """K times these."""
        return self.h_gram() * self.K

    def lengths(self) -> Tensor:
        """K |g|^2."""
        return self.gradient().square().sum(1).mul_(self.K)

    @property
    def matrices(self) -> NoReturn:
        """None: the front is known by its gain alone."""
        raise UnsupportedModelError(
            "second-order dynamics and values coupled over the batch are for chains that keep "
            "samples apart; use another value function here, value='moreau' or 'low_rank'"
        )

    def coupling(self, weight: Tensor) -> Coupling:
        """1: K contains it."""
        return Coupling(rho=1.0)

    def combine(self, a: Tensor | None, b: Tensor | None) -> Blocks:
        """a g + Z b."""
        v = torch.zeros_like(self.G).reshape(self.samples, -1)
        if a is not None:
            v = v + self.G.reshape(self.samples, -1) * a[:, None].to(v.dtype)
        if b is not None and self.Z is not None:
            v = v + torch.einsum("brh,br->bh", per_sample(self.Z, self.samples), b.to(v.dtype))
        return [v.reshape(self.G.shape)]

    def gradient(self) -> Tensor:
        """(B, H) g."""
        return self.G.reshape(self.samples, -1)

    def curvature(self) -> Tensor:
        """K I."""
        size = self.G.numel() // self.samples
        identity = torch.eye(size, dtype=self.G.dtype, device=self.G.device)
        return identity.expand(self.samples, -1, -1) * self.K

    def through(self, V: Tensor) -> Tensor:
        """The boundary state is the next layer's own."""
        return V.to(self.G.dtype)

    def split(self, v: Tensor) -> Blocks:
        """(B, H) to the state's shape."""
        return [v.reshape(self.G.shape)]

    def project(self, dx: Blocks) -> Tensor:
        """Columns times dx."""
        columns = self._columns() if self.Z is None else self._columns()[:, 1:]
        return (columns @ self.push(dx)[..., None])[..., 0]

    def push(self, dx: Blocks) -> Tensor:
        """dx itself."""
        return torch.cat([change.reshape(self.samples, -1) for change in dx])

    def pull(self, V: Tensor) -> Tensor:
        """V itself."""
        return V


def weigh(
    trajectory: Trajectory,
    G: Tensor,
    edge: GradientEdge,
    cost: Cost,
    step: Step,
    parameters: Sequence[Tensor],
) -> Front:
    """The samples' weights at the boundary, and what they change in the front's gradients.

    Runs inside the backward pass, while the front's graph is still there.

    Args:
        trajectory: The pass.
        G: Gradient at its boundary state.
        edge: The state's edge.
        cost: The terminal cost.
        step: For this pass alone; plain gradients are computed by the layers' rules.
        parameters: The optimizer's parameters.
    """
    at = trajectory.boundary
    stage = trajectory.stages[min(at, len(trajectory.stages) - 1)]
    value = step.settings.value
    with _arrived(trajectory.stages[at:]):
        step.build()
        recursion = value.start(cost)
        backward(step.layers, recursion, step.feed, value.statistics, to_input=False)
    owned = {id(p) for layer in step.layers.values() for p in layer.params.values()}
    inside = [p for p in parameters if p.requires_grad and id(p) not in owned]
    rows = (G[None] if stage.unbatched else G).to(torch.promote_types(G.dtype, torch.float32))
    Z = None
    if value.linearization == "factor" and trajectory.heads:
        raise UnsupportedModelError(
            "a model that mixes samples (BatchNorm in training mode) and has several outputs: this "
            "value function can't weight the layers in front; use value='moreau' or 'gauss_newton'"
        )
    if value.linearization == "factor":
        Z = _columns(trajectory, cost, value.rank).to(rows.dtype)
    K = _gain(step, edge, G, rows, inside)
    front = Boundary(rows, Z, trajectory.samples, K, step.borrowed.strength(inside))
    policy = recursion.back(front, bottom=True)
    recursion.close()
    (v,) = policy(front, None)
    seed = v.reshape(G.shape).to(G.dtype)
    corrections = _pulled(edge, inside, seed)
    both = torch.stack([rows + v, rows]).reshape(2, trajectory.samples, -1).square().sum(2)
    coefficient = policy.coefficient
    if coefficient is None:
        coefficient = (both[0] / both[1].clamp(min=torch.finfo(both.dtype).tiny)).sqrt()
    return Front(corrections, both[0].sum(), coefficient, policy.S)


def _columns(trajectory: Trajectory, cost: Cost, rank: int | None) -> Tensor:
    """The terminal factor's columns at the boundary."""
    if trajectory.boundary == len(trajectory.stages):
        return cost.factor(rank)
    stage = trajectory.stages[trajectory.boundary]
    if trajectory.path is None:
        return stage.fresh_Z["Z_x"]
    uses = (one.fresh_Z for one in trajectory.crossings if one.at(stage.time))
    found = total(one["Z"] for one in uses if one)
    if found is None:
        columns = cost.factor(rank)
        found = columns.new_zeros(len(columns), *stage.x.shape)
    return found


@contextmanager
def _arrived(stages: Sequence[Stage]) -> Iterator[None]:
    """Show the gradients of the running backward pass as if it had ended."""
    names = ("G", "Z_h", "Z_x", "J")
    before = [tuple(getattr(stage, name) for name in names) for stage in stages]
    for stage in stages:
        stage.G = stage.fresh_G
        for name, columns in stage.fresh_Z.items():
            setattr(stage, name, columns)
    try:
        yield
    finally:
        for stage, saved in zip(stages, before, strict=True):
            for name, one in zip(names, saved, strict=True):
                setattr(stage, name, one)


def _pulled(edge: GradientEdge, parameters: Sequence[Tensor], seed: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of the front's parameters, by one more backward pass through it alone."""
    targets: list[Any] = list(parameters)
    if not targets:
        return {}
    found = torch.autograd.grad((edge,), targets, (seed,), retain_graph=True, allow_unused=True)
    return {p: d for p, d in zip(parameters, found, strict=True) if d is not None}


def _gain(
    step: Step, edge: GradientEdge, G: Tensor, rows: Tensor, parameters: Sequence[Tensor]
) -> float | Tensor:
    """K: the previous steps' running average; the first time, of the plain gradient."""
    if not parameters:
        return 0.0
    if FRONT in step.running:
        return step.running[FRONT] * life(step)
    length = rows.new_zeros(())
    for p, g in _pulled(edge, parameters, G).items():
        length = length + step.borrowed.first_length(p, g, step.settings.rescale)
    alone = rows.square().sum()
    return float(length / alone) if bool(alone > 0) else 0.0


def life(step: Step) -> float | Tensor:
    """The largest r eta / (1 - momentum): in its units K follows a schedule at once."""
    lives = list({id(one): one.life for one in step.borrowed.hyper.values()}.values())
    tensors = [one for one in lives if isinstance(one, Tensor)]
    longest = torch.stack(tensors).amax() if tensors else max(lives)
    return longest * step.settings.rescale


def remember(step: Step, fronts: Sequence[Front], length: Tensor | None) -> None:
    """K of this step, for the next."""
    if not fronts or length is None:
        return
    own = torch.stack([front.weighted for front in fronts]).sum()
    weighted = step.ranks.total({FRONT: own})[FRONT]  # life(step) carries 1/W
    if traced():
        ratio = (length / (weighted * life(step))).double()
        known = step.running.get(FRONT, ratio)
        usual = DECAY * known + (1 - DECAY) * ratio
        sound = (ratio > 0) & (ratio < float("inf"))
        step.running[FRONT] = torch.where(sound, usual, known)
        return
    scale = float(weighted) * float(life(step))
    now = float(length) / scale if scale > 0 else 0.0
    if 0 < now < float("inf"):
        before = step.running.get(FRONT, now)
        step.running[FRONT] = DECAY * before + (1 - DECAY) * now


def merged(fronts: Sequence[Front]) -> dict[Tensor, Tensor]:
    """Corrections over all passes of a step."""
    total: dict[Tensor, Tensor] = {}
    for front in fronts:
        for p, d in front.corrections.items():
            total[p] = total[p] + d if p in total else d
    return total


def averaged(found: dict[Tensor, Tensor], ranks: Ranks) -> Mapping[Tensor, Tensor]:
    """Corrections as the mean over the ranks, as p.grad is."""
    if not found or not ranks.several:
        return found
    return {p: d / ranks.size for p, d in ranks.total(found).items()}


def corrections(step: Step) -> dict[Tensor, Tensor]:
    """In open loop: d - gbar by parameter, in the units in which backward left p.grad."""
    step.build()
    step.recurse()
    found = {
        p: correction
        for layer in step.layers.values()
        for p, correction in step.corrections(layer, None).items()
    }
    found.update(merged([t.front for t in step.trajectories if t.front is not None]))
    return found
