# SPDX-License-Identifier: MIT
"""Which share of ReLU units is dead (0 for every training sample) after RMSprop's first steps."""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import Curvature, RMSprop, Trust

WAYS: dict[str, tuple[str | Curvature, bool]] = {
    "RMSprop": ("rmsprop", False),
    "RMSprop, closed loop": ("rmsprop", True),
    "per-sample RMSprop": (RMSprop(second_moment="per_sample"), False),
    "bounded RMSprop": (Trust("rmsprop"), False),
    "bounded RMSprop, closed loop": (Trust("rmsprop"), True),
}


def dead(model: nn.Sequential, x: Tensor) -> float:
    """Over all ReLU layers."""
    off = []
    for module in model:
        x = module(x)
        if isinstance(module, nn.ReLU):
            off.append((x <= 0).all(0).float())
    return float(torch.cat(off).mean())


def main() -> None:
    """Print the share after 1 and after 50 steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.03, 0.1])
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32)
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)
    for name, (curvature, feedback) in WAYS.items():
        for lr in options.lrs:
            found = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                hidden = [m for a in (64, 20, 20, 20) for m in (nn.Linear(a, 20), nn.ReLU())]
                model = nn.Sequential(*hidden, nn.Linear(20, 10))
                opt = DDPNOpt(model, lr, curvature, feedback=feedback)
                shares = [dead(model, x)]
                for step in range(50):
                    rows = torch.randint(len(x), (16,))
                    opt.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    opt.step()
                    if step in (0, 49):
                        shares.append(dead(model, x))
                accuracy = float((model(x).argmax(1) == y).float().mean())
                found.append([*shares, accuracy])
            start, one, fifty, right = torch.tensor(found).mean(0).mul(100).tolist()
            print(
                f"{name:30} lr {lr:<6g} dead at start {start:3.0f} %, after 1 step {one:3.0f} %, "
                f"after 50 {fifty:3.0f} %; accuracy {right:3.0f} %"
            )


if __name__ == "__main__":
    main()
