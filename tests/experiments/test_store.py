# SPDX-License-Identifier: MIT
"""The store and the name of the code."""

from __future__ import annotations

import math
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from ddpnopt.experiments import store as stores
from ddpnopt.experiments.fingerprint import PACKAGE, code_hash, numeric_files
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore, Store, StoreError

CONFIG = RunConfig(dataset="wine", optimizer="sgd-clip", options={"grad_clip": math.inf})


def result(config: RunConfig = CONFIG, loss: float = 0.5) -> RunResult:
    return RunResult(
        config=config,
        epochs=(Epoch(epoch=1, train_loss=loss, test_accuracy=0.9, seconds=1.0),),
        train_loss=loss,
        test_accuracy=0.9,
        chance=0.4,
        seconds=1.0,
        diverged=not math.isfinite(loss),
    )


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "deep" / "store.sqlite")
    assert isinstance(store, Store)
    assert store.keys() == set() and store.results() == [] and not store.path.parent.exists()
    other = CONFIG.model_copy(update={"seed": 1})
    for one in (result(), result(other, math.nan)):
        store.append(one)
    again = SqliteStore(store.path)
    assert [r.config for r in again.results()] == [CONFIG, other]
    assert math.isnan(again.results()[1].train_loss)
    assert again.keys() == {again.key(CONFIG), again.key(other)}
    found = again.get(again.key(CONFIG))
    assert found is not None and found.train_loss == 0.5 and found.config.key == CONFIG.key
    assert again.get("nothing") is None
    with closing(sqlite3.connect(store.path)) as connection:
        row = connection.execute("SELECT dataset, lr, train_loss, epochs FROM runs").fetchone()
    assert row == ("wine", 0.1, 0.5, 5)


def test_the_first_result_stays_unless_it_crashed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.sqlite")
    store.append(RunResult.crash(CONFIG, "MemoryError: no room"))
    assert store.crashed() == store.keys() == {store.key(CONFIG)}
    store.append(result(loss=0.1))
    store.append(result(loss=0.2))
    assert [r.train_loss for r in store.results()] == [0.1] and store.crashed() == set()


def test_other_code_has_other_results(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    old, new = SqliteStore(path, code="old"), SqliteStore(path, code="new")
    old.append(result(loss=0.1))
    assert new.keys() == set() and new.results() == [] and old.key(CONFIG) != new.key(CONFIG)
    new.append(result(loss=0.2))
    assert [r.train_loss for r in new.results()] == [0.2]
    assert [r.train_loss for r in new.results(all_versions=True)] == [0.1, 0.2]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE runs SET record='{\"colour\": 1}' WHERE code='old'")
    with pytest.warns(UserWarning, match="1 results of other versions can't be read"):
        assert len(new.results(all_versions=True)) == 1
    with pytest.raises(StoreError, match="store.sqlite is damaged"):
        old.results()


def test_records_of_measurements(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = SqliteStore(path)
    assert store.get_record("cost", "a") is None
    store.put_record("cost", "a", {"ms": [1.5, math.inf], "name": "ü"})
    store.put_record("cost", "a", {"ms": [2.5, math.inf], "name": "ü"})
    assert SqliteStore(path).get_record("cost", "a") == {"ms": [2.5, math.inf], "name": "ü"}
    assert store.get_record("time", "a") is None
    assert SqliteStore(path, code="new").get_record("cost", "a") is None
    assert store.results() == []


def test_files_that_are_no_store_are_refused_with_their_path(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("key,dataset\n" * 200)
    with pytest.raises(StoreError, match="text.sqlite is no database of results.*move it away"):
        SqliteStore(text)
    assert text.read_text() == "key,dataset\n" * 200
    foreign = tmp_path / "foreign.sqlite"
    with closing(sqlite3.connect(foreign)) as connection, connection:
        connection.execute("CREATE TABLE runs (key TEXT)")
    with pytest.raises(StoreError, match="foreign.sqlite is a database of another program"):
        SqliteStore(foreign)
    damaged = tmp_path / "damaged.sqlite"
    store = SqliteStore(damaged)
    for seed in range(30):
        store.append(result(CONFIG.model_copy(update={"seed": seed})))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="damaged.sqlite"):
        SqliteStore(damaged)
    with pytest.raises(StoreError, match="deep.*can't be used"):
        (tmp_path / "deep").mkdir()
        SqliteStore(tmp_path / "deep")
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    SqliteStore(empty).append(result())
    assert len(SqliteStore(empty).results()) == 1


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"
    mine, theirs = SqliteStore(path), SqliteStore(path)
    assert mine.claim("a") and mine.claim("a") and mine.claim("b")
    assert not theirs.claim("a")
    mine.release(["a"])
    assert theirs.claim("a") and not mine.claim("a") and not theirs.claim("b")
    # Of another machine nothing is known but its signs of life.
    monkeypatch.setattr(mine, "host", "elsewhere")
    assert not mine.claim("a")
    now = time.time()
    monkeypatch.setattr(stores.time, "time", lambda: now + stores.EXPIRY - 1)
    theirs.beat()
    monkeypatch.setattr(stores.time, "time", lambda: now + stores.EXPIRY + 1)
    assert not mine.claim("a") and theirs.claim("b")
    monkeypatch.setattr(stores.time, "time", lambda: now + 2 * stores.EXPIRY + 1)
    assert mine.claim("a")
    # What is done is nobody's to run, a crash on demand only.
    mine.append(RunResult.crash(CONFIG, "E: e"))
    key = mine.key(CONFIG)
    assert not mine.claim(key) and mine.claim(key, again=True)
    mine.append(result())
    assert not mine.claim(key, again=True)


def test_claim_of_a_dead_process_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"
    dead, living = SqliteStore(path), SqliteStore(path)
    monkeypatch.setattr(stores.os, "getpid", lambda: 2**22 + 1)
    assert dead.claim("a")
    monkeypatch.undo()
    assert living.claim("a")


def test_code_hash_follows_the_numeric_sources(tmp_path: Path) -> None:
    package = tmp_path / "ddpnopt"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    files = {path.relative_to(package).as_posix() for path in numeric_files(package=package)}
    numeric = {f"experiments/{name}.py" for name in ("training", "models", "data", "optimizers")}
    assert numeric | {"optimizer.py", "value/moreau.py", "layers/conv.py"} <= files
    shown = {"commands", "plots", "report", "markdown", "sweep", "store", "progress"}
    assert not files & {f"experiments/{name}.py" for name in shown}

    def fresh() -> str:
        code_hash.cache_clear()
        return code_hash(package=package)

    first = fresh()
    assert first == fresh() == code_hash()
    for name in ("optimizer.py", "experiments/data.py"):
        before, path = fresh(), package / name
        path.write_text(path.read_text() + "\nX = 1\n")
        assert fresh() != before
    before, path = fresh(), package / "experiments" / "plots.py"
    path.write_text("X = 1\n")
    assert fresh() == before
    code_hash.cache_clear()
    with pytest.raises(ValueError, match=r"no module 'ddpnopt\.nothing'"):
        code_hash("ddpnopt.nothing")


def test_code_hash_knows_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpnopt.experiments import fingerprint

    hashes = set()
    for changed in ("none", "ddpnopt", "torch", "numpy"):
        monkeypatch.setattr(
            fingerprint, "version", lambda name, changed=changed: "9" if name == changed else "1"
        )
        code_hash.cache_clear()
        hashes.add(code_hash())
    code_hash.cache_clear()
    assert len(hashes) == 4
