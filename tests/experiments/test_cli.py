# SPDX-License-Identifier: MIT
"""The command line, figures, the demo and the study's pages."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from ddpnopt.experiments import cli, defaults_study, demo
from ddpnopt.experiments.commands import app
from ddpnopt.experiments.markdown import BEGIN, END, update_page
from ddpnopt.experiments.plots import plot_curves, plot_rates
from ddpnopt.experiments.specs import parse_optimizer, parse_option, parse_rates
from ddpnopt.experiments.sweep import Contender, frame
from ddpnopt.experiments.training import RunConfig, train

PNG = b"\x89PNG"
HERE = Path(__file__).parent


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def test_train_writes_record_curve_and_plot(tmp_path: Path) -> None:
    result = run(
        *("train", "-d", "wine", "-a", "mlp-8x1-tanh", "-m", "sgd", "-l", "0.2", "-e", "2"),
        *("-O", "momentum=0.5", "-o", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output
    assert "epoch 2/2: training loss" in result.output
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["config"]["options"] == {"momentum": 0.5} and len(record["epochs"]) == 2
    assert len(pd.read_csv(tmp_path / "curve.csv")) == 2
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_train_ddpnopt_with_dotted_options(tmp_path: Path) -> None:
    result = run(
        *("train", "-d", "wine", "-a", "mlp-8x1-tanh", "-e", "1", "-b", "32"),
        *("-O", "value=gauss_newton", "-O", "value.backup=riccati", "-o", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output


def test_train_reports_divergence(tmp_path: Path) -> None:
    result = run(
        *("train", "-d", "wine", "-a", "linear", "-m", "sgd", "-l", "1e38"),
        *("--scale", "none", "-o", str(tmp_path)),
    )
    assert result.exit_code == 0 and "diverged: non-finite" in result.output


def test_compare_writes_tables_and_plots_and_resumes(tmp_path: Path) -> None:
    arguments = [
        *("compare", "-d", "wine", "-a", "mlp-8x1-tanh", "-e", "1", "-s", "2"),
        *("-m", "sgd", "-m", "sgd-clip:grad_clip=0.5", "-m", "adam@0.01"),
        *("-l", "0.1,0.3", "-j", "1", "-o", str(tmp_path)),
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "worst seed" in result.output and "grad_clip=0.5" in result.output
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 10
    assert len(pd.read_csv(tmp_path / "rates.csv")) == 5
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 3
    for name in ("rates.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    before = (tmp_path / "runs.csv").read_bytes()
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "runs.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-m", "sgdd"], "unknown optimizer 'sgdd'"),
        (["train", "-m", "sgd", "-d", "mnst"], "unknown data set 'mnst'"),
        (["train", "-m", "sgd", "-d", "mnist", "--data", "nowhere"], "nowhere is no folder"),
        (["train", "-m", "sgd", "-d", "mnist", "--data", str(HERE)], "train-images-idx3-ubyte"),
        (["train", "-m", "sgd", "--train-samples", "9999"], "9999 asked for"),
        (["train", "-m", "sgd", "-a", "vit"], "unknown architecture 'vit'"),
        (["train", "-m", "sgd", "-O", "x=1"], "SGD has no option x"),
        (["train", "-m", "sgd", "-O", "momentum"], "must be written key=value"),
        (["train", "-m", "sgd", "-l", "-1"], "greater than or equal to 0"),
        (["train", "-m", "sgd", "--device", "abc"], "unknown device 'abc'"),
        (["train", "-m", "sgd", "-e", "0"], "--epochs"),
        (["compare", "-m", "sgd", "-l", "a"], "learning rate 'a' is not a number"),
        (["compare", "-m", "sgd", "-l", "nan"], "finite and not negative"),
        (["compare", "-m", "sgd", "-j", "0"], "jobs=0: give a positive number of processes"),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "compare", "demo"])
def test_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0 and f"Example: ddpnopt {command}" in result.output


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "ddpnopt.experiments.commands":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit, match=r"pip install 'ddpnopt\[experiments\]' \(missing: typer"):
        cli.main()


def test_missing_other_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "ddpnopt.experiments.commands":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        cli.main()


def test_entry_point_runs_the_app(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpnopt", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and "compare" in capsys.readouterr().out


def test_specs() -> None:
    assert parse_option("feedback=open_loop") == ("feedback", "open_loop")
    assert parse_option("value.own_layer=False") == ("value.own_layer", False)
    assert parse_option("rank=None") == ("rank", None)
    assert parse_option("rank=3") == ("rank", 3) and parse_option("c=1e-2") == ("c", 0.01)
    assert parse_optimizer("sgd:momentum=0.9,nesterov=true") == (
        "sgd",
        {"momentum": 0.9, "nesterov": True},
    )
    assert parse_rates(["0.1,0.2", "0.1"]) == (0.1, 0.2)


def test_plots_of_many_problems(tmp_path: Path) -> None:
    base = RunConfig(architecture="mlp-4x1-tanh", optimizer="sgd", epochs=1, batch=128)
    results = [
        train(base.model_copy(update={"dataset": data, "lr": lr}))
        for data in ("wine", "digits")
        for lr in (0.01, 0.1)
    ]
    # A run that diverged in its first epoch has a shorter curve.
    results.append(train(base.model_copy(update={"dataset": "wine", "lr": 0.1, "epochs": 3})))
    runs = frame(results)
    for draw in (plot_rates, plot_curves):
        path = draw(runs, tmp_path / "sub" / f"{draw.__name__}.png")
        assert path.read_bytes().startswith(PNG)


def test_demo_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = RunConfig(dataset="wine", architecture="mlp-4x1-tanh", epochs=1, batch=64)
    monkeypatch.setattr(demo, "PROBLEMS", (small,))
    monkeypatch.setattr(demo, "CONTENDERS", (Contender("sgd", (0.1,)), Contender("adam", (0.01,))))
    result = run("demo", "-o", str(tmp_path), "-j", "1", "-s", "2")
    assert result.exit_code == 0, result.output
    assert "worst seed" in result.output and "4 runs in" in result.output
    assert (tmp_path / "rates.png").exists() and (tmp_path / "curves.png").exists()
    late = run("demo", "-o", str(tmp_path / "late"), "-j", "1", "-s", "3", "--budget", "0")
    assert late.exit_code == 0 and "stopped after 1 of 3 seeds" in late.output


def test_demo_shows_the_rivals_and_the_twins() -> None:
    names = {c.optimizer for c in demo.CONTENDERS}
    rivals = {"sgd", "sgd-clip", "rmsprop", "adam"}
    twins = {"ddpnopt", "ddpnopt-open-loop", "ddpnopt-rmsprop"}
    assert rivals | twins <= names
    assert {p.dataset for p in demo.PROBLEMS} == {"wine", "digits"}


def test_study_publishes_tables_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = defaults_study.Problem(
        RunConfig(architecture="mlp-4x1-tanh", batch=256, epochs=1), (0.1, 0.2), "Tiny"
    )
    monkeypatch.setattr(defaults_study, "PROBLEMS", {"tiny": problem})
    page = tmp_path / "docs" / "defaults.md"
    page.parent.mkdir()
    page.write_text(f"# Defaults\n{BEGIN}\nold\n{END}\nrest\n")
    for _ in range(2):
        defaults_study.main(
            out=tmp_path / "runs",
            docs=page.parent,
            jobs=1,
            seeds=2,
            problem=None,
            optimizer=["sgd", "sgd-clip", "adam"],
        )
    text = page.read_text()
    assert text.startswith("# Defaults\n") and text.endswith(f"{END}\nrest\n")
    assert "old" not in text and text.count("### Tiny") == 1
    assert "| SGD + clip (grad_clip=0.25) |" in text and "| Adam |" in text
    assert len(pd.read_csv(page.parent / "assets" / "defaults_runs.csv")) == 2 * (2 + 8 + 4)
    assert (page.parent / "assets" / "defaults.png").read_bytes().startswith(PNG)


def test_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        update_page("nothing here", "table")
