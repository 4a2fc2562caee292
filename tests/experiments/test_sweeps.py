# SPDX-License-Identifier: MIT
"""Sweeps that survive: kills, crashes, dying workers, two processes on one store, Dask."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ddpnopt.experiments import sweep as sweeps
from ddpnopt.experiments.cluster import ClusterError
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import SweepError, sweep
from ddpnopt.experiments.training import train
from experiments.sweep_program import BASE, configs, main
from oracles.processes import FORKS

FOLDER = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    # Worker processes unpickle by module name; pytest's own search path is not theirs.
    search = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", search)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def program(store: Path, log: Path, seeds: int) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=main, args=(str(store), str(log), seeds))
    process.start()
    return process


def rows(path: Path) -> dict[str, str]:
    """Records by key, read without the code under test."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        try:
            found = connection.execute("SELECT key, record FROM runs").fetchall()
        except sqlite3.OperationalError:
            return {}
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def outcome(result: RunResult) -> list[tuple[float, ...]]:
    return [(e.train_loss, e.test_accuracy, e.running_loss) for e in result.epochs]


def outcomes(store: SqliteStore) -> dict[str, list[tuple[float, ...]]]:
    return {r.config.key: outcome(r) for r in store.results()}


def test_killed_at_any_moment_and_started_again(tmp_path: Path) -> None:
    path, log, seeds = tmp_path / "store.sqlite", tmp_path / "log", 30
    generator = random.Random(time.time_ns())
    before: dict[str, str] = {}
    for _ in range(3):
        process = program(path, log, seeds)
        wanted = len(before) + generator.randint(0, 8)
        while len(rows(path)) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.05 * generator.random())
        assert process.pid is not None
        with suppress(ProcessLookupError):  # on a busy machine all may be done by now
            os.kill(process.pid, generator.choice([signal.SIGKILL, signal.SIGINT]))
        process.join()
        now = rows(path)
        # Nothing lost, nothing done again.
        assert before.items() <= now.items()
        before = now
    store = SqliteStore(path)
    table = sweep(configs(seeds), store, jobs=1, console=quiet())
    assert before.items() <= rows(path).items()
    assert len(table) == len(rows(path)) == 2 * seeds
    trained = log.read_text().split()
    # A kill costs at most the training that was running.
    assert len(trained) - len(set(trained)) <= 3
    assert outcomes(store)[configs(1)[0].key] == outcome(train(configs(1)[0]))


def test_two_processes_share_a_store_and_the_work(tmp_path: Path) -> None:
    path, seeds = tmp_path / "store.sqlite", 40
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = [program(path, log, seeds) for log in logs]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    trained = [key for log in logs if log.exists() for key in log.read_text().split()]
    assert sorted(trained) == sorted(c.key for c in configs(seeds))
    assert len(rows(path)) == 2 * seeds


def test_crashes_and_divergence_are_results(tmp_path: Path) -> None:
    store, screen = SqliteStore(tmp_path / "store.sqlite"), quiet()
    bad = BASE.model_copy(update={"options": {"nope": 1}})
    wild = BASE.model_copy(update={"architecture": "linear", "lr": 1e38, "scale": "none"})
    runs = sweep([bad, BASE, wild], store, jobs=1, console=screen)
    assert runs["diverged"].tolist() == [True, False, True]
    crash, good, diverged = store.results()
    assert crash.error.startswith("ValueError: SGD has no option nope") and crash.failed
    assert good.error == diverged.error == "" and "non-finite" in diverged.reason
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    assert "3/3" in shown and "1 failed to train, 1 crashed" in shown
    assert "SGD has no option nope" in shown


def test_crashed_runs_are_repeated_only_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = SqliteStore(tmp_path / "store.sqlite"), list[float]()

    def fails(config: RunConfig) -> RunResult:
        made.append(config.lr)
        raise MemoryError("no room")

    monkeypatch.setattr(sweeps, "train", fails)
    sweep([BASE], store, jobs=1, console=quiet())
    sweep([BASE], store, jobs=1, console=quiet())
    assert made == [BASE.lr] and store.results()[0].error == "MemoryError: no room"
    monkeypatch.setattr(sweeps, "train", train)
    sweep([BASE], store, jobs=1, console=quiet(), retry_failed=True)
    (result,) = store.results()
    assert not result.error and outcome(result) == outcome(train(BASE))


