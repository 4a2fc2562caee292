# SPDX-License-Identifier: MIT
"""Damaged stores and settings: the outcome is the content, or an error that names the file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce import schema
from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings
from ddpnopt.experiments.selection import read_runs
from ddpnopt.experiments.store import SqliteStore, StoreError

CONFIG = RunConfig(dataset="wine", optimizer="sgd")
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def filled(path: Path) -> SqliteStore:
    store = SqliteStore(path, code="c")
    for seed in range(4):
        store.append(RunResult.crash(CONFIG.model_copy(update={"seed": seed}), "E: e"))
    store.put_record("cost", "a", {"ms": [1.5]})
    assert store.claim("b")
    return store


def use(path: Path) -> None:
    """Everything that reads."""
    store = SqliteStore(path, code="c")
    key = store.key(CONFIG)
    assert store.keys() >= store.crashed()
    assert all(isinstance(result, RunResult) for result in store.results())
    assert all(isinstance(result, RunResult) for result in store.results(all_versions=True))
    store.get(key)
    store.get_record("cost", "a")
    store.claim("b")
    store.claim(key, again=True)


@FUZZ
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:.*results of other versions")
def test_damaged_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "store.sqlite"
    path.unlink(missing_ok=True)
    filled(path)
    content = bytearray(path.read_bytes())
    # The first page's header and schema, and anywhere.
    place = st.integers(0, 120) | st.integers(0, len(content) - 1)
    for where, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), max_size=6)):
        content[where] = value
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    path.write_bytes(content[:end])
    try:
        use(path)
    except StoreError as error:
        assert str(path) in str(error)


def test_a_schema_that_is_no_text(tmp_path: Path) -> None:
    """SQLite quotes the damaged schema in its message, which then is no text either."""
    path = tmp_path / "store.sqlite"
    filled(path)
    content = path.read_bytes()
    table = b"CREATE TABLE claims (key"
    assert table in content
    path.write_bytes(content.replace(table, b"CREATE TABLE claims \xb0\xbaY)"))
    with pytest.raises(StoreError, match="store.sqlite"):
        use(path)


VALUES = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()


@FUZZ
@given(
    record=VALUES | st.sampled_from(["{}", "[" * 5000, '{"config": {}}', "1e999"]),
    payload=VALUES | st.sampled_from(["[1]", "[" * 200_000, "nul"]),
    beat=VALUES,
    pid=VALUES,
)
@pytest.mark.filterwarnings("ignore:.*results of other versions")
def test_other_values_in_the_columns(
    tmp_path: Path, record: object, payload: object, beat: object, pid: object
) -> None:
    path = tmp_path / "store.sqlite"
    path.unlink(missing_ok=True)
    filled(path)
    changes = (
        ("UPDATE runs SET record=? WHERE number=1", record),
        ("UPDATE records SET payload=?", payload),
        ("UPDATE claims SET owner='other', beat=?", beat),
        ("UPDATE claims SET pid=?", pid),
    )
    with closing(sqlite3.connect(path)) as connection:
        for change, value in changes:
            try:
                connection.execute(change, (value,))
            except (sqlite3.IntegrityError, UnicodeEncodeError):
                pass  # the file itself takes no such value
        connection.commit()
    store = SqliteStore(path, code="c")
    for read in (
        store.results,
        lambda: store.results(all_versions=True),
        lambda: store.get(store.key(CONFIG)),
        lambda: store.get_record("cost", "a"),
        lambda: store.claim("b"),
    ):
        try:
            read()
        except StoreError as error:
            assert str(path) in str(error)


@FUZZ
@given(data=st.data())
def test_settings_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "my.toml"
    content = bytearray(schema.packaged("table6").encode())
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(content)))
        width = data.draw(st.integers(0, 20))
        filler = st.binary(max_size=8) | st.sampled_from([b"[", b"[[", b'"""', b"\n", b"1e400"])
        content[place : place + width] = data.draw(filler)
    path.write_bytes(content)
    check_settings(path)


@pytest.mark.parametrize(
    "content",
    [
        "a = " + "[" * 100_000,
        "a = " + "{b = " * 50_000,
        "[" + "a." * 50_000 + "a]",
        "[" + "a." * 1000 + "a]",
        "",
        "\x00",
    ],
)
def test_hostile_settings(content: str, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(content)
    check_settings(path)


def check_settings(path: Path) -> None:
    try:
        schema.load(AblationSettings, "table6", path)
    except schema.SettingsError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("content", ["", "{}", "[" * 100_000, "\x00", '{"config": 1}', "\udcff"])
def test_damaged_record_of_a_training(content: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="result.json"):
        read_runs(tmp_path)
