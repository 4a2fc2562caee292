# SPDX-License-Identifier: MIT
"""Two transformer encoders: attention of dense layers, and torch's `nn.MultiheadAttention`."""

import torch
from torch import nn

from ddpnopt import DDPNOpt, explain
from ddpnopt.experiments.data import load
from ddpnopt.experiments.nets import Transformer

torch.manual_seed(0)
data = load("digits", scale="pooled", images=True)
x, y = data.x_train, data.y_train
criterion = nn.CrossEntropyLoss()

# --8<-- [start:loop]
for own in (True, False):
    model = Transformer(data.input_shape, classes=10, width=32, blocks=2, own=own)
    opt = DDPNOpt(model, lr=0.2)  # was: torch.optim.SGD(model.parameters(), lr=0.2)
    for _epoch in range(3):
        for batch in torch.randperm(len(x)).split(32):
            opt.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            loss.backward()
            opt.step()
    with torch.no_grad():
        accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    name = type(model.blocks[0].attention).__name__
    print(f"{name}: last training loss {loss.item():.3f}, {accuracy:.1%} of the test part right")
    print(explain(model, x[:32]).summary())
# --8<-- [end:loop]
