# SPDX-License-Identifier: MIT
"""Writing results to files and showing them as tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from ddpnopt.experiments.atomic import replacing
from ddpnopt.experiments.plots import best_rates, plot_curves, plot_rates
from ddpnopt.experiments.summary import by_optimizer, by_rate
from ddpnopt.experiments.sweep import frame
from ddpnopt.experiments.training import RunResult


def write_run(result: RunResult, folder: Path) -> list[Path]:
    """Write one run: result.json, curve.csv and curve.png.

    Args:
        result: The run.
        folder: Made where it does not exist.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, curve = folder / "result.json", folder / "curve.csv"
    with replacing(record) as file:
        file.write(f"{result.model_dump_json(indent=2)}\n".encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", "train_loss", "test_accuracy", "seconds"])
    writer.writerows([e.epoch, e.train_loss, e.test_accuracy, e.seconds] for e in result.epochs)
    with replacing(curve) as file:
        file.write(text.getvalue().encode())
    title = f"{result.config.label}, learning rate {result.config.lr:g}"
    return [record, curve, plot_curves(frame([result]), folder / "curve.png", title)]


def write_comparison(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a comparison: runs, rates and summary as tables, rates and curves as figures.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.
        folder: Made where it does not exist.

    Returns:
        The files: runs.csv, rates.csv, summary.csv, summary.json, rates.png and curves.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every, rates, summary, record = (
        folder / name for name in ("runs.csv", "rates.csv", "summary.csv", "summary.json")
    )
    runs.drop(columns="curve").to_csv(every, index=False, float_format="%.6g")
    by_rate(runs).to_csv(rates, index=False, float_format="%.6g")
    totals = by_optimizer(runs)
    totals.to_csv(summary, index=False, float_format="%.6g")
    totals.to_json(record, orient="records", indent=2)
    return [
        every,
        rates,
        summary,
        record,
        plot_rates(runs, folder / "rates.png"),
        plot_curves(
            best_rates(runs),
            folder / "curves.png",
            "Training curves at each optimizer's best rate (mean and range over seeds)",
        ),
    ]


def print_optimizers(runs: pd.DataFrame, console: Console) -> None:
    """Show every optimizer at its best rate, and the range of its good rates.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.
        console: Where to show it.
    """
    totals = by_optimizer(runs)
    for (dataset, architecture), own in totals.groupby(["dataset", "architecture"], sort=False):
        seeds = runs[runs["dataset"] == dataset]["seed"].nunique()
        table = Table(
            title=f"{dataset.upper()}, {architecture}: test accuracy (%), {seeds} seeds",
            caption="good rates: within 2 points of the best mean of all optimizers; "
            "failed: diverged or near chance, share over all rates",
        )
        table.add_column("optimizer")
        for column in ("best lr", "mean", "sd", "worst seed", "good rates", "failed"):
            table.add_column(column, justify="right")
        for _, row in own.iterrows():
            span = f"{row['low']:g} - {row['high']:g}" if row["low"] == row["low"] else "-"
            table.add_row(
                str(row["label"]),
                f"{row['lr']:g}",
                f"{row['mean']:.1f}",
                f"{row['sd']:.1f}",
                f"{row['worst']:.1f}",
                span,
                f"{100 * row['failed']:.0f} %",
            )
        console.print(table)
