# SPDX-License-Identifier: MIT
"""What a layer's policy did, for `opt.last_step`."""

from __future__ import annotations

import torch

from ddpnopt.layer import Layer
from ddpnopt.report import LayerReport
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks


def diagnosed(layer: Layer, vectors: Blocks, norms: bool) -> LayerReport:
    """The layer's record.

    Args:
        layer: Its policy has just been asked.
        vectors: What it has answered.
        norms: Compute |k| and |K dx|, at the cost of two weight gradients.
    """
    policy = layer.policy
    assert policy is not None
    k = Kdx = None
    coefficient = policy.coefficient
    if norms:
        forward = policy(layer, None)
        joint = [g + v for g, v in zip(layer.plain_vectors(), forward, strict=True)]
        feedback = [v - f for v, f in zip(vectors, forward, strict=True)]
        k, Kdx = _length(layer, joint), _length(layer, feedback)
        policy.coefficient = coefficient
    return LayerReport(layer.name, coefficient, policy.S, k, Kdx)


def _length(layer: Layer, vectors: Blocks) -> Tensor:
    steps = layer.applied(layer.weighted(vectors))
    return torch.stack([step.square().sum() for step in steps.values()]).sum().sqrt()
