# SPDX-License-Identifier: MIT
"""KFAC and EKFAC as optimizers: `python -m ddpnopt.experiments.kronecker_study`.

DIGITS, five dense Tanh layers of 32, batch 32, 20 epochs, inputs / 16: every optimizer at the best
cell of a small grid, with the CPU time that it takes to training loss 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.markdown import table, update_page
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender, grid, sweep
from ddpnopt.experiments.training import RunConfig, RunResult

BASE = RunConfig(architecture="mlp-32x4-tanh", batch=32, epochs=20, scale="unit")
MARK = "kronecker"
DAMPINGS = (0.001, 0.01, 0.1)
KRONECKER_RATES = (0.01, 0.03, 0.1, 0.3)
LOSS = 0.1

CONTENDERS = (
    *[
        Contender(name, KRONECKER_RATES, (("damping", damping),))
        for name in ("kfac", "ekfac")
        for damping in DAMPINGS
    ],
    Contender("momentum", (0.01, 0.03, 0.1, 0.3)),
    Contender("rmsprop", (0.001, 0.003, 0.01)),
    Contender("adam", (0.001, 0.003, 0.01)),
)

HEADER = (
    "optimizer",
    "best cell",
    "test accuracy, %",
    "worst seed",
    "training loss",
    f"CPU s to loss {LOSS:g}",
    f"fastest cell to loss {LOSS:g}",
)


@dataclass(frozen=True)
class Cell:
    """One optimizer at one rate and damping, over its seeds.

    Attributes:
        optimizer: Registry name.
        lr: Learning rate.
        damping: Damping; None for optimizers without.
        mean: Mean test accuracy, %.
        worst: The worst seed's, %.
        loss: Mean training loss.
        seconds: Mean CPU seconds in training steps up to the end of the first epoch with training
            loss <= 0.1; infinite where a seed never gets there.
    """

    optimizer: str
    lr: float
    damping: float | None
    mean: float
    worst: float
    loss: float
    seconds: float

    @property
    def name(self) -> str:
        """Rate and damping in words."""
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        return f"lr {self.lr:g}{damping}"


def seconds_to(result: RunResult, loss: float) -> float:
    """CPU seconds in training steps up to the end of the first epoch with that training loss.

    Args:
        result: A run.
        loss: Training loss, in nats.

    Returns:
        Seconds; infinite where the run never gets there.
    """
    total = 0.0
    for epoch in result.epochs:
        total += epoch.cpu_seconds
        if epoch.train_loss <= loss:
            return total
    return math.inf


def cells(results: list[RunResult]) -> list[Cell]:
    """Summarise runs over their seeds.

    Args:
        results: The study's runs.

    Returns:
        One cell per optimizer, rate and damping, in the order of first appearance.
    """
    groups: dict[tuple[str, float, float | None], list[RunResult]] = {}
    for result in results:
        damping = result.config.options.get("damping")
        given = None if damping is None else float(damping)
        groups.setdefault((result.config.optimizer, result.config.lr, given), []).append(result)
    summary: list[Cell] = []
    for key, own in groups.items():
        accuracy = [100.0 * r.test_accuracy for r in own]
        summary.append(
            Cell(
                *key,
                mean=sum(accuracy) / len(own),
                worst=min(accuracy),
                loss=sum(r.train_loss for r in own) / len(own),
                seconds=sum(seconds_to(r, LOSS) for r in own) / len(own),
            )
        )
    return summary


def _seconds(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not reached"


def render(results: list[RunResult]) -> str:
    """Render the study's tables: each optimizer at its best cell, then all cells.

    Args:
        results: The study's runs.

    Returns:
        Markdown.
    """
    summary = cells(results)
    best_rows: list[list[str]] = []
    for optimizer in dict.fromkeys(c.optimizer for c in summary):
        own = [c for c in summary if c.optimizer == optimizer]
        best = max(own, key=lambda c: (c.mean, -c.loss))
        fastest = min(own, key=lambda c: c.seconds)
        best_rows.append(
            [
                optimizer,
                best.name,
                f"{best.mean:.1f}",
                f"{best.worst:.1f}",
                f"{best.loss:.4f}",
                _seconds(best.seconds),
                f"{_seconds(fastest.seconds)} ({fastest.name})",
            ]
        )
    rows = [
        [c.optimizer, c.name, f"{c.mean:.1f}", f"{c.worst:.1f}", f"{c.loss:.4f}"]
        + [_seconds(c.seconds)]
        for c in summary
    ]
    every = table([HEADER[0], "cell", *HEADER[2:6]], rows)
    seeds = ", ".join(str(seed) for seed in sorted({r.config.seed for r in results}))
    return f"Seeds {seeds}.\n\n{table(HEADER, best_rows)}\n\nEvery cell:\n\n{every}\n"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results/kronecker"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    publish: Annotated[bool, typer.Option(help="Write the tables into the documentation.")] = False,
) -> None:
    """Run what is missing of the study, then show (and publish) its tables."""
    console = Console()
    store = SqliteStore(out / "store.sqlite")
    configs = grid(BASE, CONTENDERS, range(first_seed, first_seed + seeds))
    sweep(configs, store, jobs=jobs, title="kronecker", console=console)
    wanted = {c.key for c in configs}
    text = render([r for r in store.results() if r.config.key in wanted])
    console.print(text, soft_wrap=True, highlight=False)
    if publish:
        page = docs / "curvatures.md"
        page.write_text(update_page(page.read_text(), text, MARK))
        console.print(f"written: {page}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
