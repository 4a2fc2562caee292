# SPDX-License-Identifier: MIT
"""Train a small classifier with DDPNOpt in the plain PyTorch loop."""

import torch
from torch import nn

# --8<-- [start:model]
from ddpnopt import DDPNOpt

torch.manual_seed(0)
centres = torch.randn(5, 16)  # five classes, Gaussian clouds
y = torch.randint(5, (512,))
x = centres[y] + 1.5 * torch.randn(512, 16)

model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
criterion = nn.CrossEntropyLoss()
opt = DDPNOpt(model, lr=0.4)
# --8<-- [end:model]

# --8<-- [start:loop]
for epoch in range(5):
    for batch in torch.randperm(len(x)).split(32):
        opt.zero_grad()
        loss = criterion(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy:.1%}")
# --8<-- [end:loop]

# --8<-- [start:record]
print("terminal cost:", opt.last_step.terminal)
for layer in opt.last_step.layers:
    print(
        f"layer {layer.name}: mean coefficient {layer.coefficient_mean:.3f}, "
        f"samples cut to less than half {layer.bounded_share:.0%}"
    )
# --8<-- [end:record]
