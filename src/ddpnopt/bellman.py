# SPDX-License-Identifier: MIT
"""The Bellman backward pass through the recorded layers, at the step: algebra.

V through the activation, M's statistics, Gram products, the backup, layer by layer from the output.
What it needs of the linearised dynamics has been kept by `linearise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ddpnopt.layer import Layer
from ddpnopt.value.base import Blocks, Recursion


def backward(
    layers: Mapping[str, Layer],
    recursion: Recursion,
    feed: Callable[[Layer, Blocks | None], None],
    statistics: str,
    to_input: bool = True,
) -> None:
    """Algorithm 3, step 3: from the output to the input, set every layer's gain and policy.

    Args:
        layers: Layers in execution order.
        recursion: The value function at the output.
        feed: Updates a layer's M with V_h - g (None: with the plain gradient) and sets its gain.
        statistics: "value" or "plain".
        to_input: Nothing lies below the first layer, so there is nothing to back up to.
    """
    for index, layer in reversed(list(enumerate(layers.values()))):
        correction = recursion.correction(layer) if statistics == "value" else None
        feed(layer, correction)
        layer.policy = recursion.back(layer, bottom=to_input and index == 0)
        if not layer.keep_gain:
            layer.gain = {}
    recursion.close()
