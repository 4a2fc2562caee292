# SPDX-License-Identifier: MIT
"""Gram matrices of a layer's columns, some samples at a time.

The columns of a batch are r + 1 times its states. Where these are large, putting them side by side
and spreading them for a convolution's products takes longer than the products themselves: all of it
is memory that the process asks the system for. A few samples' columns stay in memory that is used
again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddpnopt.positions import AT_ONCE
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.layer import Layer


def gram_of(layer: Layer, stage: Stage, samples: int) -> Tensor:
    """eta (g, Z)_u^T M^-1 (g, Z)_u of one pass, (samples, 1 + r, 1 + r).

    Args:
        layer: The layer.
        stage: The pass, with columns.
        samples: Number of its samples.
    """
    x, G, Z = layer.x(stage), layer.G(stage), stage.Z_h
    assert Z is not None
    step = max(1, AT_ONCE * samples // max(1, G.numel() + Z.numel()))
    # A sketch draws its filters once for all samples.
    if step >= samples or len(x) % samples or len(G) % samples or layer.sketch is not None:
        step = samples
    parts = []
    for at in range(0, samples, step):
        n = min(step, samples - at)
        some_x, some_G = (
            t.narrow(0, at * (len(t) // samples), n * (len(t) // samples)) for t in (x, G)
        )
        some_Z = Z.narrow(1, at * (len(G) // samples), n * (len(G) // samples))
        columns = torch.cat([some_G[None], some_Z.to(layer.dtype)])
        parts.append(layer.rule.gram(layer.module, some_x, columns, layer.gain, n, layer.sketch))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
