# SPDX-License-Identifier: MIT
"""Step times on a compiled model and on the same one uncompiled, interleaved.

python benchmarks/compiled_cost.py
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt import DDPNOpt, DDPNOptWarning

ROUNDS, WARM = 60, 12


def network() -> nn.Module:
    """A dense chain of four layers."""
    torch.manual_seed(0)
    hidden = [part for _ in range(3) for part in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def contenders() -> dict[str, tuple[Any, Any]]:
    """What is called, and its optimizer, by name."""
    found: dict[str, tuple[Any, Any]] = {}
    for compiled in (False, True):
        for name in ("SGD", "open loop", "closed loop"):
            model = network()
            call = torch.compile(model) if compiled else model
            if name == "SGD":
                optimizer: Any = torch.optim.SGD(model.parameters(), 0.05)
            else:
                depth = "open_loop" if name == "open loop" else True
                optimizer = DDPNOpt(call, lr=0.05, feedback=depth)
            found[f"{name}{', compiled' if compiled else ''}"] = call, optimizer
    return found


def main() -> None:
    """Print the median and the quartiles of each."""
    x, y = torch.randn(128, 256), torch.randint(10, (128,))

    def step(call: Any, optimizer: Any) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(call(x), y).backward()
        optimizer.step()
        return time.perf_counter() - start

    pairs = contenders()
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(WARM + ROUNDS):
        for name, pair in pairs.items():
            seconds = step(*pair)
            if turn >= WARM:
                times[name].append(1e3 * seconds)
    for name, found in times.items():
        low, mid, high = (sorted(found)[ROUNDS * k // 4] for k in (1, 2, 3))
        print(f"{name:24s} {mid:7.2f} ms ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DDPNOptWarning)
    torch.set_num_threads(1)
    main()
