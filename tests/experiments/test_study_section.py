# SPDX-License-Identifier: MIT
"""The study `when_it_helps` on the page of results: what is complete, as far as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddpnopt.experiments.page import study
from ddpnopt.experiments.page.render import render
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender, grid
from ddpnopt.experiments.when_it_helps.problems import FAMILIES, Problem

PROBLEM = Problem("A net <b>", RunConfig(dataset="wine", epochs=2), ("muon", "kfac"))


def result(config: RunConfig) -> RunResult:
    """Accuracy 0.9 at rates up to 0.01, less above; a closed loop's epoch takes twice the time."""
    right = 0.9 if config.lr <= 0.01 else 0.5
    cost = 2.0 if "feedback" in config.optimizer else 1.0
    epochs = tuple(
        Epoch(epoch=n, train_loss=0.5, test_accuracy=right * n / 2, seconds=cost, cpu_seconds=cost)
        for n in (1, 2)
    )
    return RunResult(
        config=config,
        epochs=epochs,
        train_loss=0.5,
        test_accuracy=right,
        chance=0.1,
        seconds=2 * cost,
        diverged=False,
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(study, "PROBLEMS", {"net": PROBLEM})
    kept = SqliteStore(tmp_path / "store.sqlite")
    for one in FAMILIES["muon"].contenders():
        again = Contender(one.optimizer, (one.lrs[0],), one.options)
        configs = [*grid(PROBLEM.base, [one], range(2)), *grid(PROBLEM.base, [again], (100, 101))]
        for config in configs:
            kept.append(result(config))
    return tmp_path


def test_complete_families_are_shown_and_counted(store: Path) -> None:
    own = study.study_section(store)
    assert (own.state, own.measured, own.total) == ("incomplete", 1, 2)
    assert own.picture.startswith("data:image/png;base64,")
    assert "A net &lt;b&gt;" in own.notes and "<b>" not in own.notes
    assert "90.0" in own.notes and "45.0 (2.0x)" in own.notes  # in off's time one of two epochs
    page = render([own], {}, date="today", store="store.sqlite")
    assert 'id="when-it-helps"' in page and page.count("<h2") >= 1


def test_nothing_run_and_no_store(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "empty.sqlite").append(result(RunConfig(seed=0)))
    own = study.study_section(tmp_path / "empty.sqlite")
    assert (own.state, own.picture, own.measured) == ("not run", "", 0)
    with pytest.raises(ValueError, match="--study .*no such file.*when_it_helps"):
        study.study_section(tmp_path / "none.sqlite")
