# SPDX-License-Identifier: MIT
"""The search for learning rates: ranges, held-out data, resuming, workers, pruning, the command."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
import typer
from optuna.trial import TrialState
from typer.testing import CliRunner, Result

from ddpnopt.experiments import tune, tune_study
from ddpnopt.experiments.data import DATASETS, load
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.tune import Settings, evaluate, holdout, work
from ddpnopt.experiments.tune_command import tune_command
from ddpnopt.experiments.tune_ranges import WIDE, Space, default_range, parse_space, range_of
from ddpnopt.experiments.tune_results import best_trial, trials_frame
from ddpnopt.experiments.tune_study import (
    StorageError,
    claim,
    open_places,
    open_storage,
    open_study,
    read_settings,
    requeue,
)

optuna.logging.set_verbosity(optuna.logging.ERROR)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def settings_for(**changes: object) -> Settings:
    run = RunConfig(dataset="wine", architecture="linear", optimizer="sgd", epochs=2, batch=64)
    base: dict[str, object] = {
        "run": run,
        "search": {"lr": Space(low=0.01, high=1.0, log=True)},
        "seeds": 1,
        "pruner": "none",
    }
    return Settings.model_validate({**base, **changes})


def study_of(settings: Settings, name: str = "s") -> optuna.Study:
    return open_study(optuna.storages.InMemoryStorage(), name, settings)


Accuracy = Callable[[RunConfig, int], float]


def pretend(monkeypatch: pytest.MonkeyPatch, accuracy: Accuracy) -> list[RunConfig]:
    """Replace training by a function of the configuration and the epoch; list what is trained."""
    asked: list[RunConfig] = []

    def train(config: RunConfig, on_epoch: Callable[[Epoch], None]) -> RunResult:
        asked.append(config)
        epochs: list[Epoch] = []
        for number in range(1, config.epochs + 1):
            right = accuracy(config, number)
            epochs.append(
                Epoch(epoch=number, train_loss=1 - right, test_accuracy=right, seconds=0.0)
            )
            on_epoch(epochs[-1])
        return RunResult(
            config=config,
            epochs=tuple(epochs),
            train_loss=epochs[-1].train_loss,
            test_accuracy=epochs[-1].test_accuracy,
            chance=0.1,
            seconds=0.0,
            diverged=False,
        )

    monkeypatch.setattr(tune, "train", train)
    return asked


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        ("sgd", {}, (7e-2, 5e-1)),
        ("ddpnopt", {}, (7e-2, 5e-1)),
        ("ddpnopt-paper", {}, (7e-2, 5e-1)),
        ("adam", {}, (7e-4, 1e-2)),
        ("ddpnopt-adamw", {}, (7e-4, 1e-2)),
        ("rmsprop", {}, (7e-4, 1e-2)),
        ("ddpnopt-rmsprop-open-loop", {}, (7e-4, 1e-2)),
        ("ekfac", {}, (1e-2, 3e-1)),
        ("ddpnopt-ekfac", {}, (1e-2, 3e-1)),
        ("ddpnopt", {"curvature": "ekfac"}, (1e-2, 3e-1)),
        ("emsa", {}, WIDE),
        ("momentum", {}, WIDE),
        ("sgd", {"momentum": 0.9}, WIDE),
    ],
)
def test_ranges_are_those_of_table_5(
    optimizer: str, options: dict[str, object], expected: tuple[float, float]
) -> None:
    assert range_of(optimizer, options, None) == expected  # type: ignore[arg-type]


def test_ranges_by_hand() -> None:
    assert range_of("sgd", {}, "0.2,0.3") == (0.2, 0.3)
    for text in ("0.2", "0.3,0.2", "0,1", "a,b", "0.1,inf", "nan,1", "1,2,3"):
        with pytest.raises(ValueError, match="--lr-range"):
            range_of("sgd", {}, text)
    with pytest.raises(ValueError, match="unknown optimizer 'sgdd'"):
        default_range("sgdd")


def test_spaces() -> None:
    assert parse_space("momentum=0.0:0.99") == ("momentum", Space(low=0.0, high=0.99))
    damping = Space(low=1e-4, high=1.0, log=True)
    assert parse_space("curvature.damping=1e-4:1:log") == ("curvature.damping", damping)
    assert parse_space("rank=1:8") == ("rank", Space(low=1, high=8, whole=True))
    for text in ("momentum", "momentum=1", "momentum=0:1:lin", "=0:1", "m=a:b", "m=0:1:log:x"):
        with pytest.raises(ValueError, match="option=low:high"):
            parse_space(text)
    with pytest.raises(
        ValueError, match="--search momentum=1:0.5: range 1 to 0.5: the first must be"
    ):
        parse_space("momentum=1:0.5")
    with pytest.raises(ValueError, match="begin above 0"):
        parse_space("momentum=0.0:0.5:log")


def rows_of(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.tolist()}


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_test_part_takes_no_part(seed: int) -> None:
    whole = load("wine", seed=seed, scale="none")
    with holdout("wine", 0.25) as name:
        part = load(name, seed=seed, scale="none")
        scaled = load(name, seed=seed)
    assert name not in DATASETS
    train, held = rows_of(part.x_train), rows_of(part.x_test)
    assert train | held == rows_of(whole.x_train) and not train & held
    assert len(part.y_test) == math.ceil(0.25 * len(whole.y_train))
    counts, wanted = torch.bincount(part.y_test), 0.25 * torch.bincount(whole.y_train)
    assert (counts - wanted).abs().max() < 1.0
    # Scaled by what is trained on, so that what is held out stays unseen.
    assert torch.allclose(scaled.x_train.mean(0), torch.zeros(13), atol=1e-5)
    assert scaled.x_test.mean(0).abs().max() > 0.05


def test_a_trial_is_the_mean_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend(monkeypatch, lambda config, epoch: 0.5 + 0.1 * config.seed + 0.01 * epoch)
    search = {"lr": Space(low=0.1, high=0.2), "momentum": Space(low=0.0, high=0.9)}
    settings = settings_for(seeds=3, search=search)
    study = study_of(settings)
    trial = study.ask()
    assert evaluate(trial, settings) == pytest.approx(0.62)
    assert [c.seed for c in asked] == [0, 1, 2]
    assert all("held-out" in c.dataset for c in asked)
    assert {c.lr for c in asked} == {trial.params["lr"]}
    assert asked[0].options == {"momentum": trial.params["momentum"]}
    assert trial.user_attrs["values"] == pytest.approx([0.52, 0.62, 0.72])
    frozen = study.trials[0]
    assert frozen.intermediate_values[3] == pytest.approx((0.52 + 0.61) / 2)


def test_the_loss_is_minimised(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, lambda config, epoch: config.lr / 2)
    settings = settings_for(objective="train_loss")
    study = study_of(settings)
    work(study, settings, 6)
    best = best_trial(trials_frame(study, settings), settings)
    assert best is not None and study.best_params["lr"] == best["lr"]
    assert best["lr"] == max(t.params["lr"] for t in study.trials)


def outcome(study: optuna.Study) -> list[tuple[float, float | None, TrialState]]:
    return [(t.params["lr"], t.value, t.state) for t in study.trials if t.state in FINISHED]


def test_interrupted_and_resumed_is_uninterrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(config: RunConfig, epoch: int) -> float:
        return 1.0 - abs(math.log10(config.lr) + 1.0) / 3

    settings = settings_for(pruner="median")
    asked = pretend(monkeypatch, accuracy)
    whole = study_of(settings)
    work(whole, settings, 14)

    study, calls = study_of(settings), len(asked)
    stops = {calls + 3, calls + 12}

    def interrupting(config: RunConfig, epoch: int) -> float:
        if len(asked) in stops and epoch == 2:
            stops.discard(len(asked))
            raise KeyboardInterrupt
        return accuracy(config, epoch)

    pretended = pretend(monkeypatch, interrupting)
    asked = pretended
    stops = {3, 12}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work(study, settings, 14)
    work(study, settings, 14)
    assert outcome(study) == outcome(whole)
    assert sum(t.state == TrialState.FAIL for t in study.trials) == 2
    assert len({t.params["lr"] for t in whole.trials}) == 14
    work(study, settings, 14)
    assert len(outcome(study)) == 14


def test_a_worker_that_is_stopped_puts_its_trial_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for()
    study = study_of(settings)

    def stop(config: RunConfig, epoch: int) -> float:
        raise KeyboardInterrupt

    pretend(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        work(study, settings, 2, alone=False)
    pretend(monkeypatch, lambda config, epoch: 0.5)
    work(study, settings, 2, alone=False)
    stopped, again, other = study.trials
    assert stopped.state == TrialState.FAIL
    assert again.params == stopped.params != other.params


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("worker", "beat", "taken_over"),
    [
        ("dead here", 0.0, True),
        ("alive here", 9e9, False),
        ("elsewhere", 100.0, False),
        ("elsewhere", 5000.0, True),
    ],
)
def test_trials_of_dead_workers_are_queued_again(
    worker: str, beat: float, taken_over: bool
) -> None:
    settings = settings_for()
    study = study_of(settings)
    trial = study.ask()
    rate = trial.suggest_float("lr", 0.01, 1.0, log=True)
    place = tune_study._place() if worker.endswith(" here") else "another machine"
    pid = dead_process() if "dead" in worker else os.getpid()
    trial.set_user_attr("worker", {"place": place, "pid": pid})
    trial.set_user_attr("beat", time.time() - beat)
    assert requeue(study, grace=3600.0) == ([0] if taken_over else [])
    if taken_over:
        again = study.ask()
        assert again.suggest_float("lr", 0.01, 1.0, log=True) == rate
        assert study.trials[0].state == TrialState.FAIL
    else:
        assert study.trials[0].state == TrialState.RUNNING


def test_workers_reach_the_total_and_no_more() -> None:
    settings = settings_for()
    study = study_of(settings)
    first = claim(study, 2, 0, alone=False)
    second = claim(study, 2, 0, alone=False)
    assert first is not None and second is not None
    assert open_places(study, 2) == 0
    # Another worker looked before these two had begun.
    assert claim(study, 2, 0, alone=False) is None
    assert study.trials[2].state == TrialState.FAIL
    rates = {t.suggest_float("lr", 0.01, 1.0, log=True) for t in (first, second)}
    assert len(rates) == 2


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_are_pruned(monkeypatch: pytest.MonkeyPatch, pruner: str) -> None:
    run = settings_for().run.model_copy(update={"epochs": 8})
    settings = settings_for(run=run, pruner=pruner, seeds=2)
    epochs: dict[float, int] = {}

    def accuracy(config: RunConfig, epoch: int) -> float:
        epochs[config.lr] = epochs.get(config.lr, 0) + 1
        return config.lr * epoch / 8

    pretend(monkeypatch, accuracy)
    study = study_of(settings)
    work(study, settings, 16)
    pruned = [t for t in study.trials if t.state == TrialState.PRUNED]
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert pruned and len(pruned) + len(complete) == 16
    assert all(epochs[t.params["lr"]] < 16 for t in pruned)
    assert all(epochs[t.params["lr"]] == 16 for t in complete)
    assert min(t.params["lr"] for t in study.trials) not in {t.params["lr"] for t in complete[1:]}


def test_a_crash_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(config: RunConfig, epoch: int) -> float:
        if config.seed == 1:
            raise RuntimeError("singular")
        return 0.8

    pretend(monkeypatch, accuracy)
    settings = settings_for(seeds=3)
    study = study_of(settings)
    work(study, settings, 2)
    frame = trials_frame(study, settings)
    assert list(frame["state"]) == ["complete"] * 2
    assert frame["value"].tolist() == pytest.approx([100 * 1.6 / 3] * 2)
    assert frame["worst"].tolist() == [0.0, 0.0]
    assert frame["error"].tolist() == ["RuntimeError: singular"] * 2
    losses = settings_for(seeds=2, objective="train_loss")
    study = study_of(losses)
    work(study, losses, 1)
    assert study.trials[0].value == math.inf
    assert best_trial(trials_frame(study, losses), losses) is None


def test_other_settings_are_refused_by_name() -> None:
    storage = optuna.storages.InMemoryStorage()
    settings = settings_for()
    open_study(storage, "s", settings)
    assert read_settings(storage, "s") == settings
    open_study(storage, "s", settings)
    run = settings.run.model_copy(update={"batch": 8, "options": {"momentum": 0.5}})
    for other, named in (
        (settings_for(run=run), "batch is 64, asked 8; options.momentum is None, asked 0.5|other"),
        (settings_for(search={"lr": Space(low=0.02, high=1.0, log=True)}), "search.lr.low is 0.01"),
        (settings_for(seeds=2), "seeds is 1, asked 2"),
        (settings_for(validation=0.3), "validation is 0.2, asked 0.3"),
    ):
        with pytest.raises(ValueError, match=named.split("|")[0]) as caught:
            open_study(storage, "s", other)
        assert "--study" in str(caught.value)
    with pytest.raises(ValueError, match="no study 't' in this storage; there: s"):
        read_settings(storage, "t")
    optuna.create_study(storage=storage, study_name="foreign")
    with pytest.raises(ValueError, match="not made by ddpnopt tune"):
        read_settings(storage, "foreign")


def test_storages(tmp_path: Path) -> None:
    settings = settings_for()
    for file in ("a.journal", "sub/b.log", "sub/c.db"):
        open_study(open_storage(str(tmp_path / file)), "s", settings)
        assert (tmp_path / file).stat().st_size > 0
        assert read_settings(open_storage(str(tmp_path / file)), "s") == settings
    assert read_settings(open_storage(f"sqlite:///{tmp_path / 'sub/c.db'}"), "s") == settings
    with pytest.raises(StorageError, match="an SQLite file"):
        open_storage("somewhere")
    with pytest.raises(StorageError, match="can't be used") as caught:
        open_storage("nosuchdb://me:secret@host/x")
    assert "secret" not in str(caught.value)
    text = tmp_path / "text.db"
    text.write_text("no database " * 100)
    with pytest.raises(StorageError, match="can't be used"):
        open_storage(str(text))


app = typer.Typer()
app.command("tune")(tune_command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "TERM": "dumb"})


PROBLEM = ("-d", "wine", "-a", "linear", "-m", "sgd", "-e", "1", "-b", "64", "-s", "1")


def test_command_searches_resumes_and_takes_workers(tmp_path: Path) -> None:
    storage = str(tmp_path / "x.journal")
    place = ("--storage", storage, "--study", "s")
    result = run(*PROBLEM, *place, "-n", "2", "--search", "momentum=0.0:0.9", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "rates 0.07 to 0.5" in result.output and "2 of 2 trials finished" in result.output
    table = pd.read_csv(tmp_path / "trials.csv")
    assert len(table) == 2 and table["lr"].between(0.07, 0.5).all()
    best = table.loc[table["value"].idxmax()]
    page = (tmp_path / "tune.md").read_text()
    assert f"**Best: lr = {best['lr']:.6g}, momentum = {best['momentum']:.6g}**" in page
    assert "| architecture | linear |" in page
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")

    assert run(*place, "--worker", "-o", str(tmp_path)).output.count("\ntrial") == 0
    joined = run(*place, "--worker", "-n", "3", "-m", "sgd", "-o", str(tmp_path))
    assert joined.exit_code == 0, joined.output
    assert "trial 2" in joined.output and "trial 1" not in joined.output
    again = pd.read_csv(tmp_path / "trials.csv")
    assert again["lr"].tolist()[:2] == table["lr"].tolist() and len(again) == 3

    for arguments, message in (
        ((*place, "--worker", "-e", "2"), "study 's' has epochs 1, asked 2"),
        ((*place, "--worker", "-m", "adam"), "study 's' has optimizer 'sgd', asked 'adam'"),
        (("--worker",), "--worker needs --storage and --study"),
        (("--storage", storage, "--study", "t", "--worker"), "no study 't' in this storage"),
        ((*PROBLEM, *place), "has other settings: search.momentum.low is 0.0, asked None"),
    ):
        refused = run(*arguments, "-o", str(tmp_path))
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "sgdd"], "unknown optimizer 'sgdd'"),
        (["-d", "mnst"], "unknown data set 'mnst'"),
        (["-a", "vit"], "unknown architecture 'vit'"),
        (["--search", "momentun=0.0:0.9"], "SGD has no option momentun"),
        (["--search", "lr=0.0:0.9"], "lr is given twice"),
        (["--lr-range", "1"], "must be two numbers"),
        (["--objective", "speed"], "objective: Input should be 'accuracy' or 'train_loss'"),
        (["--validation", "1"], "validation: Input should be less than 1"),
        (["--trials", "0"], "--trials"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*PROBLEM, *arguments, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tune", "tune_study", "tune_ranges", "tune_results"):
        monkeypatch.delitem(sys.modules, f"ddpnopt.experiments.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = run(*PROBLEM)
    assert result.exit_code == 1 and "pip install 'ddpnopt[experiments]'" in result.output
