# SPDX-License-Identifier: MIT
"""Where results are kept: one SQLite file. This file is the only one that knows the format.

A result is stored in one transaction, so a process that is killed leaves a whole database. Rows
are named by a hash of the configuration and of the code that made them: results of other versions
of the numerics stay in the file and are not used. A process says in the table of claims what it
is running, so that a second one on the same file runs something else.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from ddpnopt.experiments.fingerprint import code_hash, package_version
from ddpnopt.experiments.records import RunConfig, RunResult

#: Marks the files of this format; `file` and other tools show it.
APPLICATION = 0x64647031
VERSION = 1
#: Columns to read by eye beside the whole record.
COLUMNS = (
    *("key", "code", "package", "dataset", "architecture", "optimizer", "options", "lr", "batch"),
    *("epochs", "seed", "train_loss", "test_accuracy", "diverged", "failed", "error", "seconds"),
    "record",
)
_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
    "CREATE TABLE IF NOT EXISTS runs (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "key TEXT NOT NULL UNIQUE, code TEXT NOT NULL, package TEXT, dataset TEXT, "
    "architecture TEXT, optimizer TEXT, options TEXT, lr REAL, batch INTEGER, epochs INTEGER, "
    "seed INTEGER, train_loss REAL, test_accuracy REAL, diverged INTEGER, failed INTEGER, "
    "error TEXT NOT NULL, seconds REAL, record TEXT NOT NULL, "
    "stored TEXT DEFAULT CURRENT_TIMESTAMP)",
    "CREATE INDEX IF NOT EXISTS runs_of_code ON runs (code)",
    "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, "
    "code TEXT NOT NULL, payload TEXT NOT NULL, stored TEXT DEFAULT CURRENT_TIMESTAMP, "
    "PRIMARY KEY (kind, key, code))",
    "CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, "
    "host TEXT NOT NULL, pid INTEGER NOT NULL, beat REAL NOT NULL)",
)
#: Seconds to wait for another process's transaction.
_PATIENCE = 60.0
#: Seconds without a sign of life after which a claim of a process elsewhere is void.
EXPIRY = 60.0


class StoreError(ValueError):
    """The store can't be read or written; the message names the file."""


