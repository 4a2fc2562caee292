# SPDX-License-Identifier: MIT
"""A recurrent classifier, its cell unrolled in Python: one layer, used once for every step."""

from __future__ import annotations

from torch import Tensor, nn


class Recurrent(nn.Module):
    """Reads an image row by row with a GRU or LSTM cell and classifies its last state.

    Args:
        features: Features of a row.
        classes: Number of outputs.
        width: Features of the state.
        lstm: An `nn.LSTMCell` rather than an `nn.GRUCell`.
    """

    def __init__(
        self, features: int = 8, classes: int = 10, width: int = 32, lstm: bool = False
    ) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(features, width) if lstm else nn.GRUCell(features, width)
        self.head = nn.Linear(width, classes)
        self.width, self.lstm = width, lstm

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, height, columns) -> (B, classes)."""
        rows = x.transpose(1, 2).flatten(2)
        hidden = memory = rows.new_zeros(len(rows), self.width)
        for row in rows.unbind(1):
            if self.lstm:
                hidden, memory = self.cell(row, (hidden, memory))
            else:
                hidden = self.cell(row, hidden)
        logits: Tensor = self.head(hidden)
        return logits
