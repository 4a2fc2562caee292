# SPDX-License-Identifier: MIT
"""A small Inception network: parallel branches joined by concatenation."""

import torch
from torch import nn

from ddpnopt import DDPNOpt, explain
from ddpnopt.experiments.data import load
from ddpnopt.experiments.nets import Inception

torch.manual_seed(0)
data = load("digits", scale="pooled", images=True)
x, y = data.x_train[:640], data.y_train[:640]

# --8<-- [start:loop]
model = Inception(planes=1, classes=10, width=8)
criterion = nn.CrossEntropyLoss()
opt = DDPNOpt(model, lr=0.2)  # was: torch.optim.SGD(model.parameters(), lr=0.2)

for epoch in range(2):
    for batch in torch.randperm(len(x)).split(32):
        opt.zero_grad()
        loss = criterion(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
    with torch.no_grad():
        logits = model(data.x_test)
    loss, right = criterion(logits, data.y_test), logits.argmax(1) == data.y_test
    print(f"epoch {epoch + 1}: test loss {loss:.3f}, {right.float().mean():.1%} right")
# --8<-- [end:loop]

print(explain(model, x[:32]).summary())
