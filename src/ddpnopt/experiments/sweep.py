# SPDX-License-Identifier: MIT
"""Many training runs on several processes: resumable, with progress, one torch thread each."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import pandas as pd
import torch
from rich.console import Console

from ddpnopt.experiments.fingerprint import code_hash
from ddpnopt.experiments.optimizers import OptionValue
from ddpnopt.experiments.pool import Pool, run_all
from ddpnopt.experiments.progress import SweepProgress
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.training import train


class SweepError(RuntimeError):
    """The results of a sweep can't be recorded; the message says why."""


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """The settings under which a run gives the same bits in every process."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@cache
def _end_with(parent: int) -> None:
    """End this process soon after `parent` does; a driver that is killed can't stop its workers."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@dataclass(frozen=True)
class Worker:
    """Runs one configuration in whatever process it is sent to.

    Args:
        code: Version of the code that the results are stored under.
        driver: Number of the process that stores them.
    """

    code: str
    driver: int

    def __call__(self, config: RunConfig) -> RunResult:
        """Run `config`; an exception is its result.

        Raises:
            SweepError: This process has other code than the driver.
        """
        if os.getpid() != self.driver:
            # Ctrl-C goes to all processes of a terminal; the driver alone decides what ends.
            with suppress(ValueError):
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            if os.getppid() == self.driver:
                _end_with(self.driver)
            if (found := code_hash()) != self.code:
                raise SweepError(
                    f"the code was changed while the sweep ran (from {self.code} to {found}): "
                    "start it again; what is stored is not used for the changed code"
                )
        with _one_thread():
            # A sweep of hours must not end because one cell can't be run.
            try:
                return train(config)
            except Exception as error:
                return RunResult.crash(config, f"{type(error).__name__}: {error}")


def sweep(
    configs: Sequence[RunConfig],
    store: SqliteStore,
    *,
    jobs: int = -1,
    title: str = "runs",
    console: Console | None = None,
    dask: str | None = None,
    retry_failed: bool = False,
) -> pd.DataFrame:
    """Run what the store lacks and return the table of all `configs`.

    Every result is stored as it comes: after an interrupt the same call goes on where it was.

    Args:
        configs: Configurations; those with a result in the store are skipped.
        store: Gets every result; other processes may use it at the same time.
        jobs: Processes, each with one torch thread; -1: one for every core, 1: this process.
        title: Shown beside the progress bar.
        console: Where progress is shown; None: the standard error stream.
        dask: Address of a Dask scheduler whose workers run the trainings; `jobs` is theirs then.
        retry_failed: Run again what crashed before.

    Returns:
        One row per configuration in their order, see `frame`. Runs that diverged or crashed are
        among them.

    Raises:
        SweepError: The code was changed while it ran.
        ddpnopt.experiments.cluster.ClusterError: The Dask cluster can't be used.
        ddpnopt.experiments.store.StoreError: The store can't be read or written.
        ValueError: `jobs` is out of range.
    """
    unique = {store.key(c): c for c in configs}
    present = store.keys() - (store.crashed() if retry_failed else set())
    missing = {key: c for key, c in unique.items() if key not in present}
    done = len(unique) - len(missing)
    with SweepProgress(title, len(unique), done, console) as progress:

        def report(result: RunResult | None) -> None:
            if result is None:
                progress.advance(here=False)
            else:
                progress.advance(failed=result.failed, crashed=bool(result.error))

        pool = Pool(store, Worker(code_hash(), os.getpid()), report, retry_failed=retry_failed)
        run_all(missing, pool, jobs=jobs, dask=dask, check=code_hash)
    found = {store.key(r.config): r for r in store.results()}
    results = [found[key] for key in unique]
    _tell_crashes(results, console or Console(stderr=True))
    return frame(results)


def _tell_crashes(results: Sequence[RunResult], console: Console) -> None:
    crashed = [r for r in results if r.error]
    if not crashed:
        return
    console.print(f"[red]{len(crashed)} of {len(results)} runs crashed[/]", highlight=False)
    for result in crashed[:_SHOWN]:
        config = result.config
        text = f"  {config.label} lr={config.lr:g} seed={config.seed}: {result.error}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(crashed) > _SHOWN:
        console.print(f"  and {len(crashed) - _SHOWN} more", highlight=False)


#: Crashed runs that are named after a sweep.
_SHOWN = 5


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
