# SPDX-License-Identifier: MIT
"""The borrowed optimizer's own step, for every parameter outside the feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ddpnopt.borrowed import Update
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.positions import Kronecker
from ddpnopt.step import Step
from ddpnopt.typing import Tensor

#: By parameter: what has been added to p.grad, and what M was fed with besides p.grad.
Carried = Mapping[Tensor, tuple[Tensor | None, Tensor | None]]


@dataclass(eq=False)
class PlainRecord:
    """A recorded layer outside the feedback: what p.grad of its parameters does not hold."""

    layer: Layer

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The plain gradients by the layer's rule, in the units in which backward left p.grad."""
        return self.layer.weighted(self.layer.plain_vectors())

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """Sums of the samples' squared gradients, likewise."""
        return self.layer.squares(self.layer.plain_vectors())


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
    updates: list[Update] = []
    records: dict[int, tuple[str, PlainRecord]] = {}
    for record in map(PlainRecord, layers):
        records.update({id(p): (name, record) for name, p in record.layer.params.items()})
    for p in parameters:
        if id(p) in done or not p.requires_grad:
            continue
        name, known = records.get(id(p), ("", None))
        gradient = p.grad
        if gradient is None and known is not None:
            gradient = known.gradients[name] * rescale
        if gradient is None:
            continue
        squares = None
        if known is not None and step.borrowed.hyper[p].curvature.statistics == "squares":
            squares = known.squares[name] * rescale**2, sum(known.layer.counts)
        update = _update(step, p, gradient, carried, {} if added else front, rescale)
        if p in front:
            assert update.fed is not None
            moment = step.borrowed.moment(p, update.fed, squares)
            P = step.borrowed.gain(p, moment, rescale)
            assert not isinstance(P, Kronecker)
            lengths.append(((update.d / rescale).square() * P).sum())
            update = replace(update, moment=moment)
        updates.append(replace(update, squares=squares))
    step.borrowed.apply(updates)
    return torch.stack(lengths).sum() if lengths else None


def _update(
    step: Step,
    p: Tensor,
    gradient: Tensor,
    carried: Carried,
    to_add: Mapping[Tensor, Tensor],
    rescale: float,
) -> Update:
    """One parameter's update, with its re-weighted gradient."""
    correction, extra = carried.get(p, (None, None))
    plain = gradient if correction is None else gradient - rescale * correction
    if p in to_add:
        correction = to_add[p]
        gradient = plain + rescale * correction
    fed = plain if extra is None else plain + rescale * extra
    reweighted = correction is not None
    follows = reweighted and step.settings.value.statistics == "plain"
    return Update(p, gradient, fed=fed, plain=plain if reweighted else None, follows=follows)


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
