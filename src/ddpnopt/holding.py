# SPDX-License-Identifier: MIT
"""Weights that ask for no gradient while their layers run (``weight_gradients=False``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpnopt.inert import Anchor
from ddpnopt.layers import rule_for
from ddpnopt.typing import Tensor
from ddpnopt.watch import Watch


class Holding:
    """The weights that are held now, by their layers' names; some with their biases."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[nn.Parameter, ...]] = {}

    def hold(self, name: str, *parameters: nn.Parameter) -> None:
        """A layer begins: these ask for no gradient."""
        self._held[name] = parameters  # noted first: it may be interrupted here
        for p in parameters:
            p.requires_grad_(False)

    def let_go(self, name: str) -> tuple[nn.Parameter, ...]:
        """A layer has run: what was held asks again."""
        held = self._held.pop(name, ())
        for p in held:
            p.requires_grad_(True)
        return held

    def release(self) -> None:
        """All of them ask again, whose layers were interrupted."""
        for held in self._held.values():
            for p in held:
                p.requires_grad_(True)
        self._held.clear()


class ApartBias(torch.autograd.Function):
    """Identity in place that gives a bias its gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, axis: int) -> Tensor:
        """Return h itself, as `Anchor` does."""
        ctx.axes = [d for d in range(h.dim()) if d != axis]
        ctx.dtype = bias.dtype
        ctx.mark_dirty(h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The sum over all axes but the features'."""
        (g,) = gradients
        return g, (g.sum(ctx.axes) if ctx.axes else g).to(ctx.dtype), None


def seen(
    output: Tensor,
    module: nn.Module,
    held: tuple[nn.Parameter, ...],
    token: Tensor,
    watch: Watch | None,
) -> Tensor | None:
    """A layer's output that gets a gradient although what was held does not ask for one.

    Args:
        output: The layer's.
        module: The layer.
        held: What was held: its weight, perhaps its bias.
        token: Asks for a gradient, whatever the layer does.
        watch: Learns the new name of the output.

    Returns:
        The output to use; None where it may stay as it is.
    """
    rule = rule_for(module)
    if len(held) == 2 and rule is not None:
        axis = output.dim() + rule.feature_axis - rule.batched_dim(module)
        return _through(ApartBias, output, watch, held[1], axis)
    bias = module._parameters.get("bias")
    if bias is None or not bias.requires_grad:
        return _through(Anchor, output, watch, token)
    return None


def _through(
    function: type[torch.autograd.Function], output: Tensor, watch: Watch | None, *others: Any
) -> Tensor:
    before = output.grad_fn, output.output_nr
    after: Tensor = function.apply(output, *others)  # type: ignore[no-untyped-call]
    if watch is not None:
        watch.renamed(*before, after)
    return after
