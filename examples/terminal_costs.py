# SPDX-License-Identifier: MIT
"""Losses: recognised ones, named ones, and your own by a factor of its Hessian."""

import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt

torch.manual_seed(0)
x, target = torch.randn(32, 6), torch.randn(32, 3)


def build() -> nn.Sequential:
    """Two dense layers."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


# --8<-- [start:named]
# Squared error fits any output gradient, so it cannot be recognised: name it.
model = build()
opt = DDPNOpt(model, lr=0.5, terminal="mse")
for _ in range(20):
    opt.zero_grad()
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    opt.step()
# --8<-- [end:named]
print(f"squared error: {loss.item():.3f}, terminal cost {opt.last_step.terminal}")


# --8<-- [start:own]
def log_cosh(z: Tensor) -> Tensor:
    """Mean over the batch of sum_c log cosh(z_c - target_c)."""
    return (z - target).cosh().log().sum(1).mean()


def log_cosh_factor(z: Tensor) -> Tensor:
    """Per sample S with S S^T = the Hessian of the loss above: diag(1 - tanh^2) / B."""
    return torch.diag_embed((1 / (z - target).cosh()) / len(z) ** 0.5)


model = build()
opt = DDPNOpt(model, lr=0.5, terminal=log_cosh_factor)
for _ in range(20):
    opt.zero_grad()
    loss = log_cosh(model(x))
    loss.backward()
    opt.step()
# --8<-- [end:own]
print(f"log cosh: {loss.item():.3f}")