@runtime_checkable
class Store(Protocol):
    """What sweeps and reports need of a place for results."""

    def key(self, config: RunConfig) -> str:
        """Name of the configuration's result, made by this version of the code."""

    def keys(self) -> set[str]:
        """Keys of the configurations that have a result of this version of the code."""

    def append(self, result: RunResult) -> None:
        """Add one result; it is on disk when this returns."""

    def results(self, *, all_versions: bool = False) -> list[RunResult]:
        """All results of this version of the code, or of all, in the order they came."""

    def get(self, key: str) -> RunResult | None:
        """The result named `key`; None where there is none."""

    def put_record(self, kind: str, key: str, payload: dict[str, Any]) -> None:
        """Keep a measurement that is no training."""

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The measurement of this version of the code; None where there is none."""


class SqliteStore:
    """Results in one SQLite file, which several processes may use at once.

    Args:
        path: The file; it and its folder are made when the first result comes.
        code: Name of the version of the code; None: `fingerprint.code_hash()`.

    Raises:
        StoreError: The file exists and is no such database, or is damaged.
    """

    def __init__(self, path: Path, *, code: str | None = None) -> None:
        self.path = Path(path)
        self.code = code_hash() if code is None else code
        self.host = socket.gethostname()
        self.owner = f"{self.host}:{os.getpid()}:{uuid.uuid4().hex}"
        if self.path.exists():
            with self._connect() as connection:
                self._check(connection)

    def key(self, config: RunConfig) -> str:
        """Name of the configuration's result, made by this version of the code."""
        return hashlib.sha256(f"{config.key} {self.code}".encode()).hexdigest()[:32]

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        # A connection for every use: they belong to threads and must not cross a fork.
        opened = partial(sqlite3.connect, self.path, timeout=_PATIENCE, isolation_level=None)
        try:
            with closing(opened()) as connection:
                connection.row_factory = sqlite3.Row
                yield connection
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"the store {self.path} can't be used: {error}; look at the folder's permissions "
                "and free space, or choose another folder"
            ) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # a schema of any bytes
            raise StoreError(
                f"{self.path} is no database of results, or damaged ({error}); move it away or "
                "choose another folder"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the store's folder can't be made: {error}") from error
        with self._connect() as connection:
            # Immediate: two writers queue at the beginning rather than collide at the end.
            connection.execute("BEGIN IMMEDIATE")
            try:
                if not self._check(connection):
                    for statement in _SCHEMA:
                        connection.execute(statement)
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Refuse files of other programs; say whether the tables exist."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application == 0 and tables == 0:
            # Made by a process that ended before its first transaction did.
            return False
        if application != APPLICATION:
            raise StoreError(
                f"{self.path} is a database of another program, not of results; "
                "choose another folder"
            )
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != VERSION:
            raise StoreError(
                f"{self.path} has format {version}, this version of ddpnopt knows {VERSION}; "
                "choose another folder"
            )
        return True

    def _select(self, query: str, *values: object) -> list[sqlite3.Row]:
        if not self.path.exists():
            return []
        with self._connect() as connection:
            return connection.execute(query, values).fetchall() if self._check(connection) else []

    def prepare(self) -> None:
        """Make the file, or see that it can be written, before anything is measured for it.

        Raises:
            StoreError: It can't.
        """
        with self._transaction():
            pass

    def keys(self) -> set[str]:
        """Keys of the configurations that have a result of this version of the code."""
        return {row["key"] for row in self._select("SELECT key FROM runs WHERE code=?", self.code)}

    def crashed(self) -> set[str]:
        """Keys among `keys` whose run was ended by an exception."""
        query = "SELECT key FROM runs WHERE code=? AND error<>''"
        return {row["key"] for row in self._select(query, self.code)}

    def results(self, *, all_versions: bool = False) -> list[RunResult]:
        """All results, in the order they came.

        Args:
            all_versions: Those of other versions of the code, too; rows that this version can't
                read are left out with a warning.

        Raises:
            StoreError: A row of this version can't be read.
        """
        found: list[RunResult] = []
        unreadable = 0
        query = "SELECT code, record FROM runs WHERE ? OR code=? ORDER BY number"
        for row in self._select(query, all_versions, self.code):
            try:
                found.append(self._result(row))
            except StoreError:
                if row["code"] == self.code:
                    raise
                unreadable += 1
        if unreadable:
            warnings.warn(
                f"{self.path}: {unreadable} results of other versions can't be read by this one",
                stacklevel=2,
            )
        return found

    def get(self, key: str) -> RunResult | None:
        """The result named `key`, see `key`; None where there is none."""
        for row in self._select("SELECT record FROM runs WHERE key=?", key):
            return self._result(row)
        return None

    def _result(self, row: sqlite3.Row) -> RunResult:
        try:
            return RunResult.model_validate_json(row["record"])
        except (ValidationError, TypeError) as error:
            raise StoreError(f"{self.path} is damaged: {error}") from error

    def append(self, result: RunResult) -> None:
        """Add one result; it is on disk when this returns.

        Where there is one already, the first stays, unless it is that of a crash.
        """
        config, key = result.config, self.key(result.config)
        values: dict[str, object] = {
            **config.model_dump(include=set(COLUMNS)),
            **result.model_dump(include=set(COLUMNS)),
            "key": key,
            "code": self.code,
            "package": package_version(),
            "options": json.dumps(config.options, sort_keys=True),
            "epochs": config.epochs,
            "failed": result.failed,
            "record": result.model_dump_json(),
        }
        names = ", ".join(COLUMNS)
        marks = ", ".join(f":{name}" for name in COLUMNS)
        changes = ", ".join(f"{name}=excluded.{name}" for name in COLUMNS)
        with self._transaction() as connection:
            connection.execute(
                f"INSERT INTO runs ({names}) VALUES ({marks}) "
                f"ON CONFLICT (key) DO UPDATE SET {changes} WHERE runs.error<>''",
                values,
            )
            connection.execute("DELETE FROM claims WHERE key=?", (key,))

    def put_record(self, kind: str, key: str, payload: dict[str, Any]) -> None:
        """Keep a measurement that is no training; it replaces an earlier one of its name.

        Args:
            kind: What was measured.
            key: Which of its kind; put a hash of the measurement's own settings (and of its
                module, `fingerprint.code_hash(module)`) into it.
            payload: Plain values, as JSON takes them; NaN and infinities are kept.

        Raises:
            TypeError: The payload holds something that JSON has not.
        """
        text = json.dumps(payload)
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO records (kind, key, code, payload) VALUES (?, ?, ?, ?)",
                (kind, key, self.code, text),
            )

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The measurement of this version of the code; None where there is none."""
        for row in self._select(
            "SELECT payload FROM records WHERE kind=? AND key=? AND code=?", kind, key, self.code
        ):
            try:
                return dict(json.loads(row["payload"]))
            except (ValueError, TypeError, RecursionError) as error:
                raise StoreError(f"{self.path} is damaged: {kind} {key}: {error}") from error
        return None

    def claim(self, key: str, *, again: bool = False) -> bool:
        """Say that this process runs `key` now, unless it is done or another one runs it.

        A claim is void when its process has ended (on this machine) or has given no sign of life
        for `EXPIRY` seconds.

        Args:
            key: The run's name.
            again: A result that is a crash does not count as done.

        Returns:
            Whether it is this process's to run.
        """
        mine = (key, self.owner, self.host, os.getpid(), time.time())
        with self._transaction() as connection:
            done = connection.execute("SELECT error FROM runs WHERE key=?", (key,)).fetchone()
            if done is not None and not (again and done["error"]):
                return False
            row = connection.execute("SELECT * FROM claims WHERE key=?", (key,)).fetchone()
            if row is not None and row["owner"] != self.owner and self._is_alive(row):
                return False
            connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", mine)
        return True

    def _is_alive(self, claim: sqlite3.Row) -> bool:
        try:
            if time.time() - claim["beat"] > EXPIRY:
                return False
            if claim["host"] != self.host:
                return True
            os.kill(claim["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        except (TypeError, ValueError, OverflowError) as error:
            raise StoreError(f"{self.path} is damaged: table of claims: {error}") from error
        return True

    def beat(self) -> None:
        """Give a sign of life for all claims of this process."""
        with self._transaction() as connection:
            connection.execute("UPDATE claims SET beat=? WHERE owner=?", (time.time(), self.owner))

    def release(self, keys: Iterable[str] | None = None) -> None:
        """Give claims of this process back: those of `keys`, or all."""
        query = "DELETE FROM claims WHERE owner=?" + ("" if keys is None else " AND key=?")
        values = [(self.owner,)] if keys is None else [(self.owner, key) for key in keys]
        with self._transaction() as connection:
            connection.executemany(query, values)
