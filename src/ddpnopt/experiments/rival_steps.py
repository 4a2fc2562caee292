# SPDX-License-Identifier: MIT
"""What rivals do to the gradients between the backward pass and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ddpnopt.curvature.trust import lengths

#: Weights shorter than this are clipped as if they were so long: fresh biases are zero.
SHORTEST = 1e-3


@torch.no_grad()
def clip_by_unit(parameters: Sequence[Tensor], threshold: float) -> None:
    """Adaptive gradient clipping (Brock et al. 2021): |g| <= threshold |w| for every unit.

    Args:
        parameters: Their gradients are changed in place.
        threshold: Largest ratio of the norms.
    """
    for p in parameters:
        if p.grad is None:
            continue
        longest = lengths(p).clamp_(min=SHORTEST).mul_(threshold)
        p.grad.mul_((longest / lengths(p.grad).clamp_(min=1e-12)).clamp_(max=1.0))


@contextmanager
def sharpened(parameters: Sequence[Tensor], radius: float) -> Iterator[None]:
    """Within the block the weights stand where the loss rises most (SAM, Foret et al. 2021).

    Args:
        parameters: With the gradients of the loss at the weights.
        radius: How far away, as a Euclidean distance over all of them.
    """
    known = [p for p in parameters if p.grad is not None]
    with torch.no_grad():
        before = [p.clone() for p in known]
        length = torch.nn.utils.get_total_norm([p.grad for p in known if p.grad is not None])
        for p in known:
            assert p.grad is not None
            p.add_(p.grad * (radius / length.clamp(min=1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(known, before, strict=True):
                p.copy_(old)
