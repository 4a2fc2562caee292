# SPDX-License-Identifier: MIT
"""The borrowed optimizer's own step, for every parameter outside the feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ddpnopt.bellman import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.positions import Kronecker
from ddpnopt.step import Step
from ddpnopt.typing import Tensor

#: By parameter: what has been added to p.grad, and what M was fed with besides p.grad.
Carried = Mapping[Tensor, tuple[Tensor | None, Tensor | None]]


@dataclass(eq=False)
class PlainRecord:
    """A parameter of a recorded layer outside the feedback: what p.grad does not hold."""

    name: str
    layer: Layer
    curvature_statistics: str

    def gradient(self, scale: float) -> Tensor:
        """The plain gradient by the layer's rule, in p.grad's units."""
        return self.layer.weighted(self.layer.plain_vectors())[self.name] * scale

    def squares(self, scale: float) -> tuple[Tensor, int] | None:
        """Sum of the samples' squared gradients and their number, where M is fed with them."""
        if self.curvature_statistics != "squares":
            return None
        squares = self.layer.squares(self.layer.plain_vectors())[self.name]
        return squares * scale**2, sum(self.layer.counts)


def plain_updates(
    step: Step,
    parameters: Iterable[Tensor],
    carried: Carried,
    front: Mapping[Tensor, Tensor],
    rescale: float,
    added: bool,
) -> Tensor | None:
    """Update the parameters outside the feedback.

    They come first: a plain layer between two others shows them its new weights in the rollout.

    Args:
        step: The step, its layers in feedback built.
        parameters: The optimizer's parameters.
        carried: In open loop, the re-weighting that p.grad holds.
        front: d - gbar of parameters in front of a mixing of samples.
        rescale: r.
        added: p.grad holds `front` already (open loop).

    Returns:
        d^T P d of the front's parameters; None where there are none.
    """
    lengths: list[Tensor] = []
    layers = step.plain_layers()
    done = {id(p) for layer in step.layers.values() for p in layer.params.values()}
    for layer in layers:
        done.update(id(layer.params[name]) for name in step.borrowed.joined(layer))
        lengths += _joint_update(step, layer, {} if added else front, rescale, front)
    records: dict[Tensor, PlainRecord] = {
        p: PlainRecord(name, layer, step.borrowed.hyper[p].curvature.statistics)
        for layer in layers
        for name, p in layer.params.items()
    }
    for p in parameters:
        if id(p) in done or not p.requires_grad:
            continue
        gradient = p.grad
        if gradient is None and p in records:
            gradient = records[p].gradient(rescale)
        if gradient is None:
            continue
        squares = records[p].squares(rescale) if p in records else None
        correction, extra = carried.get(p, (None, None))
        plain = gradient if correction is None else gradient - rescale * correction
        if p in front and not added:
            correction = front[p]
            gradient = plain + rescale * correction
        fed = plain if extra is None else plain + rescale * extra
        moment = step.borrowed.moment(p, fed, squares)
        follow = step.settings.value.statistics == "plain" and correction is not None
        if p in front:
            P = step.borrowed.gain(p, moment, rescale)
            assert not isinstance(P, Kronecker)
            lengths.append(((gradient / rescale).square() * P).sum())
        step.borrowed.step(p, gradient, moment, plain if follow else None)
    return torch.stack(lengths).sum() if lengths else None


def _joint_update(
    step: Step,
    layer: Layer,
    to_add: Mapping[Tensor, Tensor],
    rescale: float,
    front: Mapping[Tensor, Tensor],
) -> list[Tensor]:
    """The step of the parameters that a Kronecker curvature joins; d^T P d if in the front."""
    joined = step.borrowed.joined(layer)
    if not joined:
        return []
    d = {name: grad for name in joined if (grad := layer.params[name].grad) is not None}
    if len(d) < len(joined):
        total = layer.weighted(layer.plain_vectors())
        d = {name: d[name] if name in d else total[name] * rescale for name in joined}
    for name in joined:
        if layer.params[name] in to_add:
            d[name] = d[name] + rescale * to_add[layer.params[name]]
    joint = step.borrowed.joint(layer, layer.plain_vectors(), rescale)
    lengths = []
    if layer.params["weight"] in front:
        life = step.borrowed.hyper[layer.params["weight"]].life * rescale
        gain = step.borrowed.joint_gain(layer, joint, life)
        assert isinstance(layer.rule, MatrixRule)
        D = layer.rule.joined(layer.module, d, gain.bias)
        lengths.append(gain.square(D) / rescale**2)
    step.borrowed.joint_step(layer, d, joint)
    return lengths
