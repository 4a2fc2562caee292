# SPDX-License-Identifier: MIT
"""The vanishing-gradient regulariser written out, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oracles.common import ACTIVATIONS, identity
from oracles.flat import Chain


def omega(model: Chain, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Omega of a chain by plain autograd: states and upper gradients detached, weights not."""
    states, outputs = [x], []
    for layer, after in zip(model.layers, model.after, strict=True):
        outputs.append(layer(states[-1]))
        states.append(after(outputs[-1]))
    G = [g.detach() for g in torch.autograd.grad(loss(states[-1]), outputs)]
    total = x.new_zeros(len(x))
    for t in range(len(outputs) - 1):
        h = outputs[t].detach().requires_grad_()
        output = model.layers[t + 1](model.after[t](h))
        (below,) = torch.autograd.grad(output, h, G[t + 1], create_graph=True)
        torch.testing.assert_close(below.detach(), G[t])
        ratio = below.flatten(1).norm(dim=1) / G[t + 1].flatten(1).norm(dim=1)
        total = total + (ratio - 1).square()
    return total.mean()


def by_hand(
    model: Chain, x: Tensor, loss: Callable[[Tensor], Tensor], lr: float, strength: float
) -> None:
    """One step of gradient descent on the loss and Omega."""
    parameters = list(model.parameters())
    plain = torch.autograd.grad(loss(model(x)), parameters)
    own = torch.autograd.grad(omega(model, x, loss), parameters, allow_unused=True)
    with torch.no_grad():
        for p, g, o in zip(parameters, plain, own, strict=True):
            p -= lr * (g if o is None else g + strength * o)


def norms() -> Chain:
    """Layers of other kinds, several without an activation between them."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 6), nn.LayerNorm(6), nn.PReLU(), nn.Linear(6, 5), nn.Linear(5, 3))
    after = [identity, torch.tanh, identity, ACTIVATIONS["softplus"], identity]
    return Chain([m.double() for m in layers], after)
