# SPDX-License-Identifier: MIT
"""Running many configurations on processes of this machine, or of a Dask cluster.

Only the process that calls this writes the store. It claims a run when it hands it out and stores
the result when it comes, so that another process on the same store runs other ones, and whatever
is killed leaves all finished runs stored.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from typing import Any

from joblib import Parallel, cpu_count, delayed, parallel_config

from ddpnopt.experiments.cluster import cluster
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.store import EXPIRY, SqliteStore, StoreError

Worker = Callable[[RunConfig], RunResult]
#: Seconds between two looks at what another process is running.
_LOOK = 0.5


def processes(jobs: int) -> int:
    """Return the number of processes that `jobs` asks for.

    Args:
        jobs: A positive number, or -1 for all cores that this process may use.

    Raises:
        ValueError: Another number.
    """
    if jobs == -1:
        return int(cpu_count())
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: give a positive number of processes, or -1 for all cores")
    return jobs


@contextmanager
def _heartbeat(store: SqliteStore) -> Iterator[None]:
    """Keep this process's claims alive, and give them back at the end."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(EXPIRY / 6):
            # A sign of life that is missed costs another process's time at worst.
            with suppress(StoreError):
                store.beat()

    thread = threading.Thread(target=beat, daemon=True, name="store-heartbeat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.release()


@contextmanager
def _local(jobs: int) -> Iterator[int]:
    with parallel_config(backend="loky", inner_max_num_threads=1):
        yield jobs


def _alone(worker: Worker, config: RunConfig) -> RunResult:
    """Run a configuration beside no other: if its process dies, it is its own doing."""
    try:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            # Two, since one would be this process.
            (result,) = Parallel(n_jobs=2)([delayed(worker)(config)])
    except BrokenProcessPool as error:
        return RunResult.crash(config, f"{type(error).__name__}: the worker process died")
    done: RunResult = result
    return done


class Pool:
    """Runs configurations and stores their results.

    Args:
        store: Where results go.
        worker: Runs one configuration in any process; exceptions are its to record.
        report: Called with every result once it is stored, and with None for one that another
            process stored.
        retry_failed: Run again what has crashed.
    """

    def __init__(
        self,
        store: SqliteStore,
        worker: Worker,
        report: Callable[[RunResult | None], None],
        *,
        retry_failed: bool = False,
    ) -> None:
        self._store = store
        self._worker = worker
        self._report = report
        self._retry = retry_failed
        self._waiting: dict[str, RunConfig] = {}
        self._running: dict[str, RunConfig] = {}
        self._trouble: StoreError | None = None

    def run(self, configs: Mapping[str, RunConfig], jobs: int) -> None:
        """Run all `configs`, waiting for those that another process is running.

        Args:
            configs: What to run, by key.
            jobs: Number of processes; 1 runs in this one.

        Raises:
            StoreError: The store can't be written.
        """
        self._waiting = dict(configs)
        with _heartbeat(self._store):
            while self._waiting:
                before = len(self._waiting)
                try:
                    self._round(jobs)
                except BrokenProcessPool:
                    # One of those that were running killed its process: find out which.
                    for config in list(self._running.values()):
                        self._keep(_alone(self._worker, config))
                self._drop_stored()
                if self._trouble is not None:
                    raise self._trouble
                if len(self._waiting) == before:
                    time.sleep(_LOOK)

    def _round(self, jobs: int) -> None:
        """Run what can be claimed."""
        parallel = Parallel(
            n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch=jobs
        )
        # Closing ends the processes at once when this one is interrupted.
        with closing(parallel(self._claimed())) as results:
            for result in results:
                self._keep(result)

    def _claimed(self) -> Iterator[Any]:
        """Hand out what nobody else runs; called from joblib's threads, where errors are lost."""
        try:
            for key, config in list(self._waiting.items()):
                if self._store.claim(key, again=self._retry):
                    self._running[key] = config
                    yield delayed(self._worker)(config)
        except StoreError as error:
            self._trouble = error

    def _keep(self, result: RunResult) -> None:
        key = self._store.key(result.config)
        self._store.append(result)
        del self._waiting[key], self._running[key]
        self._report(result)

    def _drop_stored(self) -> None:
        """Forget what another process has stored."""
        stored = self._store.keys()
        if self._retry:
            stored -= self._store.crashed()
        for key in stored & self._waiting.keys():
            del self._waiting[key]
            self._report(None)


def run_all(
    configs: Mapping[str, RunConfig],
    pool: Pool,
    *,
    jobs: int,
    dask: str | None,
    check: Callable[[], str],
) -> None:
    """Run `configs` on this machine, or on a Dask cluster.

    Args:
        configs: What to run, by key.
        pool: Runs and stores them.
        jobs: Number of processes, -1 for all cores; a cluster has its own.
        dask: Address of a Dask scheduler; None: this machine.
        check: Names the version of the code; all processes must give the same answer.

    Raises:
        ClusterError: The cluster does not answer, or runs other code.
        ValueError: `jobs` is out of range.
    """
    if not configs:
        return
    if dask is not None:
        with cluster(dask, check) as cores:
            pool.run(configs, cores)
        return
    with _local(min(processes(jobs), len(configs))) as count:
        pool.run(configs, count)
