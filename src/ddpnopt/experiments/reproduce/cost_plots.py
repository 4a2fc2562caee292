# SPDX-License-Identifier: MIT
"""Figures of the costs: lines over sizes, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from ddpnopt.experiments.plots import COLOURS, MARKERS
from ddpnopt.experiments.reproduce.cost_settings import LETTERS, Axis
from ddpnopt.experiments.reproduce.step_cost import Cost


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    """Colour, marker and line of a method: rivals dashed, DDPNOpt solid."""
    at = list(names).index(name)
    return {
        "color": COLOURS[at % len(COLOURS)],
        # A second turn through the palette has other markers.
        "marker": MARKERS[(at + at // len(COLOURS)) % len(MARKERS)],
        "linestyle": "-" if name.startswith("DDPNOpt") else "--",
        "linewidth": 1.6,
        "markersize": 5,
    }


def _sizes_axis(axis: Axes, sizes: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted(set(sizes))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.yaxis.set_minor_formatter(NullFormatter())
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.25)


def _heading(figure: Figure, text: str) -> None:
    # To the right: the left corner is kept for the mark of quick runs.
    figure.suptitle(text, x=0.995, ha="right")


def _empty(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.4")


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )


def growth(curves: Sequence[tuple[str, Axis, list[Cost]]], names: Sequence[str]) -> Figure:
    """Draw time and memory over B, X and L.

    Args:
        curves: Quantity ("time" or "memory"), axis, and the costs along it.
        names: Names of the methods, in order.

    Returns:
        Two rows (time, memory) of three panels.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = [figure.add_subplot(2, 3, 1 + index) for index in range(len(curves))]
    for axis, (quantity, along, costs) in zip(axes, curves, strict=True):
        found: list[int] = []
        for name in names:
            points = [
                (getattr(c, along), c.backward if quantity == "time" else c.mib)
                for c in costs
                if c.method == name
            ]
            points = [(size, value) for size, value in points if value is not None]
            if points:
                found += [size for size, _ in points]
                axis.plot(*zip(*points, strict=True), label=name, **_style(name, names))
        _sizes_axis(axis, found)
        axis.set_xlabel({"batch": "batch B", "width": "width X", "depth": "layers L"}[along])
        axis.set_ylabel("backward pass and update (ms)" if quantity == "time" else "memory (MiB)")
        axis.set_title(f"{quantity} over {LETTERS[along]}")
        if not found:
            _empty(axis)
    _heading(figure, "Growth of a step's cost, the two other sizes fixed")
    _legend(figure, axes, 3)
    return figure


def bars(frame: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw time and memory of a step over the batch.

    Args:
        frame: Columns method, B, measured (ms) and mib.
        names: Names of the methods, in order.

    Returns:
        Two panels.
    """
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    axes = [figure.add_subplot(1, 2, 1 + index) for index in range(2)]
    panels = zip(axes, ("measured", "mib"), ("time of a step (ms)", "memory (MiB)"), strict=True)
    for axis, column, label in panels:
        for name in names:
            own = frame[(frame["method"] == name) & frame[column].notna()]
            if len(own):
                axis.plot(own["B"], own[column], label=name, **_style(name, names))
        _sizes_axis(axis, [int(b) for b in frame["B"]])
        axis.set_xlabel("batch B")
        axis.set_ylabel(label)
        if frame[column].isna().all():
            _empty(axis)
    _heading(figure, "One training step on the DIGITS net")
    _legend(figure, axes, 4)
    return figure
