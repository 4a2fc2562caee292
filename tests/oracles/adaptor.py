# SPDX-License-Identifier: MIT
"""The one place that knows the names of the library's scalar coefficient."""

from __future__ import annotations

import torch

from ddpnopt.value.line import Line, coefficient
from oracles.moreau_scalar import LineModel


def library_coefficient(line: LineModel, total: float, q: float) -> float:
    """The library's policy coefficient for one sample in float64."""

    def row(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    excess = None if line.excess is None else row(line.excess)
    return float(coefficient(Line(row(line.kappa), excess), row(total), row(q))[0])
