# SPDX-License-Identifier: MIT
"""Means, bootstrap intervals and verdicts, with ties, missing and diverged runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddpnopt.experiments.reproduce import statistics as s
from ddpnopt.experiments.reproduce.published import cells, find, search_range


@pytest.mark.parametrize(("n", "floor"), [(3, 0.88), (5, 0.90), (10, 0.90)])
def test_intervals_cover_the_true_mean_about_as_often_as_they_say(n: int, floor: float) -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = s.interval(generator.normal(0.3, 1.0, size=n))
        hits += low <= 0.3 <= high
    # A plain percentile interval reaches 0.75, 0.83 and 0.90 at these sizes.
    assert floor <= hits / 200 < 0.995


def test_intervals_are_the_same_every_time_and_move_with_the_data() -> None:
    data = np.array([0.1, 0.4, -0.2, 0.3])
    assert s.interval(data) == s.interval(data)
    assert s.interval(data + 1.0) == pytest.approx([end + 1.0 for end in s.interval(data)])
    assert s.interval(-data)[0] == pytest.approx(-s.interval(data)[1], rel=0.05)


def test_one_seed_has_no_interval_and_is_never_significant() -> None:
    apart = s.paired([1.0], [0.0])
    assert (apart.mean, apart.pairs) == (1.0, 1)
    assert math.isnan(apart.low) and not apart.significant


def test_diverged_seeds_leave_the_difference_and_the_mean_but_are_counted() -> None:
    apart = s.paired([0.1, math.inf, 0.3, math.nan], [0.2, 0.2, math.inf, 0.1])
    assert apart.pairs == 1
    assert apart.mean == pytest.approx(-0.1)
    summary = s.summarise([0.1, math.inf, 0.3], higher_is_better=False)
    assert summary.mean == pytest.approx(0.2)
    assert (summary.seeds, summary.diverged, summary.worst) == (3, 1, math.inf)
    assert s.summarise([90.0, math.nan], higher_is_better=True).worst == 90.0


def test_both_diverged_is_no_pair() -> None:
    assert s.paired([math.inf, math.inf], [math.inf, 0.1]).pairs == 0


@pytest.mark.parametrize(
    ("values", "reference", "said"),
    [
        ([], [], "not run"),
        ([math.inf, math.nan], [0.1, math.inf], "diverged"),
        ([math.inf, math.nan], [math.nan, math.inf], "both diverged"),
        ([0.1, 0.2], [math.inf, math.nan], "baseline diverged"),
        ([0.1, math.inf], [math.inf, 0.1], "baseline diverged"),
        ([0.1, math.inf], [0.2, 0.1], "same sign, not significant"),
    ],
)
def test_runs_that_all_diverged_are_not_called_not_run(
    values: list[float], reference: list[float], said: str
) -> None:
    assert s.verdict(-0.1, s.paired(values, reference)) == said


def test_no_seeds_at_all() -> None:
    summary = s.summarise([], higher_is_better=True)
    assert summary.seeds == 0 and math.isnan(summary.mean) and math.isnan(summary.worst)


def difference(mean: float, low: float, high: float) -> s.Difference:
    return s.Difference(mean, low, high, 10)


@pytest.mark.parametrize(
    ("published", "apart", "said"),
    [
        (-0.1, difference(-0.2, -0.3, -0.1), "same sign, significant"),
        (-0.1, difference(-0.2, -0.5, 0.1), "same sign, not significant"),
        (-0.1, difference(0.2, 0.1, 0.3), "opposite sign, significant"),
        (0.1, difference(-0.2, -0.5, 0.1), "opposite sign, not significant"),
        (0.1, difference(0.2, 0.1, 0.3), "same sign, significant"),
        (-0.1, difference(0.0, 0.0, 0.0), "no difference, not significant"),
        (0.0, difference(0.2, 0.1, 0.3), "no difference, significant"),
        (math.nan, difference(0.2, 0.1, 0.3), "significant"),
        (math.nan, difference(0.2, -0.1, 0.3), "not significant"),
        (-0.1, s.NOTHING, "not run"),
        # An end exactly at 0 does not leave 0 out.
        (-0.1, difference(-0.2, -0.4, 0.0), "same sign, not significant"),
    ],
)
def test_verdicts(published: float, apart: s.Difference, said: str) -> None:
    assert s.verdict(published, apart) == said


def test_counts() -> None:
    found = s.count(
        [
            "same sign, significant",
            "same sign, not significant",
            "opposite sign, not significant",
            "opposite sign, significant",
            "no difference, not significant",
            "not run",
            "diverged",
            "both diverged",
        ]
    )
    assert found == s.Count(cells=7, same=2, same_significant=1, against=2, missing=1)
    assert found.agree == 5


def test_published_cells_and_their_wins() -> None:
    # 3 tables x 2, and 12 rates x (baseline + 4); sums added by hand from the printed tables.
    assert len(cells()) == 6 + 60
    ablation = [c for c in cells() if c.table == "ablation"]
    sgd = [c for c in ablation if c.baseline == "sgd"]
    assert sum(c.train_loss for c in sgd if c.eps_vxx is None) == pytest.approx(3.6077)
    assert sum(c.accuracy for c in sgd if c.eps_vxx is None) == pytest.approx(299.43)
    twins = [c for c in ablation if c.eps_vxx is not None]
    base = {(c.baseline, c.lr): c for c in ablation if c.eps_vxx is None}
    assert len(twins) == 48
    assert sum(c.train_loss < base[c.baseline, c.lr].train_loss for c in twins) == 47
    assert sum(c.accuracy > base[c.baseline, c.lr].accuracy for c in twins) == 46


def test_finding_published_cells() -> None:
    cell = find("ablation", "rmsprop", 0.045, 5e-6)
    assert cell is not None and (cell.train_loss, cell.accuracy) == (1.2568, 61.75)
    assert find("ablation", "ekfac", 0.3, None).train_loss == 0.5959
    assert find("ablation", "ekfac", 0.3, 5e-6).accuracy == 84.15
    assert find("table8", "ekfac", 0.03, 123.0).accuracy == 95.19
    assert find("table8", "ekfac", 0.03, None).accuracy == 95.24
    assert find("table6", "sgd", 0.11, None) is None
    assert find("ablation", "sgd", 0.4, 2e-5) is None
    assert search_range("ekfac") == (0.01, 0.3)
    assert search_range("kfac") is None
