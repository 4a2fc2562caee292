# SPDX-License-Identifier: MIT
"""Vectors that are known by one factor a sample, for rules that can do without the vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpnopt.formed import Formed
from ddpnopt.typing import Tensor


class Weighted(Formed):
    """The h-space vectors a g, one for each pass; formed only where they are looked at.

    Args:
        G: The gradients g of each pass.
        a: (B,) factors over all passes.
        counts: Samples of each pass.
    """

    def __init__(self, G: Sequence[Tensor], a: Tensor, counts: Sequence[int]) -> None:
        self.G, self.a, self.counts = G, a, counts

    def __len__(self) -> int:
        """Number of passes."""
        return len(self.G)

    def form(self, index: int) -> Tensor:
        """The vectors of a pass."""
        G = self.G[index]
        a = torch.split(self.a, list(self.counts))[index].to(G.dtype)
        return (G.reshape(len(a), -1) * a[:, None]).reshape(G.shape)
