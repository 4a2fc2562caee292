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
from ddpnopt.experiments.models import INITIALISATIONS, build_model, initialise
from ddpnopt.experiments.optimizers import Built
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.summary import Target, by_optimizer, by_rate, judge, rate_range
from ddpnopt.experiments.sweep import Contender, frame, grid, sweep
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


def test_updates_and_running_loss_are_recorded_and_change_nothing() -> None:
    plain = train(SMALL)
    config = SMALL.model_copy(update={"record_updates": True, "batch": 1000, "epochs": 1})
    result = train(config)
    (epoch,) = result.epochs
    # One step: its loss is that of the initial weights, its update lr times the gradient.
    still = train(config.model_copy(update={"lr": 0.0})).epochs[0]
    assert epoch.running_loss == pytest.approx(still.train_loss, rel=1e-6)
    assert still.update_norm == 0.0 < epoch.update_norm
    double = train(config.model_copy(update={"lr": 0.2})).epochs[0]
    assert double.update_norm == pytest.approx(2 * epoch.update_norm, rel=1e-4)
    assert outcome(train(SMALL.model_copy(update={"record_updates": True}))) == outcome(plain)
    assert all(math.isnan(e.update_norm) for e in plain.epochs)


@pytest.mark.parametrize("optimizer", ["sgd", "ddpnopt", "vanilla-ddp"])
def test_mmc_loss_is_trained_and_answered_by_the_nearest_centre(optimizer: str) -> None:
    config = SMALL.model_copy(
        update={"optimizer": optimizer, "loss": "mmc", "lr": 0.02, "epochs": 6}
    )
    result = train(config)
    # At the start |z| is small beside the centres' norm 10.
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss < 50
    assert result.test_accuracy > 0.8


@pytest.mark.parametrize("name", sorted(INITIALISATIONS))
def test_initialisation_draws_the_weights_anew(name: str) -> None:
    def weights(rule: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build_model("cnn-8", (1, 8, 8), 10)
        initialise(model, rule)
        return [p.detach() for p in model.parameters()]

    default, own, zero = weights("torch"), weights(name), weights(f"{name}-zero-bias")
    for before, after, without in zip(default, own, zero, strict=True):
        assert torch.equal(before, after) == (name == "torch" or before.dim() == 1)
        assert torch.equal(without, after if after.dim() > 1 else torch.zeros_like(after))
    gains = {"he": 2.0, "lecun": 1.0, "he-uniform": 2.0, "lecun-uniform": 1.0}
    if name in gains:
        # The dense layer from 128 features to 32.
        assert float(own[8].var()) == pytest.approx(gains[name] / 128, rel=0.1)


def test_share_held_out_is_the_configured_one() -> None:
    result = train(SMALL.model_copy(update={"epochs": 1, "test_share": 0.5}))
    # 89 of 178 samples, 35 of the largest class.
    assert result.chance == pytest.approx(35 / 89)


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
        ({"initialisation": "zavier"}, "unknown initialisation 'zavier'.*xavier"),
        ({"loss": "hinge"}, "unknown loss 'hinge'; known: cross_entropy, elbo, mmc"),
    ],
)
def test_check_raises_what_training_would(update: dict[str, object], message: str) -> None:
    config = SMALL.model_copy(update=update)
    for call in (check, train):
        with pytest.raises(ValueError, match=message):
            call(config)


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"epochs": 0}, {"batch": 0}, {"colour": "red"}, {"test_share": 1.0}]
)
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
        {"train_samples": 50},
        {"initialisation": "xavier"},
        {"loss": "mmc"},
        {"test_share": 0.3},
        {"record_updates": True},
    ]
    keys = {SMALL.key, *(SMALL.model_copy(update=c).key for c in changed)}
    assert len(keys) == 12
    assert RunConfig(**SMALL.model_dump()).key == SMALL.key


def test_sweep_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path / "deep" / "store.sqlite")
    contenders = [Contender("sgd", (0.01, 0.1)), Contender("adam", (0.01,))]
    configs = grid(SMALL, contenders, [0, 1])
    assert [c.seed for c in configs] == [0, 0, 0, 1, 1, 1]
    sweep(configs[:4], store, jobs=1, console=quiet())
    made: list[str] = []
    original = sweep_module.train
    monkeypatch.setattr(sweep_module, "train", lambda c: made.append(c.key) or original(c))
    runs = sweep([*configs, configs[0]], store, jobs=1, console=quiet())
    assert made == [c.key for c in configs[4:]]
    assert len(runs) == 6 and set(runs["label"]) == {"SGD", "Adam"}
    # Only what was asked for comes back, though the store holds more.
    assert len(sweep(configs[:2], store, jobs=1, console=quiet())) == 2


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
