# SPDX-License-Identifier: MIT
"""What people add to a training loop works unchanged: groups, schedules, clipping, resuming."""

import io

import torch
from torch import nn

from ddpnopt import DDPNOpt

torch.manual_seed(0)
x, y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
loader = [(x[:32], y[:32]), (x[32:], y[32:])]


def build() -> nn.Sequential:
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )


model = build()
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

# --8<-- [start:groups]
groups = [
    {"params": model[0].parameters(), "lr": 0.05},
    {"params": model[5].parameters(), "weight_decay": 1e-4},
]
opt = DDPNOpt(model, lr=0.1, momentum=0.9, params=groups)
schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)
# --8<-- [end:groups]

# --8<-- [start:loop]
for _ in range(3):
    for inputs, labels in loader:
        opt.zero_grad()
        # Two forward and backward passes before one step: their gradients and records add up.
        for part, part_labels in zip(inputs.split(16), labels.split(16), strict=True):
            (criterion(model(part), part_labels) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        opt.step()
    schedule.step()
# --8<-- [end:loop]

# --8<-- [start:resume]
checkpoint = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint)
checkpoint.seek(0)
saved = torch.load(checkpoint, weights_only=True)

resumed = build()
resumed.load_state_dict(saved["model"])
groups = [{"params": resumed[0].parameters()}, {"params": resumed[5].parameters()}]
opt_resumed = DDPNOpt(resumed, lr=0.1, momentum=0.9, params=groups)
opt_resumed.load_state_dict(saved["optimizer"])
# --8<-- [end:resume]

print("resumed at lr", [group["lr"] for group in opt_resumed.param_groups])
