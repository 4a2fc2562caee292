# SPDX-License-Identifier: MIT
"""Nets with several outputs, and the sum of their losses as one loss of all outputs together.

The oracle's net ends in a concatenation of the outputs; the library's returns them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, vmap
from torch.nn import functional as F

from oracles.graph import Net, Program
from oracles.graph_parts import cat
from oracles.moreau_scalar import LineModel

#: Losses of one sample's output and target, without a factor.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda z, y: F.cross_entropy(z[None], y.long()[None], reduction="sum"),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z, y[None].double(), reduction="sum"),
    "squared": lambda z, y: (z - y).square().mean(),
    "penalty": lambda z, y: (z.exp() - z + 0.5 * z.square()).sum(),
    "none": lambda z, y: 0 * z.sum(),
}


@dataclass(frozen=True)
class Output:
    """One output: its value's index, its width, its loss and the factor of that.

    Attributes:
        known: The library can tell the loss's curvature.
        ignored: Samples without a target here.
    """

    index: int
    width: int
    loss: str
    factor: float = 1.0
    known: bool = True
    ignored: tuple[int, ...] = ()


class Several(nn.Module):
    """A net that returns some of its values."""

    def __init__(self, net: Net, outputs: Sequence[Output]) -> None:
        """Take the layers over; what puts the outputs together is left out."""
        super().__init__()
        self.layers, self.bare, self.nodes = net.layers, net.bare, net.nodes[:-1]
        self.indices = [output.index for output in outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the list."""
        values = list(inputs)
        for node in self.nodes:
            arguments = [self.bare[i] if isinstance(i, str) else values[i] for i in node.sources]
            run = self.layers[node.what] if isinstance(node.what, str) else node.what
            values.append(run(*arguments))
        return tuple(values[i] for i in self.indices)


class Joint:
    """A net's outputs with targets for a batch.

    Args:
        layers: The net's layers.
        program: Its nodes, all but the concatenation.
        outputs: Its outputs.
        x: The batch.
    """

    def __init__(
        self, layers: dict[str, nn.Module], program: Program, outputs: Sequence[Output], x: Tensor
    ) -> None:
        """Draw targets."""
        program(cat, *(output.index for output in outputs))
        self.net, self.outputs, self.x = Net(layers, program), tuple(outputs), x
        generator = torch.Generator().manual_seed(7)
        self.targets = []
        for one in outputs:
            drawn = torch.randn(len(x), one.width, generator=generator, dtype=torch.float64)
            labels = {"cross_entropy": drawn.argmax(1).double(), "bce": (drawn[:, 0] > 0).double()}
            self.targets.append(labels.get(one.loss, drawn))
        self.used = torch.ones(len(x), len(outputs), dtype=torch.float64)
        for k, one in enumerate(outputs):
            self.used[list(one.ignored), k] = 0.0

    def library(self) -> Several:
        """A copy for the library."""
        return Several(copy.deepcopy(self.net), self.outputs)

    def passed(self, found: Sequence[Tensor], rows: slice) -> Tensor:
        """The loss of one pass over some samples, a part of the whole batch's mean."""
        total = torch.zeros((), dtype=torch.float64)
        for k, (one, z) in enumerate(zip(self.outputs, found, strict=True)):
            if one.loss == "none":
                continue
            y = self.targets[k][rows]
            if one.loss == "cross_entropy":
                y = torch.where(self.used[rows, k] > 0, y, -100.0).long()
                loss = F.cross_entropy(z, y, ignore_index=-100, reduction="sum")
            elif one.loss == "bce":
                loss = F.binary_cross_entropy_with_logits(z[:, 0], y, reduction="sum")
            else:
                loss = vmap(LOSSES[one.loss])(z, y).sum()
            total = total + one.factor / len(self.x) * loss
        return total

    def plain(self, z: Tensor, used: Tensor, *y: Tensor, known: bool = False) -> Tensor:
        """One sample's loss without the mean's factor; ``known``: what has a known curvature."""
        parts = torch.split(z, [one.width for one in self.outputs])
        total = z.new_zeros(())
        for k, (one, part) in enumerate(zip(self.outputs, parts, strict=True)):
            if one.known or not known:
                total = total + one.factor * used[k] * LOSSES[one.loss](part, y[k])
        return total

    def loss(self, z: Tensor) -> Tensor:
        """The batch's loss of all outputs together."""
        return vmap(self.plain)(z, self.used, *self.targets).mean()

    def hessian(self, z: Tensor) -> Tensor:
        """Its Hessians (B, Z, Z), without what the library can't know."""

        def known(z: Tensor, used: Tensor, *y: Tensor) -> Tensor:
            return self.plain(z, used, *y, known=True)

        return vmap(hessian(known))(z, self.used, *self.targets) / len(z)

    def along_gradient(self, z: Tensor) -> Tensor:
        """Rank one, of the right curvature along the gradient."""
        G = vmap(grad(self.plain))(z, self.used, *self.targets) / len(z)
        along = torch.einsum("bi,bij,bj->b", G, self.hessian(z), G)
        return (along / G.square().sum(1).square())[:, None, None] * G[:, :, None] * G[:, None]

    def lines(self, z: Tensor) -> list[LineModel]:
        """kappa = g^T H g / |g|^4 of the joint loss, and how far its slope can rise along g."""

        def bounded(z: Tensor, used: Tensor, *y: Tensor) -> Tensor:
            return self.plain(z, used, *y, known=True)

        g = vmap(grad(self.plain))(z, self.used, *self.targets)
        square = g.square().sum(1)
        kappa = torch.einsum("bi,bij,bj->b", g, len(z) * self.hessian(z), g) / square.square()
        if any(one.loss == "squared" and one.known for one in self.outputs):
            return [LineModel(float(k), None) for k in kappa]
        slope = vmap(grad(bounded))
        far = slope(z + 1e4 * g / square[:, None], self.used, *self.targets)
        rise = ((far - slope(z, self.used, *self.targets)) * g).sum(1) / square
        return [LineModel(float(k), float(e)) for k, e in zip(kappa, rise, strict=True)]
