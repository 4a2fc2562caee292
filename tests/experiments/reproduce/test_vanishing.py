# SPDX-License-Identifier: MIT
"""Vanishing gradients: chosen rates, claims and ratios, bands, empty cells."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.reproduce import vanishing
from ddpnopt.experiments.reproduce.outcome import QUICK, Request, markdown, write
from ddpnopt.experiments.reproduce.schema import SettingsError, load, parse
from ddpnopt.experiments.reproduce.vanishing import Trained
from ddpnopt.experiments.reproduce.vanishing_plots import stacked
from ddpnopt.experiments.reproduce.vanishing_settings import Method, Vanishing, sizes
from ddpnopt.experiments.store import SqliteStore

SETTINGS = """
loss = "mmc"
escape = 0.8
update_ratio = [5.0, 10.0]
[network]
dataset = "digits"
architecture = "mlp-4x1-sigmoid"
initialisation = "xavier"
batch = 256
epochs = 2
train_samples = 512
[runs]
seeds = 2
choosing_seeds = 1
choosing_epochs = 1
[quick]
seeds = 1
epochs = 1
choosing_seeds = 1
[[method]]
name = "SGD"
optimizer = "sgd"
lr = [1e-6, 0.05]
[[method]]
name = "DDPNOpt"
optimizer = "ddpnopt"
options = { value = "dense" }
lr = [0.05]
published = "escapes"
ours = true
"""


def request(folder: Path, text: str = SETTINGS, **changes: object) -> Request:
    settings = folder / "settings.toml"
    settings.write_text(text)
    return Request(folder, SqliteStore(folder / "store.sqlite"), settings=settings, **changes)


def result(seed: int, losses: list[float], update: float, diverged: bool = False) -> RunResult:
    epochs = tuple(
        Epoch(
            epoch=n,
            train_loss=loss,
            test_accuracy=0.5,
            seconds=1.0,
            running_loss=loss,
            update_norm=update,
        )
        for n, loss in enumerate(losses, 1)
    )
    return RunResult(
        config=RunConfig(seed=seed),
        epochs=epochs,
        train_loss=losses[-1],
        test_accuracy=0.5,
        chance=0.1,
        seconds=float(len(losses)),
        diverged=diverged,
    )


def method(name: str, results: list[RunResult], published: str | None, ours: bool) -> Trained:
    options = {"name": name, "optimizer": "sgd", "lr": (0.1,), "published": published}
    return Trained(Method(**options, ours=ours), 0.1, {}, tuple(results))


def test_rates_are_chosen_and_runs_are_read_again(tmp_path, monkeypatch) -> None:
    first = vanishing.fig6(request(tmp_path))
    rows = first.rows
    assert list(rows["method"]) == ["SGD", "DDPNOpt", "DDPNOpt"]
    assert rows["lr"].iloc[0] == 0.05  # the other rate does not move
    assert (rows["seeds"] == 2).all() and (rows["update_norm"].iloc[:2] > 0).all()
    assert rows["published"].iloc[2] == "5 to 10"
    assert rows["difference"].notna().tolist() == [False, True, False]
    assert "lr 0.05 of 1e-06 (loss " in first.settings

    again = vanishing.fig6(request(tmp_path, run=False))
    assert list(again.rows["measured"]) == list(rows["measured"])
    assert [f.name for f in write(again, tmp_path / "out")] == ["fig6.csv", "fig6.md", "fig6.png"]


def test_loss_decides_the_configuration(tmp_path) -> None:
    settings = parse(Vanishing, SETTINGS, "my.toml")
    config = settings.config(request(tmp_path), settings.method[1], 0.2, 3, 4)
    assert (config.loss, config.record_updates, config.initialisation) == ("mmc", True, "xavier")
    assert (config.lr, config.seed, config.epochs) == (0.2, 3, 4)
    assert config.options == {"value": "dense"}


def test_nothing_run_is_visibly_empty(tmp_path) -> None:
    found = vanishing.fig10(request(tmp_path, run=False))
    assert found.rows["measured"].isna().all() and set(found.rows["verdict"]) == {"not run"}
    assert len(write(found, tmp_path / "out")) == 3
    assert "nothing has been run" in found.notes[0]


def test_claims_hold_when_most_seeds_agree() -> None:
    out, stuck = result(0, [50.0, 10.0], 2.0), result(1, [50.0, 49.0], 1.0)
    lost = result(2, [50.0, math.inf], 3.0, diverged=True)
    settings = parse(Vanishing, SETTINGS, "my.toml")
    trained = [
        method("baseline", [stuck, result(2, [50.0, 48.0], 1.0)], "stays", False),
        method("escapes", [out, result(2, [50.0, 5.0], 4.0), stuck], "escapes", True),
        method("half", [out, stuck], "escapes", True),
        method("lost", [lost], "escapes", True),
    ]
    rows = vanishing._method_rows(settings, trained, 40.0)
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == [vanishing.AS_PUBLISHED] * 2 + [vanishing.NOT_AS_PUBLISHED] * 2
    assert [row["escaped"] for row in rows] == [0, 2, 1, 0]
    # Paired on seeds 1 and 2: 49 - 49 and 5 - 48.
    assert rows[1]["difference"] == pytest.approx(-21.5)
    assert rows[3]["worst"] == math.inf and rows[3]["diverged"] == 1


@pytest.mark.parametrize("update, said", [(4.9, False), (5.0, True), (10.0, True), (10.1, False)])
def test_update_norms_against_the_largest_baseline(update, said) -> None:
    settings = parse(Vanishing, SETTINGS, "my.toml")
    trained = [
        method("small", [result(0, [1.0], 0.5)], None, False),
        method("large", [result(0, [1.0], 1.0)], None, False),
        method("ours", [result(0, [1.0, 1.0], update)], None, True),
    ]
    (row,) = vanishing._ratio_rows(settings, trained)
    assert row["measured"] == pytest.approx(update)
    assert (row["verdict"] == vanishing.AS_PUBLISHED) == said


def test_curves_end_where_a_run_diverged() -> None:
    runs = [result(0, [3.0, 2.0, 1.0], 1.0), result(1, [4.0, math.inf], 1.0, diverged=True)]
    table = stacked(runs, lambda epoch: epoch.train_loss)
    np.testing.assert_array_equal(table, [[3.0, 2.0, 1.0], [4.0, np.nan, np.nan]])


def test_quick_and_seeds(tmp_path) -> None:
    settings = parse(Vanishing, SETTINGS, "my.toml")
    quick = sizes(settings, request(tmp_path, quick=True))
    assert (quick.seeds, quick.epochs, quick.choosing) == ((0,), 1, (1000,))
    asked = sizes(settings, request(tmp_path, seeds=4, epochs=7))
    assert (asked.seeds, asked.epochs, asked.choosing_epochs) == ((0, 1, 2, 3), 7, 1)
    with pytest.raises(SettingsError, match="--seeds 1001"):
        sizes(settings, request(tmp_path, seeds=1001))
    found = vanishing.fig6(request(tmp_path, quick=True))
    assert QUICK in markdown(found)


def test_settings() -> None:
    assert load(Vanishing, "fig6").loss == "mmc"
    ten = load(Vanishing, "fig10")
    assert ten.loss == "cross_entropy" and {m.published for m in ten.method} == {"stays"}
    overlapping = SETTINGS.replace("choosing_epochs = 1", "choosing_epochs = 1\nfirst_seed = 1000")
    with pytest.raises(SettingsError, match="overlap"):
        parse(Vanishing, overlapping, "my.toml")
    with pytest.raises(SettingsError, match="escape = 1.5: allowed is .* less than 1"):
        parse(Vanishing, SETTINGS.replace("escape = 0.8", "escape = 1.5"), "my.toml")
    with pytest.raises(SettingsError, match="method"):
        parse(Vanishing, SETTINGS.replace('value = "dense"', 'valeu = "dense"'), "my.toml")
