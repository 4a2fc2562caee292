# SPDX-License-Identifier: MIT
"""The study behind the default settings: `python -m ddpnopt.experiments.defaults_study`.

Every optimizer sees the same splits, initial weights and sample orders. The runs are kept in a
CSV file and are not repeated; `docs/defaults.md` and its figure are made from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from ddpnopt.experiments.markdown import problem_section, targets_table, update_page
from ddpnopt.experiments.plots import plot_rates
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.summary import Target, judge
from ddpnopt.experiments.sweep import Contender, frame, grid, sweep
from ddpnopt.experiments.training import RunConfig

CLIPS = (0.25, 0.5, 1.0, 2.0)
ADAM_RATES = (0.001, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Problem:
    """A network on DIGITS with the rates it is tried at.

    Attributes:
        base: Everything but optimizer, rate and seed.
        lrs: Rates of plain SGD, SGD with clipping and DDPNOpt; with momentum 0.9 a tenth of them.
        heading: Title of its section.
    """

    base: RunConfig
    lrs: tuple[float, ...]
    heading: str

    def contenders(self) -> list[Contender]:
        """SGD, its rivals, DDPNOpt and its ablations."""
        tenths = tuple(round(lr / 10, 6) for lr in self.lrs)
        clipped = [Contender("sgd-clip", self.lrs, (("grad_clip", c),)) for c in CLIPS]
        own = ["ddpnopt", "ddpnopt-open-loop", "ddpnopt-envelope"]
        own += ["ddpnopt-no-own-layer", "ddpnopt-no-coupling"]
        return [
            Contender("sgd", self.lrs),
            *clipped,
            Contender("momentum", tenths),
            Contender("adam", ADAM_RATES),
            *[Contender(name, self.lrs) for name in own],
            Contender("ddpnopt-momentum", tenths),
        ]


PROBLEMS = {
    "tanh": Problem(
        RunConfig(architecture="mlp-20x4-tanh", batch=8, epochs=5),
        (0.1, 0.2, 0.4, 0.8, 1.6, 3.0),
        "Tanh, 64-20x4-10, batch 8, 5 epochs",
    ),
    "cnn": Problem(
        RunConfig(architecture="cnn-16", batch=16, epochs=4),
        (0.05, 0.1, 0.2, 0.6),
        "Small CNN, 4 convolutions of 16, 2 dense layers, batch 16, 4 epochs",
    ),
    "relu": Problem(
        RunConfig(architecture="mlp-20x4-relu", batch=8, epochs=5),
        (0.1, 0.3, 0.8, 1.2),
        "ReLU, 64-20x4-10, batch 8, 5 epochs",
    ),
    "relu32": Problem(
        RunConfig(architecture="mlp-32x4-relu", batch=32, epochs=8),
        (0.3, 0.6, 1.0, 3.0),
        "ReLU, 64-32x4-10, batch 32, 8 epochs",
    ),
}

TARGETS = (
    Target("mlp-20x4-tanh", 0.1, below_sgd=0.5),
    Target("mlp-20x4-tanh", 0.4, mean=94.0),
    Target("mlp-20x4-tanh", 0.8, mean=94.0),
    Target("mlp-20x4-tanh", 1.6, mean=94.0),
    Target("mlp-20x4-tanh", 3.0, mean=92.0),
    Target("cnn-16", 0.1, below_sgd=1.0),
    Target("cnn-16", 0.2, below_sgd=1.0),
    Target("cnn-16", 0.6, mean=93.0, worst=85.0),
)


def render(runs: pd.DataFrame) -> str:
    """Render the tables of `docs/defaults.md`.

    Args:
        runs: The study's runs (columns of `ddpnopt.experiments.sweep.frame`, curve not needed).

    Returns:
        Markdown: the targets, then a section for every network.
    """
    parts = ["### Targets", targets_table(judge(runs, TARGETS))]
    for problem in PROBLEMS.values():
        own = runs[runs["architecture"] == problem.base.architecture]
        if len(own):
            parts.append(problem_section(problem.heading, own))
    return "\n\n".join(parts) + "\n"


def publish(runs: pd.DataFrame, docs: Path) -> list[Path]:
    """Write the study's table and figure into the documentation.

    Args:
        runs: The study's runs.
        docs: The documentation's folder: `assets/defaults_runs.csv` and `assets/defaults.png` are
            written, the tables in `defaults.md` are replaced where that page exists.

    Returns:
        The files written.
    """
    table, page = docs / "assets" / "defaults_runs.csv", docs / "defaults.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    runs.drop(columns=["curve", "seconds"]).to_csv(table, index=False, float_format="%.6g")
    shown = runs[~runs["label"].str.contains(r"0\.25|=2\.0|own_layer|coupling|strength")]
    title = "DIGITS: accuracy over the learning rate (mean, and range from worst to best seed)"
    written = [table, plot_rates(shown, docs / "assets" / "defaults.png", title)]
    if page.exists():
        page.write_text(update_page(page.read_text(), render(runs)))
        written.append(page)
    return written


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results/defaults"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 12,
    first_seed: Annotated[int, typer.Option(help="The first; 0-23 chose the rule.")] = 100,
    problem: Annotated[
        list[str] | None, typer.Option(help="Only these: " + ", ".join(PROBLEMS) + ".")
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Only these optimizers (registry names).")
    ] = None,
) -> None:
    """Run what is missing of the study, then write tables and figure of all that is stored."""
    console = Console()
    store = SqliteStore(out / "store.sqlite")
    for name, item in PROBLEMS.items():
        if problem and name not in problem:
            continue
        contenders = [c for c in item.contenders() if not optimizer or c.optimizer in optimizer]
        configs = grid(item.base, contenders, range(first_seed, first_seed + seeds))
        sweep(configs, store, jobs=jobs, title=name, console=console)
    for path in publish(frame(store.results()), docs):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
