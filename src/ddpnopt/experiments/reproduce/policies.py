# SPDX-License-Identifier: MIT
"""Figs. 5 and 7: the feedback policy of a trained convolutional network, made visible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ddpnopt.experiments.data import Dataset, load
from ddpnopt.experiments.models import wants_images
from ddpnopt.experiments.reproduce import schema
from ddpnopt.experiments.reproduce.gain_pictures import first_of_classes, pictures, trained
from ddpnopt.experiments.reproduce.kept import kept
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun, show_number
from ddpnopt.experiments.reproduce.policy_plots import draw
from ddpnopt.experiments.reproduce.policy_settings import Policies, Problem

MODULE = "ddpnopt.experiments.reproduce.gain_pictures"
#: Data sets that need no files.
INCLUDED = ("digits", "wine")
#: Share of the energy |K|_F^2 whose number of singular values is counted.
ENERGY = 0.9


@dataclass(frozen=True)
class Look:
    """What was found on one data set.

    Attributes:
        problem: The data set and its training.
        setting: Everything that decides the pictures.
        payload: The pictures; None: there are none.
        missing: Why.
    """

    problem: Problem
    setting: dict[str, Any]
    payload: dict[str, Any] | None
    missing: str = ""

    @property
    def title(self) -> str:
        """Name and origin of the data."""
        return self.problem.dataset if self.payload is None else str(self.payload["data"])


def fig5(request: Request) -> Outcome:
    """Show the leading right-singular vector of every convolution's gain matrix (Fig. 5).

    Args:
        request: What the user asked for; data sets whose files are not in `data` are left out.

    Returns:
        A row for each sample and layer.

    Raises:
        SettingsError: The settings file can't be used.
    """
    return _reproduce(request, "fig5", "Fig. 5: the feedback policy made visible")


def fig7(request: Request) -> Outcome:
    """Show the leading right-singular vectors of the gain matrices, on colour images too (Fig. 7).

    Args:
        request: As in `fig5`.

    Returns:
        As in `fig5`.

    Raises:
        SettingsError: The settings file can't be used.
    """
    return _reproduce(request, "fig7", "Fig. 7: the feedback policy, leading directions")


def _reproduce(request: Request, name: str, title: str) -> Outcome:
    settings = schema.load(Policies, name, request.settings)
    looks = [look_at(request, settings, problem) for problem in settings.problem]
    rows = pd.DataFrame([row for look in looks for row in _rows(look)])
    found = [look for look in looks if look.payload is not None]
    missing = [f"**Missing: {look.problem.dataset}.** {look.missing}" for look in looks]
    return Outcome(
        name=name,
        title=title,
        settings=_setting(settings, looks),
        rows=rows,
        notes=(*_notes(settings), *[m for m, k in zip(missing, looks, strict=True) if k.missing]),
        figure=lambda: draw([(k.title, k.payload["samples"]) for k in found if k.payload]),
        quick=request.quick,
        command=rerun(request, name),
        seconds=sum(float(k.payload["seconds"]) for k in found if k.payload),
        views=(_view(rows),),
        summary=f"{len(found)} of {len(looks)} data sets",
    )


def look_at(request: Request, settings: Policies, problem: Problem) -> Look:
    """Make the pictures of a data set, or take them from the store.

    Args:
        request: What the user asked for; without `run` nothing is made.
        settings: The figure's file.
        problem: One of its data sets.

    Returns:
        The pictures, or why there are none.
    """
    quick = settings.quick
    epochs = request.epochs or (quick.epochs if request.quick else problem.epochs)
    train_samples = quick.train_samples if request.quick else problem.train_samples
    samples = quick.samples if request.quick else settings.samples
    setting = {
        **settings.model_dump(mode="json", exclude={"problem", "quick"}),
        **problem.model_dump(mode="json"),
        **{"epochs": epochs, "train_samples": train_samples, "samples": samples},
    }
    if problem.dataset not in INCLUDED and request.data is None and not request.download:
        # Stored pictures can still be shown: only making them needs the files.
        request = replace(request, run=False)
        missing = "Its files are not in scikit-learn: name their folder with --data DIR."
    else:
        missing = "Not measured yet."
    try:
        payload = kept(
            request, "gain", setting, MODULE, lambda: _make(request, settings, problem, setting)
        )
    except ValueError as error:
        return Look(problem, setting, None, str(error))
    return Look(problem, setting, payload, "" if payload is not None else missing)


def _make(
    request: Request, settings: Policies, problem: Problem, setting: dict[str, Any]
) -> dict[str, Any]:
    data = _data(request, settings, problem, setting["train_samples"])
    model, accuracy = trained(
        data,
        settings.architecture,
        settings.optimizer,
        settings.lr,
        settings.options,
        epochs=setting["epochs"],
        batch=problem.batch,
        seed=settings.seed,
    )
    samples = pictures(
        model,
        data,
        first_of_classes(data, setting["samples"]),
        value=settings.value,
        step=settings.step,
        triplets=settings.triplets,
        vectors=settings.vectors,
        seed=settings.seed,
    )
    return {"data": data.label, "accuracy": accuracy, "samples": samples}


def _data(
    request: Request, settings: Policies, problem: Problem, train_samples: int | None
) -> Dataset:
    images = wants_images(settings.architecture)
    whole = problem.dataset in INCLUDED
    return load(
        problem.dataset,
        seed=settings.seed,
        scale=settings.scale,
        images=images,
        folder=None if whole else request.data,
        train_samples=train_samples,
    )


def energy(values: Sequence[float]) -> tuple[float, int]:
    """Say how much of a matrix lies along its leading singular vector.

    Args:
        values: Singular values, largest first.

    Returns:
        Share of the first in the sum of squares (NaN where all are 0), and how many make up
        `ENERGY` of it.
    """
    squares = [value * value for value in values]
    total = math.fsum(squares)
    if total == 0.0:
        return math.nan, 0
    part = 0.0
    for number, square in enumerate(squares, 1):
        part += square
        if part >= ENERGY * total:
            return squares[0] / total, number
    return squares[0] / total, len(squares)


def _rows(look: Look) -> list[dict[str, object]]:
    if look.payload is None:
        return [{"dataset": look.problem.dataset, "published": math.nan, "verdict": look.missing}]
    rows: list[dict[str, object]] = []
    for sample in look.payload["samples"]:
        for layer in sample["layers"]:
            share, number = energy(layer["values"])
            rows.append(
                {
                    "dataset": look.problem.dataset,
                    "class": sample["label"],
                    "layer": layer["layer"],
                    "published": math.nan,
                    "measured": layer["values"][0],
                    "verdict": "none published",
                    "share": share,
                    "values_for_90_percent": number,
                    "predicted": sample["predicted"],
                    "probability": sample["probability"],
                    "K": " x ".join(str(n) for n in layer["shape"]),
                    "values": " ".join(f"{v:.4g}" for v in layer["values"]),
                }
            )
    return rows


def _view(rows: pd.DataFrame) -> View:
    names = {
        "dataset": "data set",
        "class": "class",
        "predicted": "answer",
        "probability": "its probability",
        "layer": "layer",
        "K": "K",
        "measured": "leading singular value",
        "share": "its share of the energy",
        "values_for_90_percent": "values for 90 %",
        "verdict": "verdict",
    }
    shown = rows.reindex(columns=list(names))
    for column in ("class", "predicted", "values_for_90_percent"):
        shown[column] = shown[column].map(lambda v: show_number(v if pd.isna(v) else int(v)))
    for column in ("probability", "measured", "share"):
        shown[column] = shown[column].map(lambda v: show_number(float(v), 3))
    shown = shown.astype(object).where(shown.notna(), EMPTY).rename(columns=names)
    return View("Singular values of the gain matrices (nothing is published)", shown)


def _notes(settings: Policies) -> tuple[str, ...]:
    return (
        "Each image is vᵀ ∂x_t/∂x_0 for a right-singular vector v of the layer's gain matrix K_t: "
        "the change of the input to which the layer's weights answer most. Red and blue are the "
        "two signs (the sign itself is arbitrary: the strongest pixel is made positive); colour "
        "images show the change around grey. The first layer has no feedback, since its state "
        "can't change.",
        "K = -Q_uu⁻¹ Q_ux of one sample in a batch of one, with Q_uu = I / "
        f"{settings.step:g} and value={settings.value!r}. Its rank is at most the number of "
        "classes less 1 (1 for `gauss_newton`, the paper's outer product), so the singular values "
        "shown are all there are up to ten classes, and shares are of the whole |K|². Their size "
        "falls with the terminal Hessian where the network is sure of its answer.",
        "The paper's figures are not in our source: nothing is compared.",
    )


def _setting(settings: Policies, looks: Sequence[Look]) -> str:
    lines = [
        f"{settings.architecture}, inputs scaled {settings.scale!r}, trained by "
        f"{settings.optimizer} at lr {settings.lr:g}, seed {settings.seed}; the first test sample "
        "of each of the first classes."
    ]
    for look in looks:
        chosen = look.setting
        part = "all" if chosen["train_samples"] is None else str(chosen["train_samples"])
        reached = "not run"
        if look.payload is not None:
            reached = f"test accuracy {100 * look.payload['accuracy']:.1f} %"
        lines.append(
            f"- {look.title}: {chosen['epochs']} epochs, batch {chosen['batch']}, {part} training "
            f"samples: {reached}"
        )
    return lines[0] + "\n\n" + "\n".join(lines[1:])
