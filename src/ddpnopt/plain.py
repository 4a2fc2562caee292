# SPDX-License-Identifier: MIT
"""The borrowed optimizer's own step, for every parameter outside the feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ddpnopt.directions import squares
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.positions import Kronecker
from ddpnopt.ranks import Ranks
from ddpnopt.step import Step
from ddpnopt.typing import Tensor
from ddpnopt.updates import Update

#: By parameter: what has been added to p.grad, and what M was fed with besides p.grad.
Carried = Mapping[Tensor, tuple[Tensor | None, Tensor | None]]


@dataclass(eq=False)
class PlainRecord:
    """A recorded layer outside the feedback: what p.grad of its parameters does not hold."""

    layer: Layer
    ranks: Ranks

    @cached_property
    def gradients(self) -> Mapping[str, Tensor]:
        """The plain gradients by the layer's rule, in the units that the samples' are in."""
        return self.ranks.total(self.layer.weighted(self.layer.plain_vectors()))

    @cached_property
    def squares(self) -> tuple[dict[str, Tensor], int]:
        """Sums of the samples' squared gradients, likewise, and the number of samples."""
        return squares(self.layer, self.layer.plain_vectors(), self.ranks)


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
    own = step.settings.correction_scale
    for record in (PlainRecord(layer, step.ranks) for layer in layers):
        records.update({id(p): (name, record) for name, p in record.layer.params.items()})
    for p in parameters:
        if id(p) in done or not p.requires_grad:
            continue
        name, known = records.get(id(p), ("", None))
        gradient = p.grad
        if gradient is None and known is not None:
            gradient = known.gradients[name] * own
        if gradient is None:
            continue
        seen = None
        if known is not None and step.borrowed.hyper[p].curvature.statistics == "squares":
            total, samples = known.squares
            seen = total[name] * own**2, samples
        update = _update(step, p, gradient, carried, {} if added else front, rescale)
        if p in front:
            assert update.fed is not None
            moment = step.borrowed.moment(p, update.fed, seen)
            P = step.borrowed.gain(p, moment, rescale)
            assert not isinstance(P, Kronecker)
            lengths.append(((update.d / rescale).square() * P).sum())
            update = replace(update, moment=moment)
        updates.append(replace(update, squares=seen))
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
        total = step.ranks.total(layer.weighted(layer.plain_vectors()))
        own = step.settings.correction_scale
        d = {name: d[name] if name in d else total[name] * own for name in joined}
    for name in joined:
        if layer.params[name] in to_add:
            d[name] = d[name] + rescale * to_add[layer.params[name]]
    scale = step.settings.rescale
    joint = step.borrowed.joint(layer, layer.plain_vectors(), scale, step.ranks)
    lengths = []
    if layer.params["weight"] in front:
        life = step.borrowed.hyper[layer.params["weight"]].life * rescale
        gain = step.borrowed.joint_gain(layer, joint, life)
        assert isinstance(layer.rule, MatrixRule)
        D = layer.rule.joined(layer.module, d, gain.bias)
        lengths.append(gain.square(D) / rescale**2)
    step.borrowed.joint_step(layer, d, joint)
    return lengths
