# SPDX-License-Identifier: MIT
"""How the cost of vanilla DDP grows with the batch B and the width X: measured and in theory.

One step on a dense net X-X-X-classes, with the value function's matrices as they are (dense) and in
terminal coordinates (low_rank, r = classes - 1 columns a sample), beside plain SGD. Without a line
search, whose trials would differ from size to size. Memory: peak of the tensors that a step
allocates.

Examples:
    python benchmarks/vanilla_ddp.py
    python benchmarks/vanilla_ddp.py --batch 8 --batch 16 --batch 32 --width 16 --width 32
    python benchmarks/vanilla_ddp.py --quick --out results/vanilla_ddp.json
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from ddpnopt import VanillaDDP
from ddpnopt.experiments.reproduce.step_cost import PeakMemory

CLASSES, MIB = 10, 2**20
CHUNK_SECONDS = 0.03  # far above the clock's and the scheduler's grain
BATCHES, WIDTHS = (4, 8, 16, 32, 64), (8, 16, 32, 64)
FORMS = ("sgd", "low_rank", "dense")
#: Exponents in (B, X): of the recursion's square matrices, and of the products with the layers'
#: maps, which the dense form writes out for all X^2 weights. The larger one wins.
THEORY = {
    ("low_rank", "time"): (("(B r)^3", (3, 0)), ("(B r)^2 X", (2, 1))),
    ("low_rank", "memory"): (("(B r)^2", (2, 0)), ("B r X", (1, 1))),
    ("dense", "time"): (("(B X)^3", (3, 3)), ("(B X)^2 X^2", (2, 4))),
    ("dense", "memory"): (("(B X)^2", (2, 2)), ("B X X^2", (1, 3))),
}


@dataclass(frozen=True)
class Cost:
    """Cost of one step.

    Attributes:
        form: Name in `FORMS`.
        batch: B.
        width: X.
        milliseconds: Median step time.
        mib: Peak of the step's tensors.
    """

    form: str
    batch: int
    width: int
    milliseconds: float
    mib: float


class Job:
    """A network, its optimizer and one batch.

    Args:
        form: Name in `FORMS`.
        batch: B.
        width: X.
    """

    def __init__(self, form: str, batch: int, width: int) -> None:
        torch.manual_seed(0)
        self.form, self.batch, self.width = form, batch, width
        self.model = nn.Sequential(
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, CLASSES),
        )
        self.x, self.y = torch.randn(batch, width), torch.randint(CLASSES, (batch,))
        self.initial = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer: torch.optim.Optimizer
        if form == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        else:
            self.optimizer = VanillaDDP(self.model, lr=0.1, form=form, line_search=False)
        self.step()
        self.steps = max(1, round(CHUNK_SECONDS / self.seconds(1)))

    def step(self) -> None:
        """One whole training step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Mean time of some steps from the initial weights."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self.initial, strict=True):
                p.copy_(start)
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - begin) / steps

    def mib(self) -> float:
        """Peak of the tensors that a step allocates; call it with the collector off."""
        # Garbage of earlier steps, freed in this one, would count against its peak.
        self.optimizer.zero_grad()
        gc.collect()
        with PeakMemory() as memory:
            self.step()
        return float(memory.peak) / MIB


def measure(
    sizes: Sequence[tuple[int, int]], rounds: int, advance: Callable[[], None] = lambda: None
) -> list[Cost]:
    """Time all forms at all sizes in turn, round after round.

    Args:
        sizes: Pairs (B, X).
        rounds: How often each is timed; its time is the median.
        advance: Called after every timed chunk, for a progress display.

    Returns:
        One cost for each form and size.
    """
    jobs = [Job(form, *size) for size in sizes for form in FORMS]
    seconds: list[list[float]] = [[] for _ in jobs]
    gc.disable()
    try:
        for _ in range(rounds):
            for job, times in zip(jobs, seconds, strict=True):
                times.append(job.seconds(job.steps))
                advance()
            gc.collect()
        return [
            Cost(job.form, job.batch, job.width, 1e3 * statistics.median(times), job.mib())
            for job, times in zip(jobs, seconds, strict=True)
        ]
    finally:
        gc.enable()


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent: the least-squares slope of log cost over log size."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def _cost_table(costs: Sequence[Cost], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("B", "X", *(f"{form}: {unit}" for form in FORMS for unit in ("ms", "MiB"))):
        table.add_column(heading, justify="right")
    for size in dict.fromkeys((c.batch, c.width) for c in costs):
        own = {c.form: c for c in costs if (c.batch, c.width) == size}
        cells = [f"{v:.2f}" for f in FORMS for v in (own[f].milliseconds, own[f].mib)]
        table.add_row(*map(str, size), *cells)
    return table


def _exponents(along: str, costs: Sequence[Cost], last: int) -> list[dict[str, str | float]]:
    """The exponents in B or in X, beside the theory's."""
    found: list[dict[str, str | float]] = []
    for (form, what), terms in THEORY.items():
        own = [c for c in costs if c.form == form][-last:]
        sizes = [float(c.batch if along == "B" else c.width) for c in own]
        values = [c.milliseconds if what == "time" else c.mib for c in own]
        theory = [f"{term}: {powers[along == 'X']}" for term, powers in terms]
        found.append(
            {
                **{"form": form, "cost": what, "in": along, "measured": slope(sizes, values)},
                **{"recursion": theory[0], "maps": theory[1]},
            }
        )
    return found


def _exponent_table(exponents: Sequence[dict[str, str | float]], last: int) -> Table:
    table = Table(title=f"exponents over the last {last} sizes", title_justify="left")
    table.caption = "maps: the dense form writes them out for all X^2 weights"
    for heading in ("form", "cost", "in", "measured", "theory: recursion", "theory: layers' maps"):
        table.add_column(heading, no_wrap=True)
    for row in exponents:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()))
    return table


def main(
    batch: Annotated[list[int] | None, typer.Option(help="Batches, in rising order.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Widths, in rising order.")] = None,
    fixed_batch: Annotated[int, typer.Option(min=1, help="Batch while the width varies.")] = 8,
    fixed_width: Annotated[int, typer.Option(min=1, help="Width while the batch varies.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 9,
    last: Annotated[int, typer.Option(min=2, help="Sizes that an exponent is fitted to.")] = 3,
    quick: Annotated[bool, typer.Option(help="Two small sizes each, one round.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Print step time, memory and their exponents in the batch and in the width."""
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    batches, widths = batch or BATCHES, width or WIDTHS
    if quick:
        batches, widths, rounds, last = batches[:2], widths[:2], 1, 2
    if min(len(batches), len(widths)) < 2:
        raise typer.BadParameter("an exponent needs at least two batches and two widths")
    along = {
        "B": [(b, fixed_width) for b in batches],
        "X": [(fixed_batch, x) for x in widths],
    }
    sizes = list(dict.fromkeys(along["B"] + along["X"]))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("steps", total=rounds * len(sizes) * len(FORMS))
        costs = measure(sizes, rounds, lambda: bar.advance(task))
    exponents: list[dict[str, str | float]] = []
    for name, own in along.items():
        chosen = [c for size in own for c in costs if (c.batch, c.width) == size]
        console.print(_cost_table(chosen, f"in {name}"))
        exponents += _exponents(name, chosen, last)
    console.print(_exponent_table(exponents, last))
    if out is not None:
        document = {
            **{"torch": torch.__version__, "rounds": rounds, "classes": CLASSES, "last": last},
            **{"costs": [asdict(c) for c in costs], "exponents": exponents},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
