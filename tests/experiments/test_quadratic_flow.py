# SPDX-License-Identifier: MIT
"""The variant with the quadratic line's flow really takes it."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.experiments.better_rule.lines import QuadraticFlow


def test_one_layer_steps_by_the_mean_slope_of_the_flow() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    before = layer.weight.detach().clone()
    x, y = torch.tensor([[0.6, -0.8]]).double(), torch.tensor([[2.0]]).double()
    opt = DDPNOpt(layer, lr=0.7, value=QuadraticFlow(), terminal="mse")
    F.mse_loss(layer(x), y).backward()
    gradient = layer.weight.grad
    assert gradient is not None
    step = 0.7 * gradient.clone()
    opt.step()
    length = 0.7 * 2.0  # eta |x|^2 times the curvature of (z - y)^2
    wanted = before - step * (1 - math.exp(-length)) / length
    torch.testing.assert_close(layer.weight.detach(), wanted)
