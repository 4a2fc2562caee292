# SPDX-License-Identifier: MIT
"""Table 5: best rates beside the published ranges, one seed's spread, crashed and missing runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce import table5
from ddpnopt.experiments.reproduce.outcome import Request, write
from ddpnopt.experiments.store import SqliteStore

SETTINGS = """
[runs]
seeds = 2
[[problem]]
dataset = "wine"
architecture = "mlp-4x1-tanh"
batch = 71
epochs = 2
[[search]]
optimizer = "sgd"
lr = [1e-5, 0.3]
[[search]]
optimizer = "momentum"
lr = [1e-3]
"""


def request(folder: Path, **changes: object) -> Request:
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    return Request(folder, SqliteStore(folder / "store.sqlite"), settings=settings, **changes)


def test_best_rates_stand_beside_the_published_ranges(tmp_path: Path) -> None:
    found = table5.table5(request(tmp_path))
    sgd, momentum = found.rows.to_dict("records")
    assert sgd["published"] == "0.07 to 0.5" and sgd["measured"] == 0.3
    assert sgd["verdict"] == table5.INSIDE and sgd["seeds"] == 2 and sgd["sd"] >= 0
    assert momentum["published"] == "" and momentum["verdict"] == "none published"
    assert [f.suffix for f in write(found, tmp_path / "out")] == [".csv", ".md", ".png"]
    again = table5.table5(request(tmp_path, run=False))
    assert list(again.rows["measured"]) == list(found.rows["measured"])


def test_one_seed_has_no_spread_and_nothing_run_is_empty(tmp_path: Path) -> None:
    empty = table5.table5(request(tmp_path, run=False))
    assert set(empty.rows["verdict"]) == {"not run"} and empty.rows["measured"].isna().all()
    found = table5.table5(request(tmp_path, seeds=1, epochs=1))
    assert found.rows["sd"].isna().all() and "±" not in str(found.views[0].frame)


def test_crashed_searches_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def obtained(asked: Request, configs: list[RunConfig], title: str) -> dict[str, RunResult]:
        return {c.key: RunResult.crash(c, "MemoryError: no room") for c in configs}

    monkeypatch.setattr(table5, "obtain", obtained)
    found = table5.table5(request(tmp_path))
    assert set(found.rows["verdict"]) == {"not measured: every run crashed"}
    assert all(math.isnan(v) for v in found.rows["measured"])
    write(found, tmp_path / "out")
