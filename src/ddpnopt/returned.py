# SPDX-License-Identifier: MIT
"""What a model returns that is made of its last layer's output alone: is that what the loss sees?

A temperature, a soft cap, a mean over positions or a prior on the logits are part of the model: the
softmax is over what comes out. The normalisation of a loss (``log_softmax``, ``sigmoid`` before a
binary cross-entropy) is part of the loss, which is recognised at the layer's output. For a squared
error, or a cost of the user's own, every function is part of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.autograd.graph import Node

from ddpnopt.typing import Tensor

#: Only the shape, the order or the type are others: the loss is the same at the layer's output.
SHAPES = frozenset(
    "View UnsafeView ReshapeAlias Transpose T Permute Squeeze Unsqueeze Expand Slice Select Index "
    "Alias Clone ToCopy Unbind Split SplitWithSizes Narrow Copy CopySlices AsStrided".split()
)
#: Functions from logits to logits.
LOGITS = SHAPES | frozenset(
    "Mul Div Add Sub Rsub Neg Tanh Relu Clamp ClampMin ClampMax MaskedFill Where Mean Sum Amax Max "
    "LinalgVectorNorm Norm AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D "
    "AdaptiveMaxPool2D MaxPool2DWithIndices".split()
)


def remade(outputs: Sequence[Tensor], latest: Collection[Node], logits: bool) -> Tensor | None:
    """An output that is another function of the last layer's than the loss begins with.

    Args:
        outputs: What the model returns; none of them is the last layer's output.
        latest: The graph's nodes of the last layer's outputs.
        logits: The loss is of logits, or is still to be recognised.

    Returns:
        The output; None where the loss is to be looked for at the layer's output.
    """
    losses = [t for t in outputs if not t.dim()]
    for output in outputs:
        kinds = _between(output.grad_fn, latest)
        if not output.dim() or not output.is_floating_point() or kinds <= SHAPES:
            continue
        if kinds <= LOGITS if logits else not any("Loss" in kind for kind in kinds):
            end = {output.grad_fn}
            return output if all(_between(one.grad_fn, end) for one in losses) else None
    return None


def _between(top: Node | None, ends: Collection[Node | None]) -> set[str]:
    """The kinds of the nodes on all ways from one down to others, without those of the ends."""
    users: dict[Node, list[Node]] = {}
    stack = [top]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            continue
        for child, _ in node.next_functions:
            if child is not None:
                users.setdefault(child, []).append(node)
                stack.append(child)
    on_the_way: set[Node] = set()
    below = [user for end in ends if end in users for user in users[end]]
    while below:
        node = below.pop()
        if node not in on_the_way:
            on_the_way.add(node)
            below += users.get(node, [])
    return {node.name().rstrip("0123456789").removesuffix("Backward") for node in on_the_way}
