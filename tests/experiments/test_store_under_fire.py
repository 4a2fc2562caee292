# SPDX-License-Identifier: MIT
"""The store with two writers that are killed, and on a full disk."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from ddpnopt.experiments.store import SqliteStore, StoreError
from ddpnopt.experiments.sweep import sweep
from ddpnopt.experiments.training import train
from experiments.sweep_program import configs, limited, main
from oracles.effort import effort
from oracles.processes import FORKS

FOLDER = Path(__file__).parents[1]
#: Kills of the test; more on demand.
KILLS = effort("DDPNOPT_KILLS", 4, 20)
#: Two runs for each.
SEEDS = 12 * KILLS


@pytest.fixture(autouse=True)
def importable_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    search = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", search)


def rows(path: Path, *, check: bool = True) -> dict[str, str]:
    """Records by key, read without the code under test; check: the whole file is sound."""
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == (0,):
            return {}
        if check:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = connection.execute("SELECT key, record FROM runs").fetchall()
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def program(store: Path, log: Path) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=main, args=(str(store), str(log), SEEDS))
    process.start()
    return process


def test_two_writers_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL for one of two processes on one store, then a new one in its place."""
    path, logs = tmp_path / "store.sqlite", [tmp_path / "first", tmp_path / "second"]
    generator = random.Random(time.time_ns())
    writers = [program(path, log) for log in logs]
    before: dict[str, str] = {}
    for _ in range(KILLS):
        wanted = len(before) + generator.randint(1, 12)
        while len(rows(path, check=False)) < wanted and any(w.is_alive() for w in writers):
            time.sleep(0.002)
        time.sleep(0.05 * generator.random())
        which = generator.randrange(2)
        pid = writers[which].pid
        assert pid is not None
        if writers[which].is_alive():
            os.kill(pid, signal.SIGKILL)
        writers[which].join()
        now = rows(path)
        # Nothing lost, nothing changed.
        assert before.items() <= now.items()
        before = now
        writers[which] = program(path, logs[which])
    for writer in writers:
        writer.join(timeout=240)
        assert writer.exitcode == 0
    done = rows(path)
    assert before.items() <= done.items() and len(done) == 2 * SEEDS
    trained = [key for log in logs if log.exists() for key in log.read_text().split()]
    assert set(trained) == {c.key for c in configs(SEEDS)}
    # A kill costs at most the training that was running.
    assert len(trained) - len(set(trained)) <= KILLS
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    store, chosen = SqliteStore(path), configs(1)[0]
    stored = store.get(store.key(chosen))
    assert stored is not None and stored.train_loss == train(chosen).train_loss
    print(f"{KILLS} kills, {len(trained) - len(set(trained))} trainings begun twice")


def fill(store: SqliteStore, seeds: int) -> str:
    """Sweep until the store takes no more; the message."""
    with pytest.raises(StoreError) as error:
        sweep(configs(seeds), store, jobs=1, console=Console(file=io.StringIO()))
    return str(error.value)


def check_full(path: Path, message: str) -> dict[str, str]:
    assert str(path) in message and "free space" in message
    assert "disk is full" in message or "disk I/O error" in message
    return rows(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts a small disk; the limit of the file's size stands for it")
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """A real one, of 100 kB: what is finished stays, and more space lets the sweep go on."""
    path = small_disk / "store.sqlite"
    store = SqliteStore(path)
    before = check_full(path, fill(store, 40))
    assert 10 < len(before) < 80
    assert check_full(path, fill(store, 40)).items() >= before.items()
    room = ["mount", "-o", "remount,size=2m", str(small_disk)]
    subprocess.run(room, check=True)
    assert len(sweep(configs(40), store, jobs=1, console=Console(file=io.StringIO()))) == 80
    assert before.items() <= rows(path).items() and len(rows(path)) == 80


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_file_that_can_not_grow(tmp_path: Path) -> None:
    path, said = tmp_path / "store.sqlite", tmp_path / "said"
    process = FORKS.Process(target=limited, args=(str(path), str(said), 90_000))
    process.start()
    process.join()
    before = check_full(path, said.read_text())
    assert 10 < len(before) < 80
    store = SqliteStore(path)
    assert len(sweep(configs(40), store, jobs=1, console=Console(file=io.StringIO()))) == 80
    assert before.items() <= rows(path).items() and len(rows(path)) == 80
