# SPDX-License-Identifier: MIT
"""What watching a pass costs: step times of chains, watched and not, in turn.

Every round takes one step of each variant; the table shows the median of the rounds' ratios to the
unwatched step, with its quartiles. "usual" is what a user gets: watched until known to be a chain.

Examples:
    OMP_NUM_THREADS=1 python benchmarks/graph_cost.py --rounds 60
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt

#: More passes than it takes to know all structures.
WARM = 50


class Chain(nn.Module):
    """Layers one after another, written by hand."""

    short = False

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """With ReLU between them; pooled in front of the last, if there is anything to pool."""
        *inner, head = self.layers
        for layer in inner:
            x = torch.relu(layer(x))
        made: Tensor = head(x.mean((2, 3)) if x.dim() > 2 else x)
        return made


class Alternating(Chain):
    """Every other time without the last two hidden layers."""

    def forward(self, x: Tensor) -> Tensor:
        """The long chain or the short one."""
        *inner, head = self.layers
        for layer in inner[:-2] if self.short else inner:
            x = torch.relu(layer(x))
        made: Tensor = head(x)
        return made


def dense(width: int) -> list[nn.Module]:
    """Eight layers."""
    return [
        nn.Linear(784, width),
        *(nn.Linear(width, width) for _ in range(6)),
        nn.Linear(width, 10),
    ]


def conv() -> list[nn.Module]:
    """Five convolutions and a dense layer."""
    sizes = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 32)]
    return [*(nn.Conv2d(i, o, 3, padding=1) for i, o in sizes), nn.Linear(32, 10)]


CASES: dict[str, tuple[Callable[[], Chain], tuple[int, ...]]] = {
    "dense, 8 layers of 64": (lambda: Chain(dense(64)), (128, 784)),
    "dense, 8 layers of 256": (lambda: Chain(dense(256)), (128, 784)),
    "convolutions, 6 layers": (lambda: Chain(conv()), (32, 3, 16, 16)),
    "two chains in turn, width 64": (lambda: Alternating(dense(64)), (128, 784)),
    "two chains in turn, width 256": (lambda: Alternating(dense(256)), (128, 784)),
}
#: What is set before every step: watched, not watched, or left alone.
VARIANTS: dict[str, bool | None] = {"unwatched": False, "usual": None, "watched": True}


def step_time(model: Chain, opt: DDPNOpt, x: Tensor, y: Tensor, watched: bool | None) -> float:
    """Processor seconds of one step of the plain loop."""
    recorder: Any = opt.engine.recorder
    if watched is not None:
        recorder.watching.branching = watched
    start = time.process_time()
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()
    return time.process_time() - start


def measure(build: Callable[[], Chain], shape: tuple[int, ...], rounds: int) -> dict[str, str]:
    """Ratios to the unwatched step as text, by variant."""
    torch.manual_seed(0)
    x, y = torch.randn(*shape), torch.randint(10, shape[:1])
    model = build()
    models = {name: copy.deepcopy(model) for name in VARIANTS}
    opts = {name: DDPNOpt(one, lr=1e-3) for name, one in models.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for k in range(WARM + rounds):
        names = list(VARIANTS)
        for name in names[k % 3 :] + names[: k % 3]:
            models[name].short = k % 2 == 1
            times[name].append(step_time(models[name], opts[name], x, y, VARIANTS[name]))
    found = {}
    unwatched = times["unwatched"][WARM:]
    for name in VARIANTS:
        ratios = [a / b for a, b in zip(times[name][WARM:], unwatched, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    found["unwatched"] = f"{1e3 * statistics.median(unwatched):.2f} ms"
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    print("| model | " + " | ".join(VARIANTS) + " |")
    print("|---" * (1 + len(VARIANTS)) + "|")
    for name, (build, shape) in CASES.items():
        cells = measure(build, shape, rounds).values()
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
