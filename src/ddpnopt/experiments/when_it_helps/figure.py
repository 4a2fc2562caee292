# SPDX-License-Identifier: MIT
"""One figure: at which rates each depth, and the best clipping, is good on every network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ddpnopt.experiments.plots import COLOURS
from ddpnopt.experiments.when_it_helps.tables import Measured, Verdict, difference

#: What is drawn, from top to bottom within a row, and its colour.
LANES = ("off", "best rival", "open loop", "closed loop")
_COLOUR = dict(zip(LANES, (COLOURS[6], COLOURS[4], COLOURS[5], COLOURS[0]), strict=True))


def _lanes(v: Verdict) -> list[tuple[str, Measured]]:
    off, opened, closed = v.depths
    lanes = [("off", off), ("open loop", opened), ("closed loop", closed)]
    if v.rivals:
        lanes.insert(1, ("best rival", max(v.rivals, key=v.factor)))
    return lanes


def _row(axis: Axes, v: Verdict, height: float) -> None:
    best = max((m for _, m in _lanes(v)), key=lambda m: m.mean)
    for lane, one in _lanes(v):
        y = height + 0.3 - 0.2 * LANES.index(lane)
        good = one.good(v.reference)
        if good is not None:
            axis.plot(good, (y, y), color=_COLOUR[lane], linewidth=4, solid_capstyle="round")
        gap, error = difference(best, one)
        worse = gap > 2 * error and gap >= 0.5
        axis.plot(
            one.best,
            y,
            marker="x" if worse else "o",
            markersize=6,
            markeredgecolor=_COLOUR[lane],
            markerfacecolor="white",
        )


def draw(found: Sequence[Verdict], path: Path) -> Path:
    """Draw a panel for each borrowed optimizer, a row in it for each network.

    Args:
        found: All families on all problems.
        path: PNG file to write.

    Returns:
        `path`.
    """
    titles = list(dict.fromkeys(v.family.title for v in found))
    headings = list(dict.fromkeys(v.problem.heading for v in found))
    figure, axes = plt.subplots(
        1,
        len(titles),
        figsize=(4.5 + 2.6 * len(titles), 1.6 + 0.55 * len(headings)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, title in zip(axes[0], titles, strict=True):
        for v in found:
            if v.family.title == title:
                _row(axis, v, -headings.index(v.problem.heading))
        axis.set(title=title, xscale="log", xlabel="learning rate")
        axis.set_yticks([-i for i in range(len(headings))], headings)
        axis.grid(axis="x", alpha=0.3)
        for i in range(len(headings)):
            axis.axhline(-i - 0.5, color="0.85", linewidth=0.8)
    handles = [Line2D([], [], color=_COLOUR[lane], linewidth=4, label=lane) for lane in LANES]
    marks = {"o": "best rate", "x": "best rate, significantly below the best"}
    handles += [
        Line2D([], [], color="0.3", linestyle="", marker=m, markerfacecolor="white", label=text)
        for m, text in marks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle("Rates within two points of the best: longer bars forgive more")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path
