# SPDX-License-Identifier: MIT
"""One step: from recorded passes to layers with gains and policies, and their updates.

`Step` is made anew for every step (and, in open loop, for every backward pass) and holds nothing
that outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddpnopt import directions
from ddpnopt.bellman import backward
from ddpnopt.borrowed import Borrowed
from ddpnopt.decisions import traced
from ddpnopt.diagnosis import diagnosed
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import weakly
from ddpnopt.layer import Layer
from ddpnopt.parameters import named_parameters
from ddpnopt.positions import scalar
from ddpnopt.ranks import Ranks
from ddpnopt.report import LayerReport
from ddpnopt.stages import Stage, Trajectory, whole
from ddpnopt.terminal import concatenated
from ddpnopt.typing import Tensor
from ddpnopt.updates import Update
from ddpnopt.value.base import Blocks, Coupling, ValueFunction, mean_field

#: Decay of the running coupling where the plain gradient is not computed.
COUPLING_DECAY = 0.9


@dataclass(frozen=True)
class Settings:
    """What a step needs to know besides the passes.

    Attributes:
        value: The value function.
        rescale: r, the uniform rescaling of p.grad, in the gains.
        correction_scale: What the re-weighting is multiplied by to match p.grad as it is now.
        weight_gradients: Whether p.grad holds the plain weight gradients.
        sketch: Generator of sketched Gram matrices, or None.
        early: The backward pass still runs; plain gradients are computed by the layers' rules.
        diagnose: Compute the norms of the feedforward and feedback steps.
    """

    value: ValueFunction
    rescale: float
    correction_scale: float
    weight_gradients: bool
    sketch: torch.Generator | None
    diagnose: bool
    early: bool = False


@dataclass(eq=False)
class Step:
    """Layers of one step.

    Args:
        trajectories: Recorded passes with a terminal cost.
        borrowed: The borrowed optimizer.
        settings: Options of this step.
        trainable: Whether a parameter belongs to the optimizer.
        running: rho by layer of the previous steps; updated where it is needed.
        base: Gradients that p.grad held before this backward pass (open loop under accumulation).
        closure: The closure that the step was called with.
        norms: |p.grad| of parameters whose p.grad is the plain gradient, where it is known.
        ranks: Those that hold the batch together.
    """

    trajectories: Sequence[Trajectory]
    borrowed: Borrowed
    settings: Settings
    trainable: Callable[[Tensor], bool]
    running: dict[str, float | Tensor]
    base: Mapping[Tensor, Tensor] = field(default_factory=dict)
    closure: Callable[[], float] | None = None
    norms: Mapping[Tensor, float | Tensor] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    layers: dict[str, Layer] = field(default_factory=dict)
    moments: dict[Tensor, Tensor | None] = field(default_factory=dict)
    joints: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[Tensor, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    _plain: dict[Tensor, Tensor] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _ratios: dict[str, tuple[Coupling, Tensor]] = field(default_factory=dict)

    def build(self) -> None:
        """Gather each active layer's executions over all passes.

        Raises:
            UnsupportedModelError: Accumulated passes run different layers.
        """
        orders = [[s.name for s in t.active] for t in self.trajectories]
        if any(order != orders[0] for order in orders):
            raise UnsupportedModelError(
                "the accumulated passes run different layers "
                f"({'; '.join(', '.join(o) for o in orders)}); accumulate passes that run the "
                "same layers, or use feedback=False"
            )
        counts = [t.samples for t in self.trajectories]
        for index, name in enumerate(orders[0] if orders else []):
            blocks = [whole(t.active[index], t.samples) for t in self.trajectories]
            self.layers[name] = self._layer(blocks, counts)

    def _layer(self, blocks: list[Stage], counts: list[int]) -> Layer:
        first = blocks[0]
        assert first.rule is not None
        params = {
            name: p
            for name, p in named_parameters(first.module)
            if self.trainable(p) and (p.grad is not None or self._is_held(name, p))
        }
        return Layer(
            first.name,
            first.module,
            first.rule,
            blocks,
            counts,
            params,
            factor=self.settings.value.linearization == "factor",
            couple=weakly(self.couple),  # the step holds its layers: no cycle
            sketch=self.settings.sketch,
            strength=self.borrowed.strength(params.values()),
            keep_gain=self.settings.diagnose or not self.settings.weight_gradients,
        )

    def plain_layers(self) -> list[Layer]:
        """The recorded layers outside the feedback."""
        found: dict[str, tuple[list[Stage], list[int]]] = {}
        for trajectory in self.trajectories:
            for stage in trajectory.stages:
                if stage.rule is None or stage.G is None or stage.name in self.layers:
                    continue
                if stage.rows == 0:  # an empty batch tells no statistics
                    continue
                blocks, counts = found.setdefault(stage.name, ([], []))
                blocks.append(stage)
                whole = trajectory.samples and stage.rows % trajectory.samples == 0
                counts.append(trajectory.samples if whole else stage.rows)
        return [self._layer(blocks, counts) for blocks, counts in found.values()]

    def recurse(self) -> None:
        """The Bellman backward pass: every layer's gain and policy."""
        if not self.layers:
            return
        cost = concatenated([t.cost for t in self.trajectories if t.cost is not None])
        recursion = self.settings.value.start(cost)
        recursion.pool = self.ranks.pool
        backward(self.layers, recursion, self.feed, self.settings.value.statistics)

    def plain_gradient(self, name: str, p: nn.Parameter) -> Tensor | None:
        """The plain batch gradient in p.grad's present units; None where it is not computed."""
        known = p.grad is not None and not self._is_held(name, p)
        if known and p.grad is not None and not self.settings.early:
            return p.grad - self.base[p] if p in self.base else p.grad
        return self._plain.get(p)

    def _is_held(self, name: str, p: nn.Parameter) -> bool:
        return not self.settings.weight_gradients and name == "weight"

    def _compute_plain(self, layer: Layer) -> None:
        """The plain gradient by the layer's rule, where autograd was told not to make it."""
        total = self.ranks.total(layer.weighted(layer.plain_vectors()))
        for name, p in layer.params.items():
            if self.plain_gradient(name, p) is None:
                self._plain[p] = total[name] * self.settings.correction_scale

    def feed(self, layer: Layer, correction: Blocks | None) -> None:
        """M's statistics with Q_u = gbar + correction, and the gain."""
        fixed = self.borrowed.fixed_gains(layer, self.settings.rescale)
        if fixed is not None:
            layer.gain.update(fixed)
            return
        joined = self.borrowed.joined(layer)
        vectors = layer.plain_vectors()
        if correction is not None:
            vectors = [g + v for g, v in zip(vectors, correction, strict=True)]
        r = self.settings.rescale
        if joined:
            joint = self.borrowed.joint(layer, vectors, r, self.ranks, correction is None)
            life = self.borrowed.hyper[layer.params["weight"]].life * r
            layer.gain["weight"] = self.borrowed.joint_gain(layer, joint, life)
            self.joints[layer.name] = joint
        single = {name: p for name, p in layer.params.items() if name not in joined}
        kinds = {self.borrowed.hyper[p].curvature.statistics for p in single.values()}
        extra: dict[str, Tensor] = {}
        squares, samples = dict[str, Tensor](), 0
        if not kinds <= {"none"}:
            if any(self.plain_gradient(n, p) is None for n, p in single.items()):
                self._compute_plain(layer)
            if correction is not None:
                extra = dict(self.ranks.total(layer.weighted(correction)))
            if "squares" in kinds:
                squares, samples = directions.squares(layer, vectors, self.ranks)
        scale = self.settings.correction_scale
        for name, p in single.items():
            moment = None
            if self.borrowed.hyper[p].curvature.statistics != "none":
                g = self.plain_gradient(name, p)
                assert g is not None
                if name in extra:
                    self.extra[p] = extra[name] * scale
                    g = g + self.extra[p]
                if r != scale:  # the step will see it rescaled
                    g = g * (r / scale)
                known = (squares[name] * r**2, samples) if name in squares else None
                moment = self.borrowed.moment(p, g, known)
            if not self._follows(p):
                self.moments[p] = moment
            gain = self.borrowed.gain(p, moment, self.settings.rescale)
            layer.gain[name] = gain.to(layer.dtype) if isinstance(gain, Tensor) else gain

    def _follows(self, p: Tensor) -> bool:
        """M is fed anew once d is known, so that its moment need not be kept until then."""
        fed = self.borrowed.hyper[p].curvature.statistics
        return self.settings.value.statistics == "plain" and fed == "gradient"

    def couple(self, layer: Layer, weight: Tensor) -> Coupling:
        """gbar^T P gbar, for rho = gbar^T P gbar / sum_i w_i s_i, between 1 and B.

        Where the plain gradient is not computed: the running ratio of the previous steps, and
        1^T Gram 1 the first time.
        """
        self._weights[layer.name] = weight
        if (known := self._known_length(layer)) is not None:
            return Coupling(known)
        gradients = {n: self.plain_gradient(n, p) for n, p in layer.params.items()}
        own = {n: g for n, g in gradients.items() if g is not None}
        if layer.coordinates and len(own) == len(gradients) and not self.ranks.several:
            sampled = directions.sampled_length(layer, own, self.settings.correction_scale)
            if sampled is not None:
                return Coupling(sampled)
        if any(g is None for g in gradients.values()):
            if layer.name in self.running:
                return Coupling(rho=self.running[layer.name])
            self._compute_plain(layer)
            gradients = {n: self.plain_gradient(n, p) for n, p in layer.params.items()}
        scale = self.settings.correction_scale
        length = layer.length({n: g for n, g in gradients.items() if g is not None})
        if not self.settings.early:  # nobody will ask for it again, and it is as large as p
            self._plain = {p: g for p, g in self._plain.items() if self.borrowed.needs_plain(p)}
        return Coupling(length if scale == 1.0 else length / scale**2)

    def _known_length(self, layer: Layer) -> float | Tensor | None:
        """gbar^T P gbar from the norms of p.grad, where P is a number for every parameter."""
        length: float | Tensor = 0.0
        for name, p in layer.params.items():
            P, norm = layer.gain.get(name), self.norms.get(p)
            if self._is_held(name, p) or p in self.base or norm is None or not scalar(P):
                return None
            length += P * (norm / self.settings.correction_scale) ** 2
        return length

    # Update ---------------------------------------------------------------------------------

    def corrections(self, layer: Layer, dx: Blocks | None) -> dict[Tensor, Tensor]:
        """d - gbar by parameter, in the units in which backward left p.grad."""
        assert layer.policy is not None
        vectors = layer.policy(layer, dx)
        self.reports.append(diagnosed(layer, vectors, self.settings.diagnose))
        total = layer.weighted(vectors)
        return {p: total[name] for name, p in layer.params.items()}

    def apply(self, layer: Layer, dx: Blocks | None) -> None:
        """u <- u - eta M^-1 d with d = p.grad + r sum_i g_u^T v_i."""
        assert layer.policy is not None
        vectors = layer.policy(layer, dx)
        self.reports.append(diagnosed(layer, vectors, self.settings.diagnose))
        scale = self.settings.correction_scale
        own = layer.params.items()
        known = {n: p.grad for n, p in own if not self._is_held(n, p) and p.grad is not None}
        joint = self.joints.get(layer.name)
        whole = joint is not None and len(self.borrowed.joined(layer)) == len(layer.params)
        if joint is not None and whole and not self.ranks.several:
            P = self.borrowed.joint_gain(layer, joint, 1.0)
            direction = directions.sampled_direction(layer, P, known, vectors, scale)
            if direction is not None:
                if len(known) < len(layer.params):
                    self._remember_coupling(layer, directions.reweighted_length(layer, vectors))
                self.borrowed.joint_move(layer, direction, joint)
                return
        bend = layer.policy.bend(layer, dx) if dx is not None else None
        bent = layer.bent(bend, dx) if bend is not None and dx is not None else {}
        if len(known) == len(layer.params):
            alone = not (bent or joint or self.ranks.several)
            if alone and directions.descended(layer, self.borrowed, known, vectors, scale):
                return
            d = directions.reweighted(layer, known, vectors, scale, bent, self.ranks)
        else:
            d, used = directions.held(layer, known, vectors, scale, bent, self.ranks)
            self._remember_coupling(layer, layer.length(used))
        self.move(layer, d)

    def move(self, layer: Layer, d: Mapping[str, Tensor]) -> None:
        """u <- u - eta M^-1 d."""
        joint = self.joints.get(layer.name)
        joined = self.borrowed.joined(layer) if joint is not None else ()
        if joint is not None:
            self.borrowed.joint_step(layer, d, joint)
        self.borrowed.apply(
            [
                Update(
                    p,
                    d[name],
                    self.moments.get(p),
                    plain=self.plain_gradient(name, p),
                    follows=self._follows(p),
                )
                for name, p in layer.params.items()
                if name not in joined
            ]
        )

    def announce(self) -> None:
        """Tell the other ranks what is to come: d of every layer."""
        sizes = list[int]()
        for layer in self.layers.values() if not self.ranks.two_bucket else ():
            known = [n for n, p in layer.params.items() if not self._is_held(n, p)]
            apart = len(known) < len(layer.params) and "bias" in known
            extra = layer.params["bias"].numel() if apart else 0
            sizes.append(sum(p.numel() for p in layer.params.values()) + extra)
        self.ranks.announce(sizes)

    def _remember_coupling(self, layer: Layer, length: Tensor) -> None:
        """rho of this step, as seen from the re-weighted samples, for the next."""
        weight = self._weights.get(layer.name)
        coefficient = layer.policy.coefficient if layer.policy is not None else None
        if weight is not None and coefficient is not None:
            self._ratios[layer.name] = Coupling(length), weight * coefficient.square()

    def settle(self) -> None:
        """Keep this step's rho for the next ones; one synchronisation for all layers."""
        if not self._ratios:
            return
        couplings, own = zip(*self._ratios.values(), strict=True)
        squares = torch.stack([one.to(own[0].device) for one in own])
        found = mean_field(couplings, squares, self.ranks.pool)
        ratios = found.double().unbind() if traced() else found.tolist()
        for name, ratio in zip(self._ratios, ratios, strict=True):
            before = self.running.get(name, ratio)
            self.running[name] = COUPLING_DECAY * before + (1 - COUPLING_DECAY) * ratio