def test_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")

    def third_is_interrupted(config: RunConfig) -> RunResult:
        if config.key == configs(2)[2].key:
            raise KeyboardInterrupt
        return train(config)

    monkeypatch.setattr(sweeps, "train", third_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(configs(2), store, jobs=1, console=quiet())
    assert [r.config.key for r in store.results()] == [c.key for c in configs(2)[:2]]
    # Its claims are given back, though the process lives on.
    assert SqliteStore(store.path).claim(store.key(configs(2)[2]))


class Deadly(sweeps.Worker):
    """A worker whose process dies at one seed, or that says that its code is another."""

    def __call__(self, config: RunConfig) -> RunResult:
        if (config.seed, config.lr) == (1, 0.3):
            os._exit(9)
        if config.seed == 77:
            raise SweepError("the code was changed")
        return super().__call__(config)


def deadly(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under the name by which other processes can import it, whatever pytest calls this file.
    from experiments import test_sweeps

    monkeypatch.setattr(sweeps, "Worker", test_sweeps.Deadly)


def check_deadly(store: SqliteStore) -> None:
    results = {r.config.key: r for r in store.results()}
    assert set(results) == {c.key for c in configs(4)}
    died = [r.config.seed for r in results.values() if r.error]
    assert died == [1]
    alive = configs(4)[-1]
    assert outcome(results[alive.key]) == outcome(train(alive))


def test_jobs_give_the_same_bits_and_a_dead_worker_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [c.model_copy(update={"optimizer": "ddpnopt", "epochs": 2}) for c in configs(3)]
    one, two = (SqliteStore(tmp_path / f"{name}.sqlite") for name in ("one", "two"))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    try:
        sweep(pair, one, jobs=1, console=quiet())
        assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    sweep(pair, two, jobs=2, console=quiet())
    assert outcomes(one) == outcomes(two) and len(outcomes(one)) == len(pair)

    deadly(monkeypatch)
    store = SqliteStore(tmp_path / "deadly.sqlite")
    runs = sweep(configs(4), store, jobs=2, console=quiet())
    assert len(runs) == 8
    check_deadly(store)
    with pytest.raises(SweepError, match="the code was changed"):
        sweep([c.model_copy(update={"seed": 77}) for c in configs(1)], store, jobs=2)
    assert len(store.keys()) == 8


@pytest.mark.parametrize("jobs", [0, -2])
def test_jobs_out_of_range(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(ValueError, match=f"jobs={jobs}: give a positive number.*-1 for all"):
        sweep([BASE], SqliteStore(tmp_path / "store.sqlite"), jobs=jobs, console=quiet())


@pytest.fixture
def scheduler() -> Iterator[str]:
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("dask")
    # One death is enough to give a run up: Dask's usual four take long.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(
            n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None
        ) as local,
    ):
        yield local.scheduler_address


def test_dask_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    deadly(monkeypatch)
    screen = quiet()
    assert len(sweep(configs(4), store, dask=scheduler, console=screen)) == 8
    check_deadly(store)
    assert all("KilledWorker" in r.error for r in store.results() if r.error)
    with pytest.raises(SweepError, match="the code was changed"):
        sweep([c.model_copy(update={"seed": 77}) for c in configs(1)], store, dask=scheduler)
    # Workers with other code are refused before anything runs.
    monkeypatch.setattr(sweeps, "code_hash", lambda: f"process {os.getpid()}")
    with pytest.raises(ClusterError, match="Dask worker tcp.* can't take part"):
        sweep(configs(5), store, dask=scheduler, console=screen)
    assert len(store.keys()) == 8


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense"])
def test_dask_scheduler_that_is_not_there(tmp_path: Path, address: str) -> None:
    pytest.importorskip("distributed")
    store = SqliteStore(tmp_path / "store.sqlite")
    with pytest.raises(ClusterError, match=f"no Dask scheduler answers at '{address}'"):
        sweep([BASE], store, dask=address, console=quiet())


def test_dask_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    store = SqliteStore(tmp_path / "store.sqlite")
    with pytest.raises(ClusterError, match=r"missing: distributed.*pip install 'ddpnopt\[dask\]'"):
        sweep([BASE], store, dask="tcp://127.0.0.1:1", console=quiet())
