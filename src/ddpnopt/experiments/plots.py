# SPDX-License-Identifier: MIT
"""Figures: accuracy over the learning rate, and training curves. Colours safe for all eyes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files; no display is needed or opened

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ddpnopt.experiments.summary import by_rate

# Okabe and Ito's palette: told apart with any common colour blindness, and by line style too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _style(label: str, labels: list[str]) -> dict[str, Any]:
    """Colour, marker and line of an optimizer: rivals dashed, DDPNOpt solid."""
    index = labels.index(label)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if label.startswith("DDPNOpt") else "--",
        "label": label,
    }


def _grid(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    columns = min(panels, columns)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    flat = [axis for row in axes for axis in row]
    for spare in flat[panels:]:
        spare.set_visible(False)
    return figure, flat[:panels]


def _legend(figure: Figure, axes: list[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=min(4, len(entries)),
        frameon=False,
        fontsize=10,
    )


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date or version in the file: the same figure gives the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def _title(dataset: str, architecture: str) -> str:
    return f"{dataset.upper()}, {architecture}"


def plot_rates(runs: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Draw test accuracy over the learning rate: mean line, band from worst to best seed.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`; one panel per data set and
            architecture.
        path: PNG file to write; its folder is made.
        title: Heading of the figure.

    Returns:
        `path`.
    """
    rates = by_rate(runs)
    labels = list(dict.fromkeys(runs["label"]))
    problems = list(rates.groupby(["dataset", "architecture"], sort=False))
    figure, axes = _grid(len(problems), 2 if len(problems) == 4 else 3)
    for axis, ((dataset, architecture), problem) in zip(axes, problems, strict=True):
        for label, own in problem.groupby("label", sort=False):
            style = _style(str(label), labels)
            axis.fill_between(
                own["lr"], own["worst"], own["best"], color=style["color"], alpha=0.10, linewidth=0
            )
            axis.plot(own["lr"], own["mean"], markersize=5, linewidth=1.8, **style)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=20))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="learning rate", ylabel="test accuracy (%)", ylim=(0, 102))
        axis.set_title(_title(dataset, architecture))
        axis.grid(alpha=0.25)
    seeds = runs.groupby(["label", "lr", "dataset", "architecture"])["seed"].nunique().max()
    figure.suptitle(title or f"Accuracy over the learning rate (mean and range of {seeds} seeds)")
    _legend(figure, axes)
    return _save(figure, path)


def _epochs(own: pd.DataFrame, column: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Stack the runs' curves (seeds, epochs); a run that ended early keeps its last value."""
    curves = [[point[column] for point in curve] for curve in own["curve"]]
    longest = max(len(c) for c in curves)
    return np.array([c + [c[-1]] * (longest - len(c)) for c in curves], dtype=np.float64)


def plot_curves(runs: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Draw training loss and test accuracy over epochs: mean and band from lowest to highest.

    Every optimizer is shown at each rate in `runs`, so pass one rate per optimizer and problem
    (such as its best).

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.
        path: PNG file to write; its folder is made.
        title: Heading of the figure.

    Returns:
        `path`.
    """
    labels = list(dict.fromkeys(runs["label"]))
    problems = list(runs.groupby(["dataset", "architecture"], sort=False))
    figure, axes = _grid(2 * len(problems), 2)
    for index, ((dataset, architecture), problem) in enumerate(problems):
        left, right = axes[2 * index], axes[2 * index + 1]
        for (label, _), own in problem.groupby(["label", "lr"], sort=False):
            style = _style(str(label), labels)
            for axis, column in ((left, 1), (right, 2)):
                values = _epochs(own, column)
                epochs = np.arange(1, values.shape[1] + 1)
                low, high = values.min(axis=0), values.max(axis=0)
                axis.fill_between(epochs, low, high, color=style["color"], alpha=0.10, linewidth=0)
                axis.plot(epochs, values.mean(axis=0), markersize=4, linewidth=1.8, **style)
        left.set_yscale("log")
        left.set(xlabel="epoch", ylabel="training loss (nats)")
        right.set(xlabel="epoch", ylabel="test accuracy (%)")
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(_title(dataset, architecture))
            axis.grid(alpha=0.25)
    figure.suptitle(title or "Training curves (mean and range over seeds)")
    _legend(figure, axes)
    return _save(figure, path)


def best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep, for every problem and optimizer, the runs at the rate with the best mean accuracy.

    Args:
        runs: A table of `ddpnopt.experiments.sweep.frame`.

    Returns:
        The rows of `runs` at those rates.
    """
    keys = ["dataset", "architecture", "label"]
    rates = by_rate(runs)
    best = rates.loc[rates.groupby(keys, sort=False)["mean"].idxmax(), [*keys, "lr"]]
    return runs.merge(best, on=[*keys, "lr"])
