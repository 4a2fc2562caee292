# SPDX-License-Identifier: MIT
"""Figures of stored runs: curves, accuracy over the learning rate, heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ddpnopt.experiments.plots import COLOURS, MARKERS, best_rates
from ddpnopt.experiments.records import RunResult
from ddpnopt.experiments.sweep import frame

Metric = Literal["loss", "accuracy"]
COLUMN: dict[Metric, str] = {"loss": "train_loss", "accuracy": "test_accuracy"}
AXIS: dict[Metric, str] = {"loss": "training loss (nats)", "accuracy": "test accuracy (%)"}
Array = np.ndarray[Any, np.dtype[np.float64]]
#: Formats of figures, and metadata that keep dates and versions out of them.
FORMATS: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure; the suffix decides the format.

    Args:
        figure: The figure.
        path: A .png, .svg or .pdf file; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: Another suffix.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"--out {path}: write a {', '.join(FORMATS)} file")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata=FORMATS[path.suffix])
    return path


def _panels(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    index = list(labels).index(label)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        # Rivals dashed, DDPNOpt solid.
        "linestyle": "-" if label.startswith("DDPNOpt") else "--",
        "label": label,
    }


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    # About 0.085 inches a letter, and the line in front.
    width = 0.8 + 0.085 * max(map(len, entries))
    columns = min(4, len(entries), int(figure.get_figwidth() / width))
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=max(1, columns),
        frameon=False,
    )


def rate_axis(axis: Axes, rates: Sequence[float]) -> None:
    """Make an axis of learning rates logarithmic, with plain numbers: the rates, if they are few.

    Args:
        axis: Where the rates lie along the horizontal axis.
        rates: The rates drawn.
    """
    axis.set_xscale("log")
    distinct = sorted(set(rates))
    few = len(distinct) <= 8
    axis.xaxis.set_major_locator(
        FixedLocator(distinct) if few else LogLocator(subs=(1.0, 2.0, 5.0), numticks=20)
    )
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    if few:
        axis.tick_params(axis="x", labelrotation=45)


def _problems(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = runs.groupby(["dataset", "architecture"], sort=False)
    return [(f"{dataset.upper()}, {net}", own) for (dataset, net), own in groups]


def _stack(curves: Sequence[Sequence[tuple[float, ...]]], column: int) -> Array:
    """Curves as rows (seeds, epochs); a run that ended early keeps its last value."""
    longest = max(len(curve) for curve in curves)
    rows = [[point[column] for point in curve] for curve in curves]
    return np.array([row + [row[-1]] * (longest - len(row)) for row in rows], dtype=np.float64)


def draw_curves(
    results: Sequence[RunResult], metrics: Sequence[Metric] = ("loss", "accuracy")
) -> Figure:
    """Draw training loss and test accuracy over epochs: mean, and band from lowest to highest seed.

    Args:
        results: Runs. Of an optimizer with several rates those at its best rate are drawn (by mean
            accuracy); the legend names the rate.
        metrics: A column of panels each.

    Returns:
        The figure, a row of panels per data set and network.
    """
    runs = best_rates(frame(results))
    names = runs["label"] + ", lr " + runs["lr"].map(lambda lr: f"{lr:g}")
    runs = runs.assign(name=names)
    labels = list(dict.fromkeys(names))
    problems = _problems(runs)
    figure, axes = _panels(len(metrics) * len(problems), len(metrics))
    panels = iter(axes)
    for title, own in problems:
        for metric in metrics:
            axis = next(panels)
            for name, line in own.groupby("name", sort=False):
                values = _stack(list(line["curve"]), 1 if metric == "loss" else 2)
                epochs = np.arange(1, values.shape[1] + 1)
                style = _style(str(name), labels)
                band = values.min(axis=0), values.max(axis=0)
                axis.fill_between(epochs, *band, color=style["color"], alpha=0.13, linewidth=0)
                axis.plot(epochs, values.mean(axis=0), markersize=4, linewidth=1.8, **style)
            if metric == "loss":
                axis.set_yscale("log")
            axis.set(xlabel="epoch", ylabel=AXIS[metric], title=title)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
    _legend(figure, axes)
    figure.suptitle(f"Training curves: mean and range of {_seeds(runs)}")
    return figure


def _seeds(runs: pd.DataFrame) -> str:
    counts = runs.groupby(["dataset", "architecture", "label", "lr"])["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"


def draw_rates(results: Sequence[RunResult], metric: Metric = "accuracy") -> Figure:
    """Draw accuracy or loss over the learning rate: mean, standard deviation, worst seed.

    Args:
        results: Runs.
        metric: What is drawn.

    Returns:
        The figure, a panel per data set and network.
    """
    runs = frame(results)
    labels = list(dict.fromkeys(runs["label"]))
    problems = _problems(runs)
    figure, axes = _panels(len(problems), 2)
    for axis, (title, own) in zip(axes, problems, strict=True):
        for label, line in own.groupby("label", sort=False):
            seeds = line.groupby("lr")[COLUMN[metric]]
            worst = seeds.min() if metric == "accuracy" else seeds.max()
            mean, sd = seeds.mean(), seeds.std().fillna(0.0)
            style = _style(str(label), labels)
            colour = style["color"]
            axis.fill_between(
                mean.index, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0
            )
            axis.plot(mean.index, mean, markersize=5, linewidth=1.8, **style)
            axis.plot(worst.index, worst, color=colour, linestyle=":", linewidth=1.2, marker="_")
        rate_axis(axis, own["lr"].tolist())
        axis.set(xlabel="learning rate", ylabel=AXIS[metric], title=title)
        if metric == "loss":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 102)
        axis.grid(alpha=0.25)
    _legend(figure, axes)
    figure.suptitle(
        f"{_seeds(runs)} a point\nmean (line), standard deviation (band), worst seed (dotted)"
    )
    return figure
