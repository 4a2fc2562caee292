# SPDX-License-Identifier: MIT
"""The one place that knows the names of the library's scalar coefficient."""

from __future__ import annotations

import torch
from oracles.moreau_scalar import LineModel

from ddpnopt.value import moreau


def library_coefficient(line: LineModel, total: float, q: float) -> float:
    """The library's policy coefficient for one sample in float64."""

    def row(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    model = moreau.Line(kappa=row(line.kappa), excess=row(line.excess or 0.0))
    return float(moreau.coefficient(model, row(total), row(q))[0])
