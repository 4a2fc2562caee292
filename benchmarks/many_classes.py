# SPDX-License-Identifier: MIT
"""What `LowRank(rank=)` costs and keeps with many classes: `python benchmarks/many_classes.py`.

A small classifier takes one step with the exact factor (C - 1 columns) and one with few columns,
from the same weights and batch. Reported: the error of the feedback and backup that the columns
make, |du(rank) - du(exact)| / |du(plain) - du(exact)| (1: no better than no value function), and
the peak of the tensors that the step allocates.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.experiments.reproduce.step_cost import PeakMemory
from ddpnopt.value import LowRank

WIDTH, BATCH, LR = 64, 32, 0.5


def network(classes: int) -> nn.Sequential:
    """Three dense layers of width 64 and an output layer that is sure of something."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(32, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, classes),
    )
    with torch.no_grad():
        net[-1].weight.mul_(10.0)
    return net


def step(
    net: nn.Sequential, classes: int, rank: int | None, feedback: bool
) -> tuple[list[Tensor], float]:
    """The update of one step from the same state, and its peak tensor memory in MB."""
    net = copy.deepcopy(net)
    before = [p.detach().clone() for p in net.parameters()]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 32, generator=generator)
    y = torch.randint(classes, (BATCH,), generator=generator)
    opt = DDPNOpt(net, lr=LR, value=LowRank(rank=rank), feedback=feedback, terminal="cross_entropy")
    with PeakMemory() as memory:
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    update = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
    return update, memory.peak / 1e6


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Euclidean distance over all parameters."""
    return float(sum(((a - b) ** 2).sum() for a, b in zip(first, second, strict=True)) ** 0.5)


def main(
    classes: Annotated[list[int] | None, typer.Option(help="Numbers of classes.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Numbers of columns.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    console = Console()
    table = Table("classes", "columns", "error of the value's effect", "peak memory, MB")
    for many in classes or [10, 100, 1000]:
        net = network(many)
        exact, full = step(net, many, None, True)
        plain, _ = step(net, many, None, False)
        for rank in [r for r in ranks or [1, 3, 9, 31, 99] if r < many - 1]:
            update, peak = step(net, many, rank, True)
            error = distance(update, exact) / distance(plain, exact)
            table.add_row(str(many), str(rank), f"{error:.3f}", f"{peak:.1f}")
        table.add_row(str(many), f"{many - 1} (exact)", "0", f"{full:.1f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
