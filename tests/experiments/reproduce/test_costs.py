# SPDX-License-Identifier: MIT
"""Costs of a step: exponents, peaks of memory, refusals; stored, empty and quick tables."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from ddpnopt.experiments.reproduce import costs, step_cost
from ddpnopt.experiments.reproduce.cost_settings import Figure3, Table4
from ddpnopt.experiments.reproduce.outcome import QUICK, Request, markdown, write
from ddpnopt.experiments.reproduce.schema import SettingsError, load, packaged, parse
from ddpnopt.experiments.reproduce.step_cost import PeakMemory, Task, measure
from ddpnopt.experiments.store import SqliteStore

TABLE4 = """
rounds = 1
tolerance = 0.4
[published.known]
memory = { batch = [0.0, 0.0], width = [2.0, 2.0], depth = [1.0, 1.0] }
[[method]]
name = "SGD"
optimizer = "sgd"
published = "known"
time = { batch = [2, 4], width = [4, 8], depth = [1, 2], base = [2, 8, 1] }
memory = { batch = [1, 2], width = [64, 128], depth = [4, 8], base = [1, 64, 4] }
[[method]]
name = "DDPNOpt"
optimizer = "ddpnopt"
time = { batch = [2, 4], width = [4, 8], depth = [1, 2], base = [2, 8, 1] }
memory = { batch = [1, 2], width = [4, 8], depth = [1, 2], base = [1, 8, 1] }
"""
FIG3 = """
rounds = 1
inputs = 4
width = 4
depth = 1
batches = [2, 4]
baseline = "SGD"
[[method]]
name = "SGD"
optimizer = "sgd"
[[method]]
name = "Vanilla DDP"
optimizer = "vanilla-ddp"
most = 2
"""


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch) -> None:
    monkeypatch.setattr(step_cost, "CHUNK_SECONDS", 1e-4)


def request(folder: Path, text: str, **changes: object) -> Request:
    settings = folder / "settings.toml"
    settings.write_text(text)
    return Request(folder, SqliteStore(folder / "store.sqlite"), settings=settings, **changes)


def task(optimizer: str, batch: int = 4, **options: object) -> Task:
    return Task(optimizer, optimizer, tuple(options.items()), 0.01, 1, batch, 8, 2)


def test_exponent_of_a_power_law() -> None:
    fit, last = costs.exponent([2.0, 4.0, 16.0], [5 * 2.0**2.5, 5 * 4.0**2.5, 5 * 16.0**2.5])
    assert fit == pytest.approx(2.5) and last == pytest.approx(2.5)
    fit, last = costs.exponent([1.0, 2.0, 4.0], [1.0, 1.0, 4.0])
    assert fit == pytest.approx(1.0) and last == pytest.approx(2.0)


@pytest.mark.parametrize(
    "measured, bounds, said",
    [
        (1.39, (0.0, 1.0), costs.AGREES),
        (1.41, (0.0, 1.0), costs.FASTER),
        (-0.41, (0.0, 1.0), costs.SLOWER),
        (1.0, None, costs.NOT_PUBLISHED),
        (math.nan, (0.0, 1.0), costs.NOT_MEASURED),
    ],
)
def test_verdicts_within_the_tolerance(measured, bounds, said) -> None:
    assert costs.judge(measured, bounds, 0.4) == said


def test_peak_counts_tensors_while_they_live() -> None:
    outside = torch.ones(1000)
    with PeakMemory() as memory:
        a = outside * 2
        b = a + 1
        assert memory.level == 8000
        del a
        assert memory.level == 4000
        b.add_(1)  # in place, and a view: nothing new
        b[:10].mul_(2)
        outside.add_(1)
        c = b * 2
    assert memory.peak == 8000 and memory.level == 8000
    del b, c


def test_a_step_that_does_not_fit_is_refused_and_the_others_are_measured() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    tasks = [task("sgd"), task("vanilla-ddp", memory=1), task("sgd", 32)]
    small, refused, large = measure(tasks, 2)
    assert "bytes" in refused.refused and refused.step is None and refused.mib is None
    assert small.mib < large.mib and not small.refused
    assert 0 < small.backward < small.step <= small.median
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_table4_measures_once_and_is_read_again(tmp_path, monkeypatch) -> None:
    asked = request(tmp_path, TABLE4)
    first = costs.table4(asked)
    rows = first.rows.set_index(["method", "cost", "in"])
    assert len(rows) == 2 * 2 * 3
    weights = rows.loc[("SGD", "memory", "X")]
    assert weights["published"] == "2" and weights["verdict"] == costs.AGREES
    assert weights["measured"] == pytest.approx(2.0, abs=0.15)
    assert rows.loc[("SGD", "time", "X"), "verdict"] == costs.NOT_PUBLISHED
    assert rows.loc[("DDPNOpt", "memory", "B"), "published"] == ""
    assert "torch " in first.settings and first.seconds > 0

    monkeypatch.setattr(costs, "measure", lambda *a, **k: pytest.fail("measured again"))
    again = costs.table4(request(tmp_path, TABLE4, run=False))
    pd.testing.assert_frame_equal(first.rows, again.rows)
    files = write(again, tmp_path / "out")
    assert [f.name for f in files] == ["table4.csv", "table4.md", "table4.png"]


def test_nothing_measured_is_visibly_empty(tmp_path) -> None:
    found = costs.table4(request(tmp_path, TABLE4, run=False))
    assert found.rows["measured"].isna().all()
    assert set(found.rows["verdict"]) == {costs.NOT_MEASURED}
    assert list(found.rows["published"]).count("2") == 1  # what is published stays
    found = costs.fig3(request(tmp_path, FIG3, run=False))
    assert found.rows["measured"].isna().all() and "Nothing has been measured" in found.settings
    assert len(write(found, tmp_path / "out")) == 3  # the figure says so, too


def test_fig3_ratios_and_batches_left_out(tmp_path) -> None:
    found = costs.fig3(request(tmp_path, FIG3))
    rows = found.rows.set_index(["method", "B"])
    assert rows.loc[("SGD", 4), "ratio"] == 1.0
    slow = rows.loc[("Vanilla DDP", 2)]
    assert slow["ratio"] == pytest.approx(slow["measured"] / rows.loc[("SGD", 2), "measured"])
    assert slow["ratio"] > 2
    left_out = rows.loc[("Vanilla DDP", 4)]
    assert math.isnan(left_out["measured"]) and "left out" in left_out["verdict"]


def test_quick_takes_fewer_sizes_and_says_so(tmp_path) -> None:
    text = TABLE4.replace("batch = [1, 2], width = [64, 128]", "batch = [1, 2, 4], width = [8, 9]")
    assert text != TABLE4
    found = costs.table4(request(tmp_path, text, quick=True))
    sizes = found.rows.set_index(["method", "cost", "in"])["sizes"]
    assert sizes["SGD", "memory", "B"] == "1 2" and sizes["SGD", "memory", "X"] == "8 9"
    assert QUICK in markdown(found)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("rounds = 1\n", "rounds = 0\n", "line 2: rounds = 0: allowed is"),
        ("batch = [2, 4]", "batch = [4, 2]", "line 10"),
        ("batch = [2, 4]", "batch = [4]", "two sizes"),
        ('published = "known"', 'published = "other"', "known: known"),
        ('optimizer = "sgd"', 'optimizer = "sdg"', "line 8"),
        ("tolerance", "toleranze", "unknown key 'toleranze'"),
    ],
)
def test_mistakes_in_settings_are_named(old, new, said) -> None:
    with pytest.raises(SettingsError, match=said.replace("[", r"\[")):
        parse(Table4, TABLE4.replace(old, new, 1), "my.toml")


def test_fig3_refuses_an_unknown_baseline() -> None:
    with pytest.raises(SettingsError, match="line 7: .*known: SGD, Vanilla DDP"):
        parse(Figure3, FIG3.replace('baseline = "SGD"', 'baseline = "Adam"'), "my.toml")


def test_packaged_settings_are_valid() -> None:
    table = load(Table4, "table4")
    assert {m.published for m in table.method} <= {None, *table.published}
    assert load(Figure3, "fig3").baseline == "SGD"
    assert packaged("table4").startswith("#")
    assert step_cost.machine()["threads"] == "1"
