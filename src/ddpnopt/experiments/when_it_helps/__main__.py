# SPDX-License-Identifier: MIT
"""The study's program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.markdown import update_page
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import sweep
from ddpnopt.experiments.when_it_helps import times
from ddpnopt.experiments.when_it_helps.figure import draw
from ddpnopt.experiments.when_it_helps.problems import PROBLEMS, quick
from ddpnopt.experiments.when_it_helps.tables import (
    choosing,
    confirming,
    render,
    render_details,
    verdicts,
)

#: Marks of the tables in `docs/defaults.md` and `docs/when_it_helps.md`.
MARK = "when-it-helps"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results/when_it_helps"),
    docs: Annotated[Path, typer.Option(help="Documentation to write into.")] = Path("docs"),
    data: Annotated[Path | None, typer.Option(help="Folder of MNIST's, CIFAR-10's files.")] = None,
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds that choose the rates.")] = 3,
    fresh: Annotated[int, typer.Option(min=1, help="Seeds of the table.")] = 5,
    problem: Annotated[
        list[str] | None, typer.Option(help="Only these: " + ", ".join(PROBLEMS) + ".")
    ] = None,
    run: Annotated[bool, typer.Option(help="Run what is missing.")] = True,
    versions: Annotated[
        bool,
        typer.Option(
            "--all-versions", help="Show runs of other versions of the code, too; runs nothing."
        ),
    ] = False,
    published: Annotated[
        bool, typer.Option("--publish", help="Write tables and figure into the documentation.")
    ] = False,
    small: Annotated[
        bool, typer.Option("--quick", help="A few steps of each, on data that need no files.")
    ] = False,
) -> None:
    """Run what is missing of the study, then show (and publish) what is complete."""
    if small and published:
        raise typer.BadParameter("a quick run is no result: leave --publish out")
    console = Console()
    store = SqliteStore(out / ("quick.sqlite" if small else "store.sqlite"))
    for name in problem or ():
        lookup(PROBLEMS, name, "problem")
    chosen = {
        name: (quick(one) if small else one).reading(data)
        for name, one in PROBLEMS.items()
        if not problem or name in problem
    }
    first, second = range(seeds), range(100, 100 + fresh)
    if run and not versions:
        for name, one in chosen.items():
            contenders = one.contenders()
            configs = [c for x in contenders for c in choosing(one.base, x, first)]
            sweep(configs, store, jobs=jobs, title=name, console=console)
            results = {r.config.key: r for r in store.results()}
            shown = [c for x in contenders for c in confirming(one.base, x, first, second, results)]
            sweep(shown, store, jobs=jobs, title=f"{name}, fresh seeds", console=console)
    stored = store.results(all_versions=versions)
    found = verdicts(chosen, first, second, {r.config.key: r for r in stored})
    text = render(found, first, second)
    if small:
        text = f"QUICK RUN: a few steps, small data; not a result.\n\n{text}"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    figure = docs / "assets" / "when_it_helps.png" if published else out / "when_it_helps.png"
    if found:
        console.print(f"written: {draw(found, figure)}", soft_wrap=True, highlight=False)
    if published:
        details = f"{times.render(found)}\n\n{render_details(found)}"
        for name, part in (("defaults.md", text), ("when_it_helps.md", details)):
            page = docs / name
            page.write_text(update_page(page.read_text(), part, MARK))
            console.print(f"written: {page}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
