# SPDX-License-Identifier: MIT
"""Weights that ask for no gradient while their layers run (``weight_gradients=False``)."""

from __future__ import annotations

from torch import nn

from ddpnopt.inert import Anchor
from ddpnopt.typing import Tensor
from ddpnopt.watch import Watch


class Holding:
    """The weights that are held now, by their layers' names."""

    def __init__(self) -> None:
        self._held: dict[str, nn.Parameter] = {}

    def hold(self, name: str, weight: nn.Parameter) -> None:
        """A layer begins: its weight asks for no gradient."""
        self._held[name] = weight  # noted first: it may be interrupted here
        weight.requires_grad_(False)

    def let_go(self, name: str) -> bool:
        """A layer has run: its weight asks again. Whether it was held."""
        weight = self._held.pop(name, None)
        if weight is not None:
            weight.requires_grad_(True)
        return weight is not None

    def release(self) -> None:
        """All of them ask again, whose layers were interrupted."""
        for weight in self._held.values():
            weight.requires_grad_(True)
        self._held.clear()


def anchored(output: Tensor, token: Tensor, watch: Watch | None) -> Tensor:
    """An output that gets a gradient, of a layer none of whose parameters asks for one.

    Args:
        output: The layer's.
        token: Asks for a gradient, whatever the layer does.
        watch: Learns the new name of the output.
    """
    before = output.grad_fn, output.output_nr
    after: Tensor = Anchor.apply(output, token)  # type: ignore[no-untyped-call]
    if watch is not None:
        watch.renamed(*before, after)
    return after
