# SPDX-License-Identifier: MIT
"""The scale of a GradScaler, for the first step of an open loop.

The weights of the open loop are made in ``backward``, before the scaler divides its scale out of
p.grad again. From the second step on the factor is known from the step before. For the first one a
scaler that lives in this process is believed if with its scale the loss's weights w are more simply
those of a mean or a sum over the samples than without it.
"""

from __future__ import annotations

import gc
import math

import torch

from ddpnopt.gradients import Fingerprint
from ddpnopt.stages import Trajectory
from ddpnopt.terminal import Cost

#: How far a weight may be off; it is fitted.
NEAR = 1e-3


def expected_rescaling(
    fingerprint: Fingerprint, rescale: float, cost: Cost, trajectory: Trajectory
) -> float:
    """r of the pass that runs, as far as it can be known.

    Args:
        fingerprint: Knows whether a step has been taken.
        rescale: r of the step before, or as it was loaded.
        cost: The terminal cost that was recognised.
        trajectory: The pass.
    """
    if fingerprint.expected is None or fingerprint.expected != rescale:
        return rescale
    fingerprint.expected = unscaling(cost, trajectory.samples)
    return fingerprint.expected


def unscaling(cost: Cost, samples: int) -> float:
    """What a scaler is going to multiply the gradients by; 1 if none has scaled the loss.

    Args:
        cost: The terminal cost that was recognised.
        samples: B.
    """
    w = cost.w[cost.w > 0]
    if not w.numel() or float(w.max() - w.min()) > NEAR * float(w.max()):
        return 1.0
    scalers = (one for one in gc.get_objects() if issubclass(type(one), torch.amp.GradScaler))
    # A scaler that was never asked to scale a loss has no tensor yet.
    scales = {s.get_scale() for s in scalers if s.is_enabled() and s._scale is not None}
    mean, total = float(w.mean()) * samples, float(w.mean())
    found, least = 1.0, min(_parts(mean), _parts(total))
    for scale in sorted(scales):
        as_mean, as_sum = _parts(mean / scale), _parts(total / scale)
        if as_mean <= least < math.inf or min(as_mean, as_sum) < least:
            found, least = scale, min(as_mean, as_sum)
    return 1 / found


def _parts(whole: float) -> float:
    """The k for which a weight is 1 / k: the backward passes that are accumulated, if any are."""
    parts = max(1, round(1 / whole))
    return parts if abs(parts * whole - 1) < NEAR else math.inf
