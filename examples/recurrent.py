# SPDX-License-Identifier: MIT
"""GRU and LSTM cells unrolled in Python: one layer that runs once for every row of an image."""

import torch
from torch import nn

from ddpnopt import DDPNOpt, explain
from ddpnopt.experiments.data import load
from ddpnopt.experiments.nets import Recurrent

torch.manual_seed(0)
data = load("digits", scale="pooled", images=True)
x, y = data.x_train, data.y_train
criterion = nn.CrossEntropyLoss()

# --8<-- [start:loop]
for lstm in (False, True):
    model = Recurrent(features=8, classes=10, width=32, lstm=lstm)
    opt = DDPNOpt(model, lr=0.5)  # was: torch.optim.SGD(model.parameters(), lr=0.5)
    for _epoch in range(3):
        for batch in torch.randperm(len(x)).split(32):
            opt.zero_grad()
            loss = criterion(model(x[batch]), y[batch])
            loss.backward()
            opt.step()
    with torch.no_grad():
        accuracy = (model(data.x_test).argmax(1) == data.y_test).float().mean()
    name = type(model.cell).__name__
    print(f"{name}: last training loss {loss.item():.3f}, {accuracy:.1%} of the test part right")
    print(explain(model, x[:32]).summary())
# --8<-- [end:loop]
