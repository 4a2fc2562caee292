# SPDX-License-Identifier: MIT
"""The one place that knows the names of the library's scalar coefficients."""

from __future__ import annotations

import torch

from ddpnopt.value.line import Envelope, Flow, Line
from oracles.moreau_scalar import LineModel


def _row(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def library_coefficient(line: LineModel, total: float, q: float) -> float:
    """The envelope's policy coefficient for one sample in float64."""
    excess = None if line.excess is None else _row(line.excess)
    return float(Envelope(Line(_row(line.kappa), excess), _row(total))(_row(q))[0])


def library_flow(line: LineModel, total: float, q: float) -> float:
    """The gradient flow's policy coefficient for one sample in float64; logistic lines only."""
    assert line.excess is not None
    model = Line(_row(line.kappa), _row(line.excess))
    return float(Flow.of(model, _row(total))(_row(q))[0])
