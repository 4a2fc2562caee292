# SPDX-License-Identifier: MIT
"""Gram matrices of a layer's columns, and the lengths of single ones.

The columns of a batch are r + 1 times its states. Where these are large, putting them side by side
and spreading them for a convolution's products takes longer than the products themselves: all of it
is memory that the process asks the system for. A few samples' columns stay in memory that is used
again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ddpnopt.layers import MatrixRule
from ddpnopt.layers.coordinates import Coordinates
from ddpnopt.positions import AT_ONCE, Kronecker
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


def lengths_of(layer: Layer, stage: Stage, samples: int) -> Tensor:
    """eta g_u^T M^-1 g_u of one pass, (samples,); what it had to form is kept for the feedback."""
    x, G, P = layer.x(stage), layer.G(stage), layer.gain.get("weight")
    rest = {name: one for name, one in layer.gain.items() if name != "weight"}
    part: Tensor | None = None
    if isinstance(P, Kronecker) and (rotated := layer.rotated.pop(stage, None)) is not None:
        layer.kept[stage], part = rotated.kept, rotated.lengths(P)
    elif layer.sketch is None or isinstance(P, Kronecker):
        kept = layer.rule.kept_gram(layer.module, x, G[None], layer.gain, samples)
        if kept is not None:
            layer.kept[stage] = kept[1]
            return kept[0][:, 0, 0]
    if part is None and isinstance(P, Kronecker) and isinstance(layer.rule, MatrixRule):
        V = layer.rule.outputs(layer.module, G[None], samples)[0]
        if Coordinates.pays(V, layer.rule.width(layer.module)):
            found = layer.coordinates.get(stage)
            if found is None or not found.fits(P):  # else it was made to measure P
                U = layer.rule.inputs(layer.module, x, samples)
                found = layer.coordinates[stage] = Coordinates.of(U, V, (P.A, P.G), P.bias)
            part = found.lengths(P)
    if part is None:
        return layer.rule.lengths(layer.module, x, G, layer.gain, samples, layer.sketch)
    return part + layer.rule.lengths(layer.module, x, G, rest, samples) if rest else part
