# SPDX-License-Identifier: MIT
"""A graph network by plain torch operations: neighbours are summed by a product with adjacency."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GraphLayer(nn.Module):
    """relu(W h + V A h): a node's own features and the sum of its neighbours'.

    Args:
        inputs: Features of a node.
        outputs: Features after the layer.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.neighbours = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, adjacency: Tensor, h: Tensor) -> Tensor:
        """Adjacency (B, n, n), features (B, n, inputs) -> (B, n, outputs)."""
        return torch.relu(self.own(h) + self.neighbours(adjacency @ h))


class GraphNet(nn.Module):
    """Classifies graphs: three layers with skip connections, mean and maximum over the nodes.

    Args:
        features: Features of a node.
        classes: Number of outputs.
        width: Features of a node within the net.
    """

    def __init__(self, features: int = 1, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.embed = GraphLayer(features, width)
        self.first, self.second = GraphLayer(width, width), GraphLayer(width, width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, graph: Tensor) -> Tensor:
        """Adjacency and features side by side (B, n, n + features) -> (B, classes)."""
        nodes = graph.shape[1]
        adjacency, h = graph[..., :nodes], graph[..., nodes:]
        adjacency = adjacency / adjacency.sum((1, 2), keepdim=True).clamp(min=1) * nodes
        h = self.embed(adjacency, h)
        h = h + self.first(adjacency, h)
        h = h + self.second(adjacency, h)
        logits: Tensor = self.head(torch.cat([h.mean(1), h.amax(1)], -1))
        return logits
