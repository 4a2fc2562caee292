# SPDX-License-Identifier: MIT
"""The demo: DDPNOpt beside the optimizers it borrows from, on data that need no download."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
from rich.console import Console

from ddpnopt.experiments.report import print_optimizers, write_comparison
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender, grid, sweep
from ddpnopt.experiments.training import RunConfig

FIRST_ORDER_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
SCALE_FREE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)

CONTENDERS = (
    Contender("sgd", FIRST_ORDER_RATES),
    Contender("sgd-clip", FIRST_ORDER_RATES),
    Contender("ddpnopt-open-loop", FIRST_ORDER_RATES),
    Contender("ddpnopt", FIRST_ORDER_RATES),
    Contender("adam", SCALE_FREE_RATES),
    Contender("rmsprop", SCALE_FREE_RATES),
    Contender("ddpnopt-rmsprop", SCALE_FREE_RATES),
)

PROBLEMS = (
    RunConfig(dataset="wine", architecture="mlp-20x4-tanh", batch=8, epochs=6),
    RunConfig(dataset="digits", architecture="mlp-20x4-tanh", batch=16, epochs=4),
)


def run_demo(
    out: Path,
    *,
    jobs: int = -1,
    budget: float = 130.0,
    seeds: int = 3,
    console: Console | None = None,
) -> list[Path]:
    """Run the demo, show its tables and write its figures.

    One seed is run after the other, all optimizers and rates of each; a seed is begun only when
    it is likely to end within the budget, so a slow machine shows fewer seeds, at least one.

    Args:
        out: Folder for the store, tables and figures; an earlier demo's runs are used again.
        jobs: Parallel processes; -1: all cores.
        budget: Seconds.
        seeds: Most seeds to run.
        console: Where to show progress and tables.

    Returns:
        The files written.

    Raises:
        ddpnopt.experiments.store.StoreError: The folder holds a store that can't be used.
    """
    screen = console or Console()
    store = SqliteStore(out / "store.sqlite")
    begin = time.perf_counter()
    slowest = 0.0
    tables: list[pd.DataFrame] = []
    for seed in range(seeds):
        start = time.perf_counter()
        if seed > 0 and start - begin + slowest > budget:
            screen.print(f"stopped after {seed} of {seeds} seeds: the budget is {budget:g} s")
            break
        configs = [c for problem in PROBLEMS for c in grid(problem, CONTENDERS, [seed])]
        title = f"seed {seed + 1} of {seeds}"
        tables.append(sweep(configs, store, jobs=jobs, title=title, console=screen))
        slowest = max(slowest, time.perf_counter() - start)
    runs = pd.concat(tables, ignore_index=True)
    print_optimizers(runs, screen)
    written = write_comparison(runs, out)
    screen.print(f"{len(runs)} runs in {time.perf_counter() - begin:.0f} s")
    return written
