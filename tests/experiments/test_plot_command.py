# SPDX-License-Identifier: MIT
"""Figures of stored runs: what is selected, what is averaged, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib.colors import to_hex
from typer.testing import CliRunner, Result

from ddpnopt.experiments import plot_command as command
from ddpnopt.experiments.heat_maps import draw_heat_map, heat_map
from ddpnopt.experiments.optimizers import OptionValue
from ddpnopt.experiments.plots import COLOURS
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.selection import read_runs, refuse_mixtures, select, store_file
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.stored_plots import (
    draw_curves,
    draw_rates,
)

EPS = "value.regularization"


def run_of(
    optimizer: str = "sgd",
    lr: float = 0.1,
    seed: int = 0,
    losses: tuple[float, ...] = (0.5, 0.25),
    options: dict[str, OptionValue] | None = None,
    **changes: object,
) -> RunResult:
    """A made-up run; its accuracy after an epoch is 1 - loss."""
    config = RunConfig.model_validate(
        {
            "dataset": "digits",
            "architecture": "mlp-4x1-tanh",
            "optimizer": optimizer,
            "lr": lr,
            "seed": seed,
            "epochs": len(losses),
            "options": options or {},
            **changes,
        }
    )
    epochs = tuple(
        Epoch(epoch=n, train_loss=loss, test_accuracy=max(0.0, 1 - loss), seconds=0.1)
        for n, loss in enumerate(losses, 1)
    )
    return RunResult(
        config=config,
        epochs=epochs,
        train_loss=losses[-1],
        test_accuracy=epochs[-1].test_accuracy,
        chance=0.1,
        seconds=0.2,
        diverged=not math.isfinite(losses[-1]),
    )


GRID = [
    run_of("ddpnopt-paper", lr, seed, (1.0, lr + eps + 0.1 * seed), {EPS: eps})
    for lr in (0.1, 0.2)
    for eps in (0.01, 0.05)
    for seed in (0, 1)
]
BASELINE = [
    run_of("sgd", lr, seed, (1.0, 2 * lr + 0.1 * seed)) for lr in (0.1, 0.2) for seed in (0, 1)
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    kept = SqliteStore(tmp_path / "store.sqlite")
    for result in [*GRID, *BASELINE, run_of("adam", 0.01, dataset="wine")]:
        kept.append(result)
    kept.append(RunResult.crash(RunConfig(optimizer="ekfac"), "RuntimeError: singular"))
    return tmp_path


app = typer.Typer()
app.command("plot")(command.plot_command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300", "TERM": "dumb"})


def said(result: Result) -> str:
    return " ".join(result.output.replace("│", " ").split())


def test_curves_show_mean_and_range() -> None:
    runs = [run_of(seed=0, losses=(0.8, 0.2)), run_of(seed=1, losses=(0.6,))]
    figure = draw_curves(runs)
    loss, accuracy = figure.axes
    (line,) = loss.lines
    # The run that ended early keeps its last value.
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([0.7, 0.4])
    assert np.asarray(accuracy.lines[0].get_ydata()).tolist() == pytest.approx([30.0, 60.0])
    band = loss.collections[0].get_paths()[0].vertices
    assert np.asarray(band)[:, 1].min() == pytest.approx(0.2)
    assert np.asarray(band)[:, 1].max() == pytest.approx(0.8)
    assert "2 seeds" in figure.get_suptitle()
    assert len(draw_curves(runs, ["loss"]).axes) == 1


def test_curves_are_at_the_best_rate_which_is_named() -> None:
    runs = [run_of(lr=0.1, losses=(0.3,)), run_of(lr=0.2, losses=(0.1,)), run_of("adam", 0.01)]
    figure = draw_curves(runs)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["SGD, lr 0.2", "Adam, lr 0.01"]
    assert to_hex(figure.axes[0].lines[0].get_color()) == COLOURS[0].lower()


def test_rates_show_mean_spread_and_worst_seed() -> None:
    runs = [
        run_of(lr=lr, seed=seed, losses=(loss,))
        for lr, losses in ((0.1, (0.2, 0.4)), (0.3, (0.1, 0.5)))
        for seed, loss in enumerate(losses)
    ]
    axis = draw_rates(runs).axes[0]
    mean, worst = (np.asarray(line.get_ydata()).tolist() for line in axis.lines)
    assert mean == pytest.approx([70.0, 70.0]) and worst == pytest.approx([60.0, 50.0])
    spread = np.asarray(axis.collections[0].get_paths()[0].vertices)[:, 1]
    assert spread.max() == pytest.approx(70 + math.sqrt(2) * 20)
    losses = draw_rates(runs, "loss").axes[0]
    assert np.asarray(losses.lines[1].get_ydata()).tolist() == pytest.approx([0.4, 0.5])


def test_heat_map_is_a_mean_over_seeds() -> None:
    grid = heat_map(GRID, EPS)
    assert grid.values.index.tolist() == [0.1, 0.2]
    assert grid.values.columns.tolist() == [0.01, 0.05]
    assert grid.values.to_numpy() == pytest.approx(np.array([[0.16, 0.20], [0.26, 0.30]]))
    accuracy = heat_map(GRID, EPS, "accuracy")
    assert accuracy.values.loc[0.1, 0.01] == pytest.approx(84.0)


def test_heat_map_of_a_difference_is_baseline_minus_optimizer() -> None:
    grid = heat_map(GRID, EPS, "loss", BASELINE)
    assert grid.values.to_numpy() == pytest.approx(np.array([[0.09, 0.05], [0.19, 0.15]]))
    assert "SGD minus DDPNOpt paper" in grid.label and "positive" in grid.label
    assert "negative" in heat_map(GRID, EPS, "accuracy", BASELINE).label
    # Only seeds that both have are compared.
    fewer = heat_map(GRID, EPS, "loss", [r for r in BASELINE if r.config.seed == 1])
    assert fewer.values.to_numpy() == pytest.approx(grid.values.to_numpy())
    with pytest.raises(ValueError, match="no learning rate and seed in common"):
        heat_map(GRID, EPS, "loss", [run_of("sgd", 7.0)])


def test_missing_and_infinite_cells_are_visible() -> None:
    runs = [r for r in GRID if (r.config.lr, r.config.options[EPS]) != (0.1, 0.05)]
    runs.append(run_of("ddpnopt-paper", 0.2, 2, (1.0, math.nan), {EPS: 0.01}))
    figure = draw_heat_map(heat_map(runs, EPS))
    assert {text.get_text() for text in figure.axes[0].texts} == {"0.16", "–", "inf", "0.3"}


def test_a_difference_of_two_diverged_runs_is_no_number() -> None:
    own = [run_of("ddpnopt-paper", 0.1, n, (x,), {EPS: 0.01}) for n, x in ((0, 0.1), (1, math.nan))]
    rivals = [run_of("sgd", 0.1, n, (x,)) for n, x in ((0, 0.3), (1, math.nan))]
    # The other seed's difference alone would pass for the mean.
    assert math.isnan(heat_map(own, EPS, "loss", rivals).values.loc[0.1, 0.01])


def test_heat_map_refuses_more_than_one_group() -> None:
    with pytest.raises(ValueError, match="needs one optimizer on one problem"):
        heat_map([*GRID, run_of("ddpnopt", options={EPS: 0.1})], EPS)
    with pytest.raises(ValueError, match=f"options that are set: {EPS}"):
        heat_map(GRID, "value.strength")


def test_selection() -> None:
    everything = [*GRID, *BASELINE]
    assert select(everything, {}) == everything
    assert select(everything, {"optimizer": ["sgd"]}) == BASELINE
    chosen = select(everything, {EPS: [0.01], "lr": [0.1], "seed": [0, 1]})
    assert [r.config.seed for r in chosen] == [0, 1]
    with pytest.raises(ValueError, match="no stored run has optimizer=adam") as caught:
        select(everything, {"optimizer": ["adam"]})
    assert "digits, mlp-4x1-tanh, ddpnopt-paper: 8 runs" in str(caught.value)
    with pytest.raises(ValueError, match="there are no runs; the store holds no runs"):
        select([], {})


def test_mixtures_are_refused() -> None:
    refuse_mixtures([*GRID, *BASELINE, run_of(dataset="wine", batch=64)])
    with pytest.raises(ValueError, match="batch: 8, 64") as caught:
        refuse_mixtures([*BASELINE, run_of(batch=64)])
    assert "--where batch=8" in str(caught.value)


def test_where_runs_are_read_from(tmp_path: Path, store: Path) -> None:
    assert len(read_runs(store)) == len(read_runs(store / "store.sqlite")) == 13
    record = tmp_path / "train" / "result.json"
    record.parent.mkdir()
    record.write_text(run_of().model_dump_json())
    for place in (record, record.parent):
        assert [r.model_dump_json() for r in read_runs(place)] == [run_of().model_dump_json()]
    with pytest.raises(ValueError, match="no such file or folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no store.sqlite in this folder \(databases there: none"):
        store_file(record.parent)


@pytest.mark.parametrize(
    ("arguments", "suffix", "start"),
    [
        (["curves", "-d", "digits"], "png", b"\x89PNG"),
        (["rates", "-a", "mlp-4x1-tanh", "-m", "sgd", "-m", "adam"], "svg", b"<?xml"),
        (["rates", "--metric", "loss", "-d", "wine"], "png", b"\x89PNG"),
        (["heatmap", "-m", "ddpnopt-paper", "--baseline", "sgd"], "pdf", b"%PDF"),
        (["heatmap"], "png", b"\x89PNG"),
        (["heatmap", "-m", "ddpnopt-paper", "--where", "lr=0.1"], "png", b"\x89PNG"),
    ],
)
def test_command_writes_a_figure(
    arguments: list[str], suffix: str, start: bytes, store: Path
) -> None:
    for name in ("one", "two"):
        out = store / "sub" / f"{name}.{suffix}"
        result = run(*arguments, "--store", str(store), "-o", str(out))
        assert result.exit_code == 0, result.output
        assert f"written: {out}" in result.output and out.read_bytes().startswith(start)
    if suffix == "png":
        assert out.read_bytes() == out.with_stem("one").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curves", "-d", "mnist"], "no stored run has dataset=mnist; the store holds:"),
        (["curves", "-d", "mnist"], "wine, mlp-4x1-tanh, adam: 1 runs"),
        (["curves", "-m", "sgdd"], "unknown optimizer 'sgdd'"),
        (["curves", "--where", "lr"], "must be written key=value"),
        (["curves", "--out", "x.jpg"], "write a .png, .svg, .pdf file"),
        (["heatmap", "--by", "lr"], "needs one optimizer on one problem"),
        (["heatmap", "-m", "sgd"], "none of these runs sets 'value.regularization'"),
        (["feedback"], "`ddpnopt reproduce fig5` makes them"),
        (["feedback", "--where", "lr=1"], "not told apart by lr"),
        (["spectrum"], "'spectrum' is not one of"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], message: str, store: Path) -> None:
    result = run(*arguments, "--store", str(store))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in said(result)


def test_feedback_images_come_from_the_store(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    image = np.eye(8).tolist()
    layer = {"layer": "0", "shape": [9, 64], "values": [2.0, 1.0], "images": [image]}
    sample = {
        "label": 3,
        "predicted": 3,
        "probability": 0.9,
        "image": image,
        "input": image,
        "layers": [layer],
    }
    drawn: list[object] = []
    asked: list[int | None] = []
    original = command.look_at

    def look_at(request: Any, settings: object, problem: object) -> object:
        from dataclasses import replace

        asked.append(request.epochs)
        look = original(request, settings, problem)  # type: ignore[arg-type]
        if look.problem.dataset == "digits":
            return replace(look, payload={"data": "DIGITS", "samples": [sample]})
        return look

    def draw(problems: object) -> object:
        from matplotlib.figure import Figure

        drawn.append(problems)
        return Figure()

    monkeypatch.setattr(command, "look_at", look_at)
    monkeypatch.setattr(command, "draw", draw)
    out = store / "fb.png"
    result = run("feedback", "--store", str(store), "-d", "digits", "-o", str(out))
    assert result.exit_code == 0 and out.exists(), result.output
    assert drawn == [[("DIGITS", [sample])]]
    assert set(asked) == {None}
    asked.clear()
    options = ["--where", "epochs=3", "-o", str(out)]
    result = run("feedback", "--store", str(store), "-d", "digits", *options)
    assert result.exit_code == 0 and set(asked) == {3}, result.output
    refused = run("feedback", "--store", str(store), "--where", "epochs=few")
    assert refused.exit_code == 2 and "give a whole number" in said(refused)
    refused = run("feedback", "--store", str(store), "-d", "mnist", "-o", str(out))
    assert refused.exit_code == 2 and "there: digits, cnn-16, ddpnopt (fig5)" in said(refused)


def test_a_baseline_in_a_heat_map_is_the_plain_one_of_its_runs() -> None:
    from ddpnopt.experiments.records import RunConfig, RunResult

    def run(**options: float) -> RunResult:
        return RunResult.crash(RunConfig(optimizer="sgd", options=options), "")

    plain, clipped, other = run(momentum=0.5), run(momentum=0.5, grad_clip=1.0), run(nesterov=1.0)
    assert command._plain([clipped, plain, clipped]) == [plain]
    assert command._plain([plain, other]) == [plain, other]
    assert command._plain([]) == []
