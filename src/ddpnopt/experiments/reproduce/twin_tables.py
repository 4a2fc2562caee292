# SPDX-License-Identifier: MIT
"""Tables 6-8 (each baseline against its twin) and Tables 9 and 10 (over rate and eps_Vxx)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ddpnopt.experiments.reproduce.ablation import Measured, measure, rows
from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings
from ddpnopt.experiments.reproduce.describe import (
    COLUMNS_NOTE,
    closeness,
    count_note,
    setting,
    short_summary,
    views,
)
from ddpnopt.experiments.reproduce.outcome import Outcome, Request, rerun
from ddpnopt.experiments.reproduce.published import MEASURES, Measure
from ddpnopt.experiments.reproduce.schema import load
from ddpnopt.experiments.reproduce.statistics import DIVERGED, METHOD

EPS_NOTE = (
    "**eps_Vxx** of this table is not printed in the paper; the settings file takes the smallest "
    "of the same block of Tables 9 and 10."
)


def _make(
    request: Request,
    name: str,
    title: str,
    measures: Sequence[Measure],
    published: str,
    extra: Sequence[str] = (),
) -> Outcome:
    settings = load(AblationSettings, name, request.settings)
    measured = measure(request, settings, name)
    found = rows(measured, published, measures)
    # From the file, not from the paper: a user's own may be about another optimizer and other data.
    pairs = ", ".join(f"{b.label} and DDPNOpt with M = {b.curvature}" for b in settings.block)
    named = title.format(pairs=pairs, data=settings.network.dataset.upper())
    return outcome(request, name, named, measured, found, extra)


def outcome(
    request: Request,
    name: str,
    title: str,
    measured: Measured,
    found: pd.DataFrame,
    extra: Sequence[str] = (),
) -> Outcome:
    """Put a table's rows, words and views together."""
    return Outcome(
        name=name,
        title=title,
        settings=setting(measured),
        rows=found,
        notes=(count_note(found), closeness(found), *extra, COLUMNS_NOTE, METHOD, DIVERGED),
        quick=request.quick,
        command=rerun(request, name),
        seconds=measured.seconds,
        views=views(measured, found),
        summary=short_summary(found),
    )


def table6(request: Request) -> Outcome:
    """SGD against DDPNOpt with M = I at lr 0.1."""
    title = "Table 6: {pairs} on {data}"
    return _make(request, "table6", title, MEASURES, "table6", [EPS_NOTE])


def table7(request: Request) -> Outcome:
    """RMSprop against DDPNOpt with its M at lr 0.001."""
    title = "Table 7: {pairs} on {data}"
    return _make(request, "table7", title, MEASURES, "table7", [EPS_NOTE, RMSPROP_NOTE])


def table8(request: Request) -> Outcome:
    """EKFAC against DDPNOpt with its M at lr 0.03."""
    title = "Table 8: {pairs} on {data}"
    return _make(request, "table8", title, MEASURES, "table8", [EPS_NOTE])


def table9(request: Request) -> Outcome:
    """Training loss over rate, eps_Vxx and M."""
    title = "Table 9: training loss on {data} over learning rate, eps_Vxx and M"
    return _make(request, "table9", title, ["train_loss"], "ablation", [RMSPROP_NOTE])


def table10(request: Request) -> Outcome:
    """Accuracy over rate, eps_Vxx and M."""
    title = "Table 10: test accuracy on {data} over learning rate, eps_Vxx and M"
    return _make(request, "table10", title, ["accuracy"], "ablation", [RMSPROP_NOTE])


RMSPROP_NOTE = (
    "**RMSprop's M** squares the batch's mean gradient, with torch's running mean. Table 2 writes "
    "the same E[J_u . J_u] for RMSprop itself as E[Q_u . Q_u] for its twin, and the twin must "
    "become RMSprop where Q_ux = 0; a mean of the samples' squares would be another optimizer (set "
    '`paper_options = { "curvature.second_moment" = "per_sample" }` to see it).'
)
