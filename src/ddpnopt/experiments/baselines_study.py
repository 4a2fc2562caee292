# SPDX-License-Identifier: MIT
"""DDPNOpt beside its rivals: `python -m ddpnopt.experiments.baselines_study`.

WINE and DIGITS, five dense Tanh layers, the same number of epochs for every optimizer. Each is
tried at a few rates of its range on two seeds; the table is of fresh seeds at the best of them.
Runs are kept and not repeated, and the expensive optimizers come last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.markdown import update_page
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.rivals import Seeds, choosing_configs, fresh_configs, render, rows_of
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender, sweep
from ddpnopt.experiments.training import RunConfig, RunResult
from ddpnopt.experiments.twins import Problem

MARK = "baselines"
RATES = 4
PROBLEMS = {
    "wine": Problem(
        RunConfig(dataset="wine", architecture="mlp-10x4-tanh", batch=8, epochs=20),
        "WINE, Tanh, 13-10x4-3, batch 8, 20 epochs",
    ),
    "digits": Problem(
        RunConfig(dataset="digits", architecture="mlp-20x4-tanh", batch=32, epochs=10),
        "DIGITS, Tanh, 64-20x4-10, batch 32, 10 epochs",
    ),
}


def rates(low: float, high: float, count: int = RATES) -> tuple[float, ...]:
    """Space rates geometrically, both ends included.

    Args:
        low: The lowest rate.
        high: The highest.
        count: Number of rates, at least 2.

    Returns:
        The rates, to three digits.
    """
    ratio = (high / low) ** (1 / (count - 1))
    return tuple(float(f"{low * ratio**i:.3g}") for i in range(count))


SGD_RATES = rates(0.07, 0.5)

#: One after the other: a stage begins when the one before has all its runs.
STAGES = (
    (
        Contender("sgd", SGD_RATES),
        # Momentum 0.9 makes ten times the step of a rate.
        Contender("momentum", rates(0.007, 0.05)),
        Contender("adam", rates(7e-4, 1e-2)),
        Contender("rmsprop", rates(7e-4, 1e-2)),
        Contender("ekfac", rates(1e-2, 0.3)),
        Contender("ddpnopt", SGD_RATES),
        Contender("sgd-vgr", SGD_RATES),
    ),
    (Contender("vanilla-ddp", rates(0.1, 100.0)),),
    (Contender("emsa", rates(0.03, 1.0)),),
)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds in the table.")] = 5,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first that chooses; the table's begin 100 later.")
    ] = 0,
    problem: Annotated[list[str] | None, typer.Option(help="Only these networks.")] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Only these optimizers (registry names).")
    ] = None,
    publish: Annotated[bool, typer.Option(help="Write the tables into the documentation.")] = False,
) -> None:
    """Run what is missing of the study, then show (and publish) tables of what is complete."""
    contenders = [contender for stage in STAGES for contender in stage]
    known = {contender.optimizer: contender for contender in contenders}
    wanted = {lookup(known, name, "optimizer of this study") for name in optimizer or known}
    named = [lookup(PROBLEMS, name, "network") for name in problem or PROBLEMS]
    console = Console()
    store = SqliteStore(out / MARK / "store.sqlite")
    chosen = Seeds(first_seed, seeds)

    def present() -> dict[str, RunResult]:
        return {r.config.key: r for r in store.results()}

    for stage in STAGES:
        own = [contender for contender in stage if contender in wanted]
        for item in named if own else []:
            runs = [c for o in own for c in choosing_configs(item.base, o, chosen)]
            sweep(runs, store, jobs=jobs, title=f"{item.base.dataset}: rates", console=console)
            results = present()
            runs = [c for o in own for c in fresh_configs(item.base, o, chosen, results)]
            sweep(runs, store, jobs=jobs, title=f"{item.base.dataset}: table", console=console)
    results = present()
    everything = list(PROBLEMS.values()), contenders, chosen, results
    text = render(*everything)
    console.print(text, soft_wrap=True, highlight=False)
    if publish:
        rows, page = docs / "assets" / f"{MARK}_runs.csv", docs / f"{MARK}.md"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows_of(*everything).to_csv(rows, index=False, float_format="%.6g")
        page.write_text(update_page(page.read_text(), text, MARK))
        for path in (rows, page):
            console.print(f"written: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
