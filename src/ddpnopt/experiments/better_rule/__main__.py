# SPDX-License-Identifier: MIT
"""The comparison's program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.better_rule import study, summary
from ddpnopt.experiments.markdown import update_page
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import grid, sweep
from ddpnopt.experiments.when_it_helps.problems import PROBLEMS, quick

#: Marks of the tables in `docs/defaults.md` and `docs/better_rule.md`.
MARK = "better-rule"


def main(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("results/better_rule"),
    data: Annotated[Path | None, typer.Option(help="Folder of data files.")] = None,
    jobs: Annotated[int, typer.Option(help="Parallel processes; -1: all cores.")] = -1,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds that choose the rates.")] = 2,
    fresh: Annotated[int, typer.Option(min=1, help="Seeds of the table.")] = 4,
    problem: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    run: Annotated[bool, typer.Option(help="Run what is missing.")] = True,
    study_runs: Annotated[
        Path | None, typer.Option(help="Store of `when_it_helps`, shown beside the variants.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option("--publish", help="Documentation to write the tables into.")
    ] = None,
    small: Annotated[bool, typer.Option("--quick", help="A few steps of each; no result.")] = False,
) -> None:
    """Run what is missing, the rates first and then the fresh seeds, and show all."""
    console = Console()
    store = SqliteStore(out / ("quick.sqlite" if small else "store.sqlite"))
    names = problem or list(study.CHOSEN)
    problems = {n: (quick(PROBLEMS[n]) if small else PROBLEMS[n]).reading(data) for n in names}
    first, second = range(seeds), range(100, 100 + fresh)
    pairs = [(one.base, c) for n, one in problems.items() for c in study.variants(n)]
    if run:
        configs = [c for base, contender in pairs for c in grid(base, [contender], first)]
        sweep(configs, store, jobs=jobs, title="choosing", console=console)
        stored = {r.config.key: r for r in store.results()}
        chosen = [(b, c, study.entry(b, c, first, second, stored)) for b, c in pairs]
        shown = [x for b, c, e in chosen if e for x in study.confirming(b, c, e.best, second)]
        sweep(shown, store, jobs=jobs, title="fresh seeds", console=console)
    stored = {r.config.key: r for r in store.results(all_versions=True)}
    if study_runs is not None:
        known = SqliteStore(study_runs).results(all_versions=True)
        stored = {r.config.key: r for r in known} | stored
    parts = []
    for name, one in problems.items():
        wanted = [*study.variants(name), *(study.rivals(name) if study_runs else ())]
        found = [study.entry(one.base, c, first, second, stored) for c in wanted]
        parts.append(study.render(one, [e for e in found if e is not None]))
    text = summary.render(summary.rows(problems, first, second, stored))
    console.print("\n".join([text, *parts]), soft_wrap=True, highlight=False, markup=False)
    if docs is not None and not small:
        for page, part in (("defaults.md", text), ("better_rule.md", "\n".join(parts))):
            old = (docs / page).read_text()
            (docs / page).write_text(update_page(old, part, MARK))


if __name__ == "__main__":
    typer.run(main)
