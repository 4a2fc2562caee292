# SPDX-License-Identifier: MIT
"""Networks that are no chains, measured: `python -m ddpnopt.experiments.any_network`.

Residual networks, an Inception network, an encoder, a language model, a variational autoencoder,
a graph network and a recurrent one; SGD and AdamW, the same with clipping, and the library around
both in closed and open loop, over a range of learning rates. Runs are kept and not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.any_network_costs import costs_of
from ddpnopt.experiments.any_network_problems import PROBLEMS, quick
from ddpnopt.experiments.any_network_tables import Measured, frame_of, render
from ddpnopt.experiments.markdown import update_page
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import grid, sweep

#: Marks of the tables in `docs/any_network.md`.
MARK = "any-network"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results/any_network"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    data: Annotated[Path | None, typer.Option(help="Folder of CIFAR-10's files.")] = None,
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    problem: Annotated[
        list[str] | None, typer.Option(help="Only these: " + ", ".join(PROBLEMS) + ".")
    ] = None,
    published: Annotated[
        bool, typer.Option("--publish", help="Write the tables into the documentation.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--quick", help="A few steps of each, on data that need no files.")
    ] = False,
) -> None:
    """Run what is missing of the study, then show (and publish) tables of what is complete."""
    if small and published:
        raise typer.BadParameter("a quick run is no result: leave --publish out")
    console = Console()
    store = SqliteStore(out / ("quick.sqlite" if small else "store.sqlite"))
    for name in problem or ():
        lookup(PROBLEMS, name, "problem")
    measured: list[Measured] = []
    for name, item in PROBLEMS.items():
        if problem and name not in problem:
            continue
        chosen = quick(item) if small else item
        base = chosen.base.model_copy(update={"data": data})
        configs = grid(base, chosen.contenders(), range(first_seed, first_seed + seeds))
        sweep(configs, store, jobs=jobs, title=name, console=console)
        keys = {config.key for config in configs}
        runs = frame_of([r for r in store.results() if r.config.key in keys], chosen)
        measured.append(Measured(chosen, runs, costs_of(chosen, base, store)))
    text = render(measured)
    if small:
        text = f"QUICK RUN: a few steps, small data; not a result.\n\n{text}"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    if published:
        page = docs / "any_network.md"
        page.write_text(update_page(page.read_text(), text, MARK))
        console.print(f"written: {page}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
