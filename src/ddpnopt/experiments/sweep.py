# SPDX-License-Identifier: MIT
"""Many training runs on several processes: resumable, with progress, one torch thread each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ddpnopt.experiments.optimizers import OptionValue
from ddpnopt.experiments.store import Store
from ddpnopt.experiments.training import RunConfig, RunResult, train


class SweepError(RuntimeError):
    """Some runs of a sweep could not be made; the message names them."""


@dataclass(frozen=True)
class Contender:
    """An optimizer in a comparison, with options and the rates it is tried at.

    Attributes:
        optimizer: Registry name.
        lrs: Learning rates.
        options: Options that differ from the optimizer's defaults.
    """

    optimizer: str
    lrs: tuple[float, ...]
    options: tuple[tuple[str, OptionValue], ...] = ()


def grid(base: RunConfig, contenders: Iterable[Contender], seeds: Sequence[int]) -> list[RunConfig]:
    """List the configurations of a comparison, seed by seed.

    The seed varies slowest, so an interrupted sweep has every cell with few seeds rather than
    some cells with all.

    Args:
        base: Data set, architecture, batch, epochs and device.
        contenders: Optimizers and their rates.
        seeds: Seeds, the same for all.

    Returns:
        One configuration per seed, contender and rate.
    """
    cells = [(c, lr) for c in contenders for lr in c.lrs]
    return [
        base.model_copy(
            update={
                "optimizer": c.optimizer,
                "options": dict(c.options),
                "lr": lr,
                "seed": seed,
            }
        )
        for seed, (c, lr) in itertools.product(seeds, cells)
    ]


def _worker(config: RunConfig) -> tuple[RunConfig, RunResult | None, str]:
    torch.set_num_threads(1)
    # A sweep of hours must not end because one cell can't be run: what went wrong travels back
    # as text, every other run is kept, and the sweep raises at its end.
    try:
        return config, train(config), ""
    except Exception as error:
        return config, None, f"{type(error).__name__}: {error}"


def _progress(console: Console | None) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failures]}"),
        console=console or Console(stderr=True),
    )


def _note(done: int, seconds: float, failed: int, errors: int) -> tuple[str, str]:
    rate = f"{done / seconds:.1f} runs/s" if seconds > 0 else ""
    failures = f"{failed} failed to train" if failed else ""
    if errors:
        failures = f"[red]{errors} errors[/] {failures}"
    return rate, failures


def sweep(
    configs: Sequence[RunConfig],
    store: Store,
    *,
    jobs: int = 1,
    title: str = "runs",
    console: Console | None = None,
) -> pd.DataFrame:
    """Run what the store lacks and return the table of all `configs`.

    Args:
        configs: Configurations; those with a result in the store are skipped.
        store: Gets every result as it comes.
        jobs: Processes, each with one torch thread; 1 runs in this process.
        title: Shown beside the progress bar.
        console: Where progress is shown; None: the standard error stream.

    Returns:
        One row per configuration, see `frame`.

    Raises:
        SweepError: Some runs raised an exception; all others are in the store.
    """
    present = store.keys()
    unique = {c.key: c for c in configs}
    missing = [c for key, c in unique.items() if key not in present]
    errors: list[str] = []
    failed = 0
    threads = torch.get_num_threads()
    with _progress(console) as progress:
        task = progress.add_task(title, total=len(missing), rate="", failures="")
        runs = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(
            delayed(_worker)(c) for c in missing
        )
        for done, (config, result, error) in enumerate(runs, 1):
            if result is None:
                errors.append(f"{config.label} lr={config.lr} seed={config.seed}: {error}")
            else:
                store.append(result)
                failed += result.failed
            elapsed = progress.tasks[task].elapsed or 0.0
            rate, failures = _note(done, elapsed, failed, len(errors))
            progress.update(task, advance=1, rate=rate, failures=failures)
    torch.set_num_threads(threads)
    if errors:
        shown = "\n  ".join(errors[:5])
        raise SweepError(f"{len(errors)} of {len(missing)} runs raised an error:\n  {shown}")
    return frame(r for r in store.results() if r.config.key in unique)


def frame(results: Iterable[RunResult]) -> pd.DataFrame:
    """Make a table of results.

    Args:
        results: Results of any sweeps.

    Returns:
        Columns dataset, architecture, optimizer, label, lr, batch, seed, train_loss,
        test_accuracy (%), diverged, failed, seconds, and curve (a list of
        (epoch, training loss, test accuracy in %)).
    """
    rows = [
        {
            "dataset": r.config.dataset,
            "architecture": r.config.architecture,
            "optimizer": r.config.optimizer,
            "label": r.config.label,
            "lr": r.config.lr,
            "batch": r.config.batch,
            "seed": r.config.seed,
            "train_loss": r.train_loss,
            "test_accuracy": 100.0 * r.test_accuracy,
            "diverged": r.diverged,
            "failed": r.failed,
            "seconds": r.seconds,
            "curve": [(e.epoch, e.train_loss, 100.0 * e.test_accuracy) for e in r.epochs],
        }
        for r in results
    ]
    return pd.DataFrame(rows)
