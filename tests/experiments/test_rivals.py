# SPDX-License-Identifier: MIT
"""The study of DDPNOpt and its rivals, on runs that are made up or tiny."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ddpnopt.experiments import baselines_study
from ddpnopt.experiments.baselines_study import rates
from ddpnopt.experiments.optimizers import OPTIMIZERS
from ddpnopt.experiments.rivals import (
    Seeds,
    best_rate,
    choosing_configs,
    fresh_configs,
    milliseconds,
    render,
    rows_of,
)
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import Epoch, RunConfig, RunResult
from ddpnopt.experiments.twins import Problem

BASE = RunConfig(dataset="wine", architecture="mlp-4x1-tanh", batch=100, epochs=2)
PROBLEM = Problem(BASE, "Tiny")
SGD = Contender("sgd", (0.1, 0.2, 0.4))
SEEDS = Seeds(first=0, shown=3)


def result(
    config: RunConfig, accuracy: float, loss: float = 0.5, diverged: bool = False
) -> RunResult:
    epoch = {"train_loss": loss, "test_accuracy": accuracy, "seconds": 9.0, "cpu_seconds": 0.3}
    return RunResult(
        config=config,
        epochs=tuple(Epoch(epoch=i, **epoch) for i in (1, 2)),
        train_loss=loss,
        test_accuracy=accuracy,
        chance=0.4,
        seconds=18.0,
        diverged=diverged,
    )


def choice(accuracies: dict[float, float]) -> dict[str, RunResult]:
    """Runs of the first phase, the same for both seeds."""
    configs = choosing_configs(BASE, SGD, SEEDS)
    return {c.key: result(c, accuracies[c.lr]) for c in configs if c.lr in accuracies}


def finished() -> dict[str, RunResult]:
    """Both phases; the table's runs have 0.3, 0.9 and 1.0."""
    found = choice({0.1: 0.5, 0.2: 0.9, 0.4: 0.8})
    configs = fresh_configs(BASE, SGD, SEEDS, found)
    return found | {c.key: result(c, a) for c, a in zip(configs, (0.3, 0.9, 1.0), strict=True)}


def test_rates_are_geometric_with_both_ends() -> None:
    assert rates(0.1, 100.0) == (0.1, 1.0, 10.0, 100.0)
    assert rates(0.07, 0.5) == (0.07, 0.135, 0.26, 0.5)


def test_the_best_mean_accuracy_chooses_then_the_loss_then_the_lower_rate() -> None:
    runs = [(0.1, 0.9, 0.1), (0.1, 0.7, 0.1), (0.2, 0.8, 0.3), (0.2, 0.8, 0.4), (0.4, 0.7, 0.0)]

    def made(rows: list[tuple[float, float, float]]) -> list[RunResult]:
        return [result(BASE.model_copy(update={"lr": lr}), a, loss) for lr, a, loss in rows]

    assert best_rate(made(runs)) == 0.1
    assert best_rate(made([*runs, (0.4, 1.0, 0.0)])) == 0.4
    assert best_rate(made([(0.2, 0.8, 0.1), (0.1, 0.8, 0.1)])) == 0.1
    # A loss that is not a number loses every tie.
    assert best_rate(made([(0.1, 0.8, math.nan), (0.2, 0.8, 9.0)])) == 0.2


def test_time_is_cpu_time_over_steps() -> None:
    # 142 training samples in batches of 100: two steps an epoch, 0.3 s.
    assert milliseconds(result(BASE, 0.9)) == pytest.approx(150.0)
    assert math.isnan(milliseconds(result(BASE, 0.9, diverged=True)))


def test_fresh_seeds_wait_for_the_choice_and_are_apart_from_it() -> None:
    assert set(SEEDS.choosing).isdisjoint(SEEDS.fresh) and list(SEEDS.fresh) == [100, 101, 102]
    assert fresh_configs(BASE, SGD, SEEDS, choice({0.1: 0.5, 0.2: 0.9})) == []
    configs = fresh_configs(BASE, SGD, SEEDS, choice({0.1: 0.5, 0.2: 0.9, 0.4: 0.8}))
    assert [(c.lr, c.seed) for c in configs] == [(0.2, 100), (0.2, 101), (0.2, 102)]


def test_the_table_is_of_fresh_seeds_and_counts_failures() -> None:
    text = render([PROBLEM], [SGD, Contender("adam", (0.1,))], SEEDS, finished())
    assert "| SGD | 0.2 | 73.3 | 37.9 | 30.0 | 0.5000 | 150.00 | 1 of 3 |" in text
    assert "chosen on seeds 0, 1; the tables are of seeds 100, 101, 102" in text
    assert "Adam" not in text and "edge" not in text


def test_rates_at_an_edge_are_named_and_unfinished_optimizers_left_out() -> None:
    found = finished()
    narrow = Contender("sgd", (0.1, 0.2))
    assert "edge of the range: SGD." in render([PROBLEM], [narrow], SEEDS, found)
    found.popitem()
    assert "### Tiny" not in render([PROBLEM], [SGD], SEEDS, found)
    assert rows_of([PROBLEM], [SGD], SEEDS, found).empty


def test_published_rows_say_what_they_were_for() -> None:
    runs = rows_of([PROBLEM], [SGD], SEEDS, finished())
    assert list(runs["phase"]) == ["choice"] * 6 + ["table"] * 3
    assert runs["ms_per_step"].iloc[0] == pytest.approx(150.0)


def test_the_study_compares_known_optimizers_and_the_expensive_come_last() -> None:
    names = [[c.optimizer for c in stage] for stage in baselines_study.STAGES]
    assert {name for stage in names for name in stage} <= set(OPTIMIZERS)
    assert names[1:] == [["vanilla-ddp"], ["emsa"]]
    assert all(len(c.lrs) == 4 for stage in baselines_study.STAGES for c in stage)


def test_baselines_study_runs_resumes_and_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines_study, "PROBLEMS", {"tiny": PROBLEM})
    stages = ((Contender("sgd", (0.1, 0.2)), Contender("adam", (0.01,))),)
    monkeypatch.setattr(baselines_study, "STAGES", stages)
    page = tmp_path / "docs" / "baselines.md"
    page.parent.mkdir()
    page.write_text("# Page\n<!-- baselines: begin -->\nold\n<!-- baselines: end -->\nrest\n")
    arguments = {"out": tmp_path, "docs": page.parent, "jobs": 1, "seeds": 2, "first_seed": 0}
    baselines_study.main(**arguments, optimizer=["adam"], publish=True)
    assert "| Adam | 0.01 |" in page.read_text() and "SGD" not in page.read_text()
    for _ in range(2):
        baselines_study.main(**arguments, publish=True)
    text = page.read_text()
    assert "old" not in text and "| SGD | " in text and text.endswith("rest\n")
    # Three rates on two seeds, two optimizers on two fresh seeds.
    assert len(SqliteStore(tmp_path / "baselines" / "store.sqlite").keys()) == 10
    assert len(pd.read_csv(page.parent / "assets" / "baselines_runs.csv")) == 10
    with pytest.raises(ValueError, match="unknown optimizer of this study 'sdg'"):
        baselines_study.main(**arguments, optimizer=["sdg"])
    with pytest.raises(ValueError, match="unknown network 'win'"):
        baselines_study.main(**arguments, problem=["win"])
