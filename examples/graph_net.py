# SPDX-License-Identifier: MIT
"""A graph network by plain torch operations: a product with the adjacency matrix, skips."""

import torch
from torch import nn

from ddpnopt import DDPNOpt, explain
from ddpnopt.experiments.nets import GraphNet
from ddpnopt.experiments.tasks import graphs

torch.manual_seed(0)
train, test = graphs(count=1600, seed=0), graphs(count=400, seed=1)

# --8<-- [start:loop]
model = GraphNet(features=1, classes=4, width=16)
criterion = nn.CrossEntropyLoss()
opt = DDPNOpt(model, lr=0.1)  # was: torch.optim.SGD(model.parameters(), lr=0.1)

for epoch in range(3):
    for batch in torch.randperm(len(train.x)).split(32):
        opt.zero_grad()
        loss = criterion(model(train.x[batch]), train.y[batch])
        loss.backward()
        opt.step()
    with torch.no_grad():
        logits = model(test.x)
    accuracy = (logits.argmax(1) == test.y).float().mean()
    print(f"epoch {epoch + 1}: test loss {criterion(logits, test.y):.3f}, {accuracy:.1%} right")
# --8<-- [end:loop]

print(explain(model, train.x[:32]).summary())
