# SPDX-License-Identifier: MIT
"""Images of inputs and of singular vectors pulled back to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ddpnopt.experiments.plots import COLOURS, MARKERS

Image = NDArray[np.float64]


def _shaped(values: Any) -> Image:
    """(height, width) or (height, width, 3); flat features as one line."""
    image = np.asarray(values, dtype=np.float64)
    if image.ndim == 1:
        return image[None, :]
    return image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)


def _show_input(axis: Axes, values: Any) -> None:
    image = _shaped(values)
    low, high = float(image.min()), float(image.max())
    axis.imshow((image - low) / (high - low or 1.0), cmap="gray_r", vmin=0, vmax=1)


def _show_direction(axis: Axes, values: Any) -> None:
    image = _shaped(values)
    top = float(np.abs(image).max()) or 1.0
    if image.ndim == 3:
        axis.imshow(0.5 + 0.5 * image / top)
    else:
        axis.imshow(image, cmap="RdBu_r", vmin=-top, vmax=top)


def _bare(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_color("0.8")


def _spectrum(axis: Axes, sample: dict[str, Any], title: bool) -> None:
    for number, layer in enumerate(sample["layers"]):
        values = [max(v, 1e-30) for v in layer["values"]]
        axis.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=3,
            linewidth=1,
            label=f"layer {layer['layer']}",
        )
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    top = max(layer["values"][0] for layer in sample["layers"]) or 1.0
    axis.set_ylim(top * 1e-4, top * 3)
    axis.tick_params(labelsize=7)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.yaxis.tick_right()
    if title:
        axis.set_title("singular values", fontsize=9)
        axis.legend(fontsize=6, loc="upper right", frameon=False)


def _problem(place: Figure | SubFigure, title: str, samples: Sequence[dict[str, Any]]) -> None:
    layers = len(samples[0]["layers"])
    vectors = max(len(layer["images"]) for layer in samples[0]["layers"])
    axes = place.subplots(
        len(samples) * vectors,
        layers + 2,
        squeeze=False,
        gridspec_kw={"width_ratios": [1] * (layers + 1) + [1.3]},
    )
    for number, sample in enumerate(samples):
        for vector in range(vectors):
            row = axes[number * vectors + vector]
            first = number == 0 and vector == 0
            if vector == 0:
                _show_input(row[0], sample["input"])
                row[0].set_title("input" if first else "", fontsize=9)
                row[0].set_ylabel(f"class {sample['label']}", fontsize=9)
                _spectrum(row[-1], sample, first)
                _bare(row[0])
            else:
                row[0].set_visible(False)
                row[-1].set_visible(False)
            for axis, layer in zip(row[1:-1], sample["layers"], strict=True):
                if vector < len(layer["images"]):
                    _show_direction(axis, layer["images"][vector])
                if vectors > 1:
                    axis.set_ylabel(f"v{vector + 1}", fontsize=8)
                if first:
                    axis.set_title(f"layer {layer['layer']}", fontsize=9)
                _bare(axis)
    place.suptitle(title, fontsize=11)


def draw(problems: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> Figure:
    """Draw inputs, pulled-back singular vectors and singular values.

    Args:
        problems: For each data set a heading and what `gain_pictures.pictures` found.

    Returns:
        A block of images for each data set, side by side.
    """
    if not problems:
        figure = Figure(figsize=(5, 2))
        figure.text(0.5, 0.5, "not measured", ha="center", color="0.4")
        return figure
    rows = max(
        len(samples) * max(len(layer["images"]) for layer in samples[0]["layers"])
        for _, samples in problems
    )
    columns = [len(samples[0]["layers"]) + 2.3 for _, samples in problems]
    figure = Figure(figsize=(1.35 * sum(columns), 1.4 * rows + 0.9), layout="constrained")
    # The upper left corner is kept for the mark of quick runs.
    figure.suptitle(" ", fontsize=8)
    places = figure.subfigures(1, len(problems), squeeze=False, width_ratios=columns)[0]
    for place, (title, samples) in zip(places, problems, strict=True):
        _problem(place, title, samples)
    return figure
