# SPDX-License-Identifier: MIT
"""Twins of borrowed optimizers: `python -m ddpnopt.experiments.twins_study NAME`.

`twins`: RMSprop, AdamW, KFAC and EKFAC on the networks of the defaults study. `mixing`: SGD,
momentum and AdamW on networks with BatchNorm. `feedback`: `Feedback` around AdamW, momentum and
Muon; `trust` and `brake`: the same with `trust=True`, and with `mode="brake"`. Each beside the same
optimizer with clipping and beside DDPNOpt's open loop. Runs are kept and not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from ddpnopt.experiments import defaults_study
from ddpnopt.experiments.markdown import update_page
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import frame, grid, sweep
from ddpnopt.experiments.training import RunConfig
from ddpnopt.experiments.twins import Pair, Problem, finished, render

SCALE_FREE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
KRONECKER_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Study:
    """Problems and pairs; its tables stand between the page's marks of that name.

    Attributes:
        problems: Networks by the names that the command line takes.
        pairs: Borrowed optimizers and twins.
        page: The page of the documentation that shows it.
    """

    problems: dict[str, Problem]
    pairs: tuple[Pair, ...]
    page: str = "curvatures.md"


#: Networks that are no chains.
JOINED = {
    "resnet": Problem(
        RunConfig(architecture="resnet-16x2-gn", batch=32, epochs=8),
        "Residual net with GroupNorm, 2 blocks of 16 channels, batch 32, 8 epochs",
    ),
    "transformer": Problem(
        RunConfig(architecture="transformer-32x2", batch=32, epochs=8),
        "Pre-norm transformer, 2 blocks of 32, batch 32, 8 epochs",
    ),
}

#: Networks of the studies of `Feedback`.
WRAPPED = {
    name: Problem(problem.base, problem.heading)
    for name, problem in defaults_study.PROBLEMS.items()
    if name != "relu32"
} | JOINED

STUDIES = {
    "twins": Study(
        {
            name: Problem(problem.base, problem.heading)
            for name, problem in defaults_study.PROBLEMS.items()
        },
        (
            Pair("rmsprop", "ddpnopt-rmsprop", SCALE_FREE_RATES),
            Pair("adamw", "ddpnopt-adamw", SCALE_FREE_RATES),
            Pair("kfac", "ddpnopt-kfac", KRONECKER_RATES),
            Pair("ekfac", "ddpnopt-ekfac", KRONECKER_RATES),
        ),
    ),
    "mixing": Study(
        {
            "mnist": Problem(
                RunConfig(
                    dataset="mnist",
                    scale="pooled",
                    architecture="mlp-32x4-relu-bn",
                    batch=32,
                    epochs=1,
                    train_samples=20000,
                ),
                "MNIST, 784-32x4-10 with BatchNorm, batch 32, one epoch of 20,000 images",
            ),
            "cnn": Problem(
                RunConfig(architecture="cnn-16-bn", batch=16, epochs=4),
                "Small CNN on DIGITS with BatchNorm, batch 16, 4 epochs",
            ),
        },
        (
            Pair("sgd", "ddpnopt", (0.03, 0.1, 0.3, 1.0, 3.0)),
            Pair("momentum", "ddpnopt-momentum", (0.003, 0.01, 0.03, 0.1, 0.3)),
            Pair("adamw", "ddpnopt-adamw", SCALE_FREE_RATES),
        ),
    ),
    "feedback": Study(
        WRAPPED,
        (
            Pair("adamw", "feedback-adamw", (*SCALE_FREE_RATES, 0.3)),
            Pair("momentum", "feedback-momentum", (0.01, 0.03, 0.1, 0.3, 1.0)),
            Pair("muon", "feedback-muon", (0.003, 0.01, 0.03, 0.1, 0.3)),
        ),
        page="any_optimizer.md",
    ),
    "trust": Study(
        WRAPPED,
        (
            Pair("adamw", "feedback-adamw-trust", (*SCALE_FREE_RATES, 0.3, 1.0)),
            Pair("momentum", "feedback-momentum-trust", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
        ),
        page="any_optimizer.md",
    ),
    "brake": Study(
        {
            name: Problem(problem.base, problem.heading)
            for name, problem in defaults_study.PROBLEMS.items()
            if name in ("tanh", "cnn")
        },
        (
            Pair("adamw", "feedback-adamw-brake", (0.003, 0.01, 0.03, 0.1), clips=(1.0,)),
            Pair("momentum", "feedback-momentum-brake", (0.01, 0.03, 0.1, 0.3), clips=(1.0,)),
        ),
        page="any_optimizer.md",
    ),
}


def publish(runs: pd.DataFrame, name: str, text: str, docs: Path) -> list[Path]:
    """Write a study's runs and tables into the documentation.

    Args:
        runs: The study's runs.
        name: The study's name: the page's marks and `assets/<name>_runs.csv`.
        text: The tables.
        docs: The documentation's folder, with the study's page.

    Returns:
        The files written.
    """
    rows, page = docs / "assets" / f"{name}_runs.csv", docs / STUDIES[name].page
    rows.parent.mkdir(parents=True, exist_ok=True)
    runs.drop(columns=["curve", "seconds"]).to_csv(rows, index=False, float_format="%.6g")
    page.write_text(update_page(page.read_text(), text, name))
    return [rows, page]


def main(
    study: Annotated[str, typer.Argument(help="One of: " + ", ".join(STUDIES) + ".")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    data: Annotated[Path | None, typer.Option(help="Folder of MNIST's files.")] = None,
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 4,
    first_seed: Annotated[int, typer.Option(min=0, help="The first; 0-7 choose.")] = 0,
    problem: Annotated[list[str] | None, typer.Option(help="Only these networks.")] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Only these optimizers (registry names).")
    ] = None,
    published: Annotated[
        bool, typer.Option("--publish", help="Write the tables into the documentation.")
    ] = False,
) -> None:
    """Run what is missing of a study, then show (and publish) tables of what is complete."""
    chosen = lookup(STUDIES, study, "study")
    console = Console()
    store = SqliteStore(out / study / "store.sqlite")
    contenders = [
        contender
        for pair in chosen.pairs
        for contender in pair.contenders()
        if not optimizer or contender.optimizer in optimizer
    ]
    for name, item in chosen.problems.items():
        if problem and name not in problem:
            continue
        base = item.base.model_copy(update={"data": data})
        configs = grid(base, contenders, range(first_seed, first_seed + seeds))
        sweep(configs, store, jobs=jobs, title=name, console=console)
    seeds_shown = range(first_seed, first_seed + seeds)
    runs = frame(r for r in store.results() if r.config.seed in seeds_shown)
    problems = list(chosen.problems.values())
    runs = finished(runs, problems, chosen.pairs)
    text = render(runs, problems, chosen.pairs)
    console.print(text, soft_wrap=True, highlight=False)
    if published:
        for path in publish(runs, study, text, docs):
            console.print(f"written: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
