# SPDX-License-Identifier: MIT
"""Single runs, sweeps, the store and statistics."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from ddpnopt.experiments import sweep as sweep_module
from ddpnopt.experiments import training
from ddpnopt.experiments.optimizers import Built
from ddpnopt.experiments.store import COLUMNS, CsvStore
from ddpnopt.experiments.summary import Target, by_optimizer, by_rate, judge, rate_range
from ddpnopt.experiments.sweep import Contender, SweepError, frame, grid, sweep
from ddpnopt.experiments.training import RunConfig, RunResult, check, train

SMALL = RunConfig(
    dataset="wine", architecture="mlp-8x1-tanh", optimizer="sgd", lr=0.1, epochs=2, batch=16
)


def quiet() -> Console:
    return Console(file=io.StringIO())


def outcome(result: RunResult) -> list[tuple[float, float]]:
    return [(e.train_loss, e.test_accuracy) for e in result.epochs]


@pytest.mark.parametrize("optimizer", ["sgd", "ddpnopt", "ddpnopt-rmsprop"])
def test_same_seed_same_run_and_global_generator_untouched(optimizer: str) -> None:
    config = SMALL.model_copy(update={"optimizer": optimizer})
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = train(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert outcome(train(config)) == outcome(first)
    other = train(config.model_copy(update={"seed": 1}))
    assert outcome(other) != outcome(first)


def test_training_learns_and_reports_every_epoch() -> None:
    seen: list[int] = []
    result = train(SMALL.model_copy(update={"epochs": 15}), lambda e: seen.append(e.epoch))
    assert seen == list(range(1, 16)) and not result.diverged and not result.failed
    assert result.test_accuracy > 0.85
    assert result.train_loss == result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert result.seconds > 0


def test_divergence_is_a_result() -> None:
    config = SMALL.model_copy(
        update={"architecture": "linear", "lr": 1e38, "epochs": 5, "scale": "none"}
    )
    result = train(config)
    assert result.diverged and result.failed and "non-finite" in result.reason
    assert len(result.epochs) < 5
    assert result.test_accuracy <= 0.6
    # A record that is not finite survives the way to disk and back.
    back = RunResult.model_validate_json(result.model_dump_json())
    assert back.reason == result.reason
    assert math.isfinite(back.train_loss) == math.isfinite(result.train_loss)


def test_error_inside_the_step_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise FloatingPointError("gradient of layer 0 is not finite")

    monkeypatch.setattr(
        training, "build_optimizer", lambda n, m, lr, o: Built(Strict(m.parameters(), lr), None)
    )
    result = train(SMALL)
    assert result.diverged and result.reason == "gradient of layer 0 is not finite"
    # The weights are the last finite ones, so the accuracy is theirs.
    assert math.isfinite(result.train_loss)


def test_clipping_is_applied() -> None:
    clipped = train(SMALL.model_copy(update={"options": {"grad_clip": 1e-9}}))
    frozen = train(SMALL.model_copy(update={"lr": 0.0}))
    assert clipped.train_loss == pytest.approx(frozen.train_loss, abs=1e-5)
    assert train(SMALL).train_loss != pytest.approx(frozen.train_loss, abs=1e-3)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"device": "tpu9"}, "unknown device 'tpu9'; known: cpu"),
        ({"optimizer": "nope"}, "unknown optimizer"),
        ({"options": {"nope": 1}}, "has no option nope"),
        ({"architecture": "cnn"}, "has no images"),
    ],
)
def test_check_raises_what_training_would(update: dict[str, object], message: str) -> None:
    config = SMALL.model_copy(update=update)
    for call in (check, train):
        with pytest.raises(ValueError, match=message):
            call(config)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"epochs": 0}, {"batch": 0}, {"colour": "red"}])
def test_config_is_validated(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"dataset": "wine", **bad})


def test_key_depends_on_every_field() -> None:
    changed: list[dict[str, object]] = [
        {"lr": 0.2},
        {"seed": 1},
        {"options": {"momentum": 0.9}},
        {"optimizer": "adam"},
        {"epochs": 3},
        {"scale": "unit"},
    ]
    keys = {SMALL.key, *(SMALL.model_copy(update=c).key for c in changed)}
    assert len(keys) == 7
    assert RunConfig(**SMALL.model_dump()).key == SMALL.key


def test_sweep_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CsvStore(tmp_path / "deep" / "runs.csv")
    contenders = [Contender("sgd", (0.01, 0.1)), Contender("adam", (0.01,))]
    configs = grid(SMALL, contenders, [0, 1])
    assert [c.seed for c in configs] == [0, 0, 0, 1, 1, 1]
    sweep(configs[:4], store, console=quiet())
    made: list[str] = []
    original = sweep_module.train
    monkeypatch.setattr(sweep_module, "train", lambda c: made.append(c.key) or original(c))
    runs = sweep([*configs, configs[0]], store, console=quiet())
    assert made == [c.key for c in configs[4:]]
    assert len(runs) == 6 and set(runs["label"]) == {"SGD", "Adam"}
    # Only what was asked for comes back, though the store holds more.
    assert len(sweep(configs[:2], store, console=quiet())) == 2


def test_sweep_on_two_processes_equals_one(tmp_path: Path) -> None:
    configs = grid(SMALL, [Contender("sgd", (0.1, 0.3))], [0, 1])
    two = sweep(configs, CsvStore(tmp_path / "two.csv"), jobs=2, console=quiet())
    one = sweep(configs, CsvStore(tmp_path / "one.csv"), console=quiet())
    order = ["lr", "seed"]
    columns = [*order, "train_loss", "test_accuracy"]
    first, second = (t.sort_values(order)[columns].reset_index(drop=True) for t in (one, two))
    pd.testing.assert_frame_equal(first, second)


def test_sweep_keeps_the_others_and_names_the_error(tmp_path: Path) -> None:
    store = CsvStore(tmp_path / "runs.csv")
    bad = SMALL.model_copy(update={"options": {"nope": 1}})
    with pytest.raises(SweepError, match="1 of 2 runs.*\n.*SGD has no option nope"):
        sweep([bad, SMALL], store, console=quiet())
    assert store.keys() == {SMALL.key}


def test_store_drops_a_half_written_line_and_refuses_other_tables(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    CsvStore(path).append(train(SMALL))
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:40])
    store = CsvStore(path)
    assert path.read_text() == whole and len(store.results()) == 1
    assert store.results()[0].config == SMALL
    assert whole.splitlines()[0] == ",".join(COLUMNS)
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no table of results"):
        CsvStore(other)


def runs_of(cells: dict[tuple[str, float], list[float]]) -> pd.DataFrame:
    rows = [
        {
            "dataset": "digits",
            "architecture": "mlp",
            "label": label,
            "lr": lr,
            "seed": seed,
            "train_loss": math.nan if accuracy <= 10 else 0.1,
            "test_accuracy": accuracy,
            "diverged": accuracy <= 10,
            "failed": accuracy <= 10,
            "seconds": 1.0,
            "curve": [(1, 0.1, accuracy)],
        }
        for (label, lr), accuracies in cells.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows)


def test_statistics() -> None:
    runs = runs_of(
        {
            ("SGD", 0.1): [92.0, 94.0],
            ("SGD", 0.4): [10.0, 50.0],
            ("SGD", 1.0): [93.0, 93.0],
            ("DDPNOpt", 0.1): [94.0, 94.0],
            ("DDPNOpt", 0.4): [92.0, 94.0],
            ("DDPNOpt", 1.0): [80.0, 60.0],
        }
    )
    rates = by_rate(runs).set_index(["label", "lr"])
    cell = rates.loc[("SGD", 0.4)]
    assert cell["mean"] == 30.0 and cell["worst"] == 10.0 and cell["failed"] == 0.5
    assert cell["sd"] == pytest.approx(28.2843, abs=1e-3) and math.isinf(cell["loss"])
    totals = by_optimizer(runs).set_index("label")
    # The stretch is unbroken: SGD's 1.0 does not count, since 0.4 between is bad.
    assert (totals.loc["SGD", "low"], totals.loc["SGD", "high"]) == (0.1, 0.1)
    assert totals.loc["DDPNOpt", "factor"] == pytest.approx(4.0)
    assert totals.loc["SGD", "failed"] == pytest.approx(1 / 6)
    assert rate_range(rates.loc["SGD"].reset_index(), 99.0) is None


def test_targets() -> None:
    runs = runs_of({("SGD", 0.1): [93.0, 95.0], ("DDPNOpt", 0.1): [93.0, 94.4]})
    targets = [
        Target("mlp", 0.1, below_sgd=0.5),
        Target("mlp", 0.1, below_sgd=0.1),
        Target("mlp", 0.1, mean=93.0, worst=93.5),
        Target("mlp", 3.0, mean=0.0),
    ]
    verdicts = judge(runs, targets)
    assert [v.met for v in verdicts] == [True, False, False, False]
    assert verdicts[0].wanted == ">= SGD - 0.5 = 93.5" and verdicts[3].seeds == 0


def test_frame_has_percent_and_curves() -> None:
    result = train(SMALL)
    table = frame([result])
    assert table["test_accuracy"][0] == 100 * result.test_accuracy
    assert [point[0] for point in table["curve"][0]] == [1, 2]
