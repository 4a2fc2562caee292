# SPDX-License-Identifier: MIT
"""How far states have moved since the pass, dx = x^ - x."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpnopt.formed import Formed
from ddpnopt.linearise import cast_state, flat
from ddpnopt.rows import chunk_size
from ddpnopt.typing import Tensor


class Changed(Formed):
    """The changes of the states, one for each pass; formed only where they are looked at.

    Args:
        now: The states that each pass has brought.
        before: Those that have been recorded.
    """

    def __init__(self, now: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        self.now, self.before = now, before

    def __len__(self) -> int:
        """Number of passes."""
        return len(self.now)

    def form(self, index: int) -> Tensor:
        """The change of a pass's states."""
        return self.now[index] - self.before[index]

    def along(self, index: int, g: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
        """g . dx of each sample of a pass, (B, 1); of so many at a time that they stay in cache.

        Args:
            index: Number of the pass.
            g: Gradients at its states, of their shape.
            samples: B.
            dtype: Type of the sums.
        """
        given = [flat(t, samples) for t in (g, self.now[index], self.before[index])]
        size = max(1, chunk_size(g) // max(1, g.numel() // max(1, samples)))
        parts = [
            ((now - before).to(dtype) * cast_state(one, dtype)).sum(1, keepdim=True)
            for one, now, before in zip(*(torch.split(t, size) for t in given), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
