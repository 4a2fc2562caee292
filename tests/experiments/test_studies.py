# SPDX-License-Identifier: MIT
"""The studies of twins and of Kronecker curvature, on runs that are made up or tiny."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ddpnopt.experiments import kronecker_study, twins_study
from ddpnopt.experiments.kronecker_study import cells, seconds_to
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.training import Epoch, RunConfig, RunResult
from ddpnopt.experiments.twins import Pair, Problem, finished, judge_pair, paired, render

PAIR = Pair("rmsprop", "ddpnopt-rmsprop", (0.01, 0.1, 1.0), clips=(1.0,))
BASE = RunConfig(architecture="mlp-4x1-tanh", batch=256, epochs=1)


def runs_of(cells_: dict[tuple[str, float], list[float]]) -> pd.DataFrame:
    rows = [
        {
            **{"dataset": "digits", "architecture": "mlp-4x1-tanh", "batch": 256},
            **{"label": label, "lr": lr, "seed": seed, "test_accuracy": accuracy},
            **{"train_loss": 0.1, "seconds": 1.0, "diverged": False, "failed": accuracy < 20},
        }
        for (label, lr), accuracies in cells_.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows)


RUNS = runs_of(
    {
        ("RMSprop", 0.01): [92.0, 92.0],
        ("RMSprop", 0.1): [93.0, 94.0],
        ("RMSprop", 1.0): [10.0, 10.0],
        ("RMSprop (grad_clip=1.0)", 0.1): [92.0, 93.0],
        ("RMSprop (grad_clip=1.0)", 1.0): [60.0, 70.0],
        ("DDPNOpt RMSprop", 0.01): [91.0, 92.0],
        ("DDPNOpt RMSprop", 0.1): [94.0, 94.0],
        ("DDPNOpt RMSprop", 1.0): [92.0, 93.0],
    }
)


def test_a_pair_is_judged_by_the_borrowed_optimizers_best() -> None:
    outcome = judge_pair(RUNS, PAIR)
    assert (outcome.borrowed.low, outcome.borrowed.high) == (0.01, 0.1)
    assert outcome.twin is not None and outcome.twin.high == 1.0
    assert outcome.widening == pytest.approx(10.0)
    assert outcome.clipped is not None and outcome.clipped.high == 0.1
    assert outcome.worst_lr == 0.01 and outcome.difference == -0.5 and outcome.no_loss
    assert outcome.error == pytest.approx(0.5)


def test_differences_are_paired_by_seed() -> None:
    runs = pd.concat([RUNS, runs_of({("RMSprop", 0.1): [0.0] * 3})[2:]])
    assert paired(runs, "DDPNOpt RMSprop", "RMSprop", 0.1) == (0.5, 0.5, 2)
    assert paired(runs, "DDPNOpt KFAC", "RMSprop", 0.1)[2] == 0


def test_tables_name_failures_and_leave_out_what_was_not_run() -> None:
    text = render(
        RUNS, [Problem(BASE, "Tiny")], [PAIR, Pair("adamw", "ddpnopt-adamw", (0.01, 0.1))]
    )
    assert "| Tiny | RMSprop | 0.01 to 0.1 | 0.1 to 0.1 | 0.01 to 1 | >= 10 |" in text
    assert "10.0 (10.0, 100 % failed)" in text and "AdamW" not in text


def test_seeds_that_are_not_finished_are_left_out() -> None:
    whole = runs_of(
        {
            (label, lr): [90.0, 91.0]
            for label in (
                *("RMSprop", "RMSprop (grad_clip=1.0)"),
                *("DDPNOpt RMSprop", "DDPNOpt RMSprop open loop"),
            )
            for lr in PAIR.lrs
        }
    )
    problem = Problem(BASE, "Tiny")
    assert len(finished(whole, [problem], [PAIR])) == len(whole)
    # The last row is seed 1's: with it gone, seed 0 remains.
    left = finished(whole[:-1], [problem], [PAIR])
    assert set(left["seed"]) == {0} and len(left) == len(whole) // 2
    assert finished(RUNS, [problem], [PAIR]).empty


def result(losses: list[float], accuracy: float = 0.9, damping: float = 0.1) -> RunResult:
    config = RunConfig(optimizer="kfac", lr=0.1, options={"damping": damping})
    epochs = tuple(
        Epoch(epoch=i, train_loss=loss, test_accuracy=accuracy, seconds=9.0, cpu_seconds=1.0)
        for i, loss in enumerate(losses, 1)
    )
    return RunResult(
        config=config,
        epochs=epochs,
        train_loss=losses[-1],
        test_accuracy=accuracy,
        chance=0.1,
        seconds=9.0,
        diverged=False,
    )


def test_seconds_to_a_loss_are_cpu_seconds_to_the_epochs_end() -> None:
    assert seconds_to(result([0.5, 0.1, 0.05]), 0.1) == 2.0
    assert math.isinf(seconds_to(result([0.5, 0.2]), 0.1))


def test_a_cell_counts_every_seed() -> None:
    one, two = cells([result([0.1]), result([0.5, 0.3], 0.7), result([0.1], damping=0.5)])
    assert one.mean == pytest.approx(80.0) and one.worst == pytest.approx(70.0)
    assert math.isinf(one.seconds) and one.damping == 0.1
    assert two.damping == 0.5 and two.seconds == 1.0


def test_twins_study_runs_and_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = twins_study.Study({"tiny": Problem(BASE, "Tiny")}, (PAIR,))
    monkeypatch.setattr(twins_study, "STUDIES", {"twins": study})
    page = tmp_path / "docs" / "curvatures.md"
    page.parent.mkdir()
    page.write_text("# Page\n<!-- twins: begin -->\nold\n<!-- twins: end -->\nrest\n")
    arguments = {"out": tmp_path, "docs": page.parent, "data": None, "jobs": 1, "seeds": 1}
    twins_study.main(
        "twins", **arguments, first_seed=0, problem=None, optimizer=None, published=True
    )
    text = page.read_text()
    assert "old" not in text and "### Tiny" in text and text.endswith("rest\n")
    assert len(pd.read_csv(page.parent / "assets" / "twins_runs.csv")) == 12
    with pytest.raises(ValueError, match="unknown study 'twin'"):
        twins_study.main("twin", **arguments, first_seed=0)


def test_kronecker_study_runs_and_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kronecker_study, "BASE", BASE)
    monkeypatch.setattr(
        kronecker_study,
        "CONTENDERS",
        (Contender("kfac", (0.1,), (("damping", 0.1),)), Contender("adam", (0.01,))),
    )
    page = tmp_path / "curvatures.md"
    page.write_text("<!-- kronecker: begin --><!-- kronecker: end -->")
    kronecker_study.main(out=tmp_path, docs=tmp_path, jobs=1, seeds=1, first_seed=0, publish=True)
    assert "| kfac | lr 0.1, damping 0.1 |" in page.read_text()
    assert "not reached" in page.read_text()
