# SPDX-License-Identifier: MIT
"""Parameters without dimensions, such as a temperature that is learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def trained(shape: tuple[int, ...], steps: int = 4, **options: Any) -> Tensor:
    torch.manual_seed(0)
    front: list[nn.Module] = [nn.Linear(6, 6), Scale(*shape), nn.Tanh()]
    model = nn.Sequential(*front, nn.Linear(6, 3), Scale(*shape)).double()
    opt = DDPNOpt(model, **{"lr": 0.3, **options})
    for number in range(steps):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).double()
        opt.zero_grad()
        F.cross_entropy(model(x), torch.arange(8) % 3).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("feedback", [True, "open_loop", False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"curvature": "rmsprop"},
        {"curvature": "adamw", "lr": 0.05},
        {"curvature": "kfac", "lr": 0.05},
        {"curvature": "ekfac", "lr": 0.05},
        {"curvature": "trust"},
        {"value": "low_rank"},
        {"value": "gauss_newton"},
        {"value": "dense"},
    ],
    ids=str,
)
def test_they_are_trained_as_those_with_one_element(
    options: dict[str, Any], feedback: bool | str
) -> None:
    ours = trained((), feedback=feedback, **options)
    torch.testing.assert_close(ours, trained((1,), feedback=feedback, **options))
    assert float((ours - trained((), steps=0)).abs().max()) > 1e-3
