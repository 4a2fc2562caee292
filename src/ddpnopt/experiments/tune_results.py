# SPDX-License-Identifier: MIT
"""What a study found: its table, its files and its picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.plots import COLOURS
from ddpnopt.experiments.stored_plots import rate_axis
from ddpnopt.experiments.tune import Settings, flat

_WORDS = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "interrupted",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def trials_frame(study: optuna.Study, settings: Settings) -> pd.DataFrame:
    """List the trials.

    Args:
        study: The study.
        settings: Its settings.

    Returns:
        One row per trial in the order of their numbers: trial, state, one column per searched
        name, value (the mean over seeds: accuracy in %, or loss; a pruned trial's last one),
        worst (of the seeds; NaN where pruned), diverged (trainings), seconds, error.
    """
    factor = 100.0 if settings.objective == "accuracy" else 1.0
    rows = [_row(trial, settings, factor) for trial in study.get_trials(deepcopy=False)]
    columns = ["trial", "state", *settings.search, "value", "worst", "diverged", "seconds", "error"]
    return pd.DataFrame(rows, columns=columns)


def _row(trial: FrozenTrial, settings: Settings, factor: float) -> dict[str, object]:
    values = trial.user_attrs.get("values", [])
    worst = min if settings.objective == "accuracy" else max
    return {
        "trial": trial.number,
        "state": _WORDS[trial.state],
        **{name: trial.params.get(name, math.nan) for name in settings.search},
        "value": math.nan if trial.value is None else factor * trial.value,
        "worst": factor * worst(values) if values else math.nan,
        "diverged": trial.user_attrs.get("diverged", 0),
        "seconds": trial.duration.total_seconds() if trial.duration else math.nan,
        "error": trial.user_attrs.get("error", ""),
    }


def best_trial(frame: pd.DataFrame, settings: Settings) -> pd.Series | None:
    """The best complete trial; None: there is none with a finite value.

    Args:
        frame: From `trials_frame`.
        settings: The study's.
    """
    complete = frame[(frame["state"] == "complete") & frame["value"].map(math.isfinite)]
    if complete.empty:
        return None
    # Of equals the first, whatever the storage.
    at = complete["value"].idxmax if settings.objective == "accuracy" else complete["value"].idxmin
    return complete.loc[at()]


def objective_label(settings: Settings) -> str:
    """The objective in words."""
    if settings.objective == "accuracy":
        return "validation accuracy (%)"
    return "training loss (nats)"


def train_command(settings: Settings, values: dict[str, float | int]) -> str:
    """The command that trains with values that were found.

    Args:
        settings: The study's.
        values: A value for every searched name.
    """
    config = settings.with_values(values)
    parts = [
        f"ddpnopt train --dataset {config.dataset} --arch {config.architecture}",
        f"--optimizer {config.optimizer} --lr {config.lr:.6g} --batch {config.batch}",
        f"--epochs {config.epochs} --scale {config.scale}",
        *(f"--option {key}={value}" for key, value in config.options.items()),
    ]
    if config.train_samples is not None:
        parts.append(f"--train-samples {config.train_samples}")
    return " ".join(parts)


def draw(frame: pd.DataFrame, settings: Settings, title: str = "") -> Figure:
    """Draw the objective over every searched number: a point a trial, pruned ones hollow.

    Args:
        frame: From `trials_frame`.
        settings: The study's.
        title: Heading.
    """
    names = list(settings.search)
    figure = Figure(figsize=(6.2 * len(names), 4.4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    best = best_trial(frame, settings)
    for axis, name in zip(axes, names, strict=True):
        for state, marker in (("complete", "o"), ("pruned", "x")):
            own = frame[(frame["state"] == state) & frame["value"].map(math.isfinite)]
            if own.empty:
                continue
            colour = COLOURS[0] if state == "complete" else COLOURS[1]
            label = "complete (mean over seeds)" if state == "complete" else "pruned (last value)"
            axis.scatter(own[name], own["value"], marker=marker, color=colour, label=label)
        if best is not None:
            axis.axvline(best[name], color="#444444", linestyle=":", linewidth=1.2)
        space = settings.search[name]
        if space.log:
            # Many rates: round numbers, not the rates themselves.
            rate_axis(axis, np.geomspace(space.low, space.high, 9).tolist())
        axis.set(xlabel="learning rate" if name == "lr" else name)
        axis.set_title("" if best is None else f"best: {best[name]:.4g} (dotted)", fontsize=10)
        axis.set_ylabel(objective_label(settings))
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title or f"{settings.run.label} on {settings.run.dataset.upper()}")
    return figure


def markdown(frame: pd.DataFrame, settings: Settings, name: str) -> str:
    """Render a study as a Markdown page.

    Args:
        frame: From `trials_frame`.
        settings: The study's.
        name: The study's.
    """
    best = best_trial(frame, settings)
    parts = [f"# Study {name}: {settings.run.label} on {settings.run.dataset.upper()}"]
    if best is None:
        parts.append("No trial is complete.")
    else:
        values = {key: best[key] for key in settings.search}
        chosen = ", ".join(f"{key} = {value:.6g}" for key, value in values.items())
        parts.append(
            f"**Best: {chosen}**, {objective_label(settings)} {best['value']:.4g} (mean over "
            f"{settings.seeds} seeds; worst seed {best['worst']:.4g})."
        )
        parts.append(f"```console\n{train_command(settings, values)}\n```")
    if settings.objective == "accuracy":
        parts.append(
            f"Measured on {settings.validation:g} of the training part, held out by class; the "
            "test part takes no part in the search."
        )
    rows = [[_text(cell) for cell in row] for row in frame.itertuples(index=False)]
    parts += ["## Trials", table([str(c) for c in frame.columns], rows)]
    listed = [[key, _text(value)] for key, value in flat(settings).items()]
    parts += ["## Settings", table(["setting", "value"], listed)]
    return "\n\n".join(parts) + "\n"


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def write_study(frame: pd.DataFrame, settings: Settings, name: str, out: Path) -> list[Path]:
    """Write trials.csv, tune.md and tune.png.

    Args:
        frame: From `trials_frame`.
        settings: The study's.
        name: The study's.
        out: Folder; made where it does not exist.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    csv, page, png = out / "trials.csv", out / "tune.md", out / "tune.png"
    frame.to_csv(csv, index=False, float_format="%.6g")
    page.write_text(markdown(frame, settings, name))
    # No date or version in the file: the same figure gives the same bytes.
    draw(frame, settings).savefig(png, dpi=130, metadata={"Software": None})
    return [csv, page, png]
