# SPDX-License-Identifier: MIT
"""A ResNet-20 with GroupNorm: residual connections need nothing but the changed line.

On DIGITS, so that it runs in seconds; with CIFAR-10's files in a folder,
`load("cifar-10", images=True, folder=...)` gives images of 32 x 32 instead.
"""

import torch
from torch import nn

from ddpnopt import DDPNOpt, explain
from ddpnopt.experiments.data import load
from ddpnopt.experiments.nets import resnet20

torch.manual_seed(0)
data = load("digits", scale="pooled", images=True)
x, y = data.x_train[:640], data.y_train[:640]

# --8<-- [start:loop]
model = resnet20(classes=10, width=8, norm="gn", planes=1)
criterion = nn.CrossEntropyLoss()
opt = DDPNOpt(model, lr=0.1)  # was: torch.optim.SGD(model.parameters(), lr=0.1)

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

# --8<-- [start:explain]
table = explain(model, x[:32])
treatments = [row.treatment for row in table.rows]
print({kind: treatments.count(kind) for kind in sorted(set(treatments))})
print(table.summary())
# --8<-- [end:explain]
