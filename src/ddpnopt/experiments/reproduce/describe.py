# SPDX-License-Identifier: MIT
"""Tables 6-10 and Fig. 4 in words: settings, conventions, counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from ddpnopt.experiments.markdown import table
from ddpnopt.experiments.reproduce.ablation import (
    BASELINE,
    CLIPPED,
    DEFAULTS,
    PAPER,
    Measured,
)
from ddpnopt.experiments.reproduce.ablation_settings import Block
from ddpnopt.experiments.reproduce.outcome import EMPTY, View
from ddpnopt.experiments.reproduce.published import Measure
from ddpnopt.experiments.reproduce.statistics import Count, Difference, count, verdict

MEASURE_NAMES: dict[Measure, str] = {
    "train_loss": "training loss",
    "accuracy": "test accuracy (%)",
}

COLUMNS_NOTE = (
    '**Columns**: the borrowed optimizer; DDPNOpt as the paper has it (`Dense(backup="riccati", '
    "regularization=eps)`: full V_xx, eq. 5, eps_Vxx as printed, V in the units of the batch's "
    "mean loss) at each eps_Vxx; DDPNOpt with this library's defaults (the Moreau envelope, which "
    "has no eps_Vxx: one column); and the borrowed optimizer behind `clip_grad_norm_` with "
    "one tuned threshold per block. **Difference** is twin - baseline: below 0 in loss, or above 0 "
    "in accuracy, the twin is better. **Verdicts** compare its sign with the published one; "
    "defaults and clipping, of which the paper prints nothing, are judged by the mean of the "
    "published twins in their row."
)

#: Said where a count would mislead.
ONE_SEED = "With one seed nothing is significant, so that no cell can count against the published."


def setting(measured: Measured) -> str:
    """Say in Markdown what was trained, how often, and what is reported."""
    net, runs, size = measured.settings.network, measured.settings.runs, measured.sizes
    loss = {
        "train": "loss over the whole training part after the last epoch",
        "running": "mean of the losses that the last epoch's steps saw",
    }[runs.loss_measure]
    drawn = measured.base.train_samples
    samples = "" if drawn is None else f", {drawn} training samples"
    lines = [
        f"- data: {net.dataset}, {100 * net.test_share:g} % held out by class{samples}, "
        f'inputs scaled "{net.scale}"',
        f'- network: `{net.architecture}`, initialisation "{net.initialisation}"',
        f"- batch {net.batch}, epochs: {size.epochs}, no schedule, no weight decay",
        f"- seeds {span(size.seeds)}; training loss: {loss}; accuracy: of the last epoch",
    ]
    for block in measured.settings.block:
        clip = measured.clips.get(block.baseline)
        chosen = EMPTY if clip is None else f"{clip:g}"
        tried = ", ".join(f"{c:g}" for c in block.clip)
        options = ", ".join(
            f"{k} = {v}" for k, v in {**block.options, **block.paper_options}.items()
        )
        lines.append(
            f"- {block.label}: M = `{block.curvature}`{f' ({options})' if options else ''}; "
            f"clipping threshold {chosen}, of {tried} the one with the lowest mean training "
            f"loss over this block's rates on seeds {span(measured.sizes.choosing)}"
        )
    return "\n".join(lines)


def span(seeds: range) -> str:
    """Name a range of seeds: "3", "0 to 9"."""
    return f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"


def closeness(rows: pd.DataFrame) -> str:
    """Say how far the baseline columns are from the published ones."""
    own = rows[(rows["method"] == BASELINE) & rows["deviation"].notna()]
    if own.empty:
        return "**Baseline columns**: nothing published to compare with, or nothing measured."
    parts = []
    for what, cells in own.groupby("measure", sort=False):
        if what == "accuracy":
            apart = cells["measured"] - cells["published"]
            shown = [f"{gap:+.1f}" for gap in apart]
            said = f"{apart.abs().mean():.1f} points off on average"
        else:
            ratio = cells["measured"] / cells["published"]
            shown = [f"{100 * (factor - 1):+.0f} %" for factor in ratio]
            off = math.exp(np.log(ratio).abs().mean())
            said = f"off by a factor of {off:.2f} (geometric mean)"
        cell = zip(cells["baseline"], cells["lr"], shown, strict=True)
        listed = ", ".join(f"{name} {lr:g}: {gap}" for name, lr, gap in cell)
        parts.append(f"{MEASURE_NAMES[what]} {said} ({listed})")
    return (
        f"**Baseline columns**, measured against published: {'; '.join(parts)}. One setting for "
        "the whole table, none tuned per cell; how it was searched for is in the documentation, "
        '"Reproduce the paper".'
    )


def counts(rows: pd.DataFrame) -> dict[tuple[str, str], Count]:
    """Count verdicts over the printed twin cells.

    Args:
        rows: Rows of `ddpnopt.experiments.reproduce.ablation.rows`.

    Returns:
        Counts by (measure, method). Every printed twin cell counts once for each method; the
        columns without eps_Vxx are compared with each of their row's printed cells.
    """
    found: dict[tuple[str, str], list[str]] = {}
    twins = rows[(rows["method"] == PAPER) & rows["published_difference"].notna()]
    for cell in twins.itertuples(index=False):
        place = (
            (rows["measure"] == cell.measure)
            & (rows["baseline"] == cell.baseline)
            & (rows["lr"] == cell.lr)
        )
        found.setdefault((cell.measure, PAPER), []).append(cell.verdict)
        for method in (DEFAULTS, CLIPPED):
            own = rows[place & (rows["method"] == method)].iloc[0]
            apart = Difference(own["difference"], own["low"], own["high"], int(own["pairs"]))
            judged = verdict(cell.published_difference, apart)
            said = judged if apart.pairs else own["verdict"]
            found.setdefault((cell.measure, method), []).append(said)
    return {key: count(verdicts) for key, verdicts in found.items()}


def published_wins(rows: pd.DataFrame, what: str) -> tuple[int, int]:
    """Printed twin cells of a measure in which the twin is better, and all of them."""
    own = rows[(rows["method"] == PAPER) & (rows["measure"] == what)]
    gaps = own["published_difference"].dropna()
    better = (gaps < 0) if what == "train_loss" else (gaps > 0)
    return int(better.sum()), len(gaps)


def count_note(rows: pd.DataFrame) -> str:
    """Count, in a Markdown table, cells with the published sign or without a difference."""
    found = counts(rows)
    header = [
        "measure",
        "twin",
        "published: twin wins",
        "same sign or not significant",
        "same sign",
        "of them significant",
        "opposite, significant, or diverged",
        "not run",
    ]
    lines = []
    for (what, method), c in found.items():
        wins, cells = published_wins(rows, what)
        lines.append(
            [
                MEASURE_NAMES["train_loss" if what == "train_loss" else "accuracy"],
                {PAPER: "paper", DEFAULTS: "defaults", CLIPPED: "clipped"}[method],
                f"{wins} of {cells}",
                f"{c.agree} of {c.cells}",
                str(c.same),
                str(c.same_significant),
                str(c.against),
                str(c.missing),
            ]
        )
    if not lines:
        return "**Count**: no cell of this table is printed in the paper."
    alone = f"\n\n{ONE_SEED}" if _one_seed(rows) else ""
    return "**Count** of the printed twin cells:\n\n" + table(header, lines) + alone


def short_summary(rows: pd.DataFrame) -> str:
    """The counts in one line."""
    parts = [
        f"{MEASURE_NAMES['train_loss' if what == 'train_loss' else 'accuracy']}, {method}: "
        f"{c.agree} of {c.cells} as published or without significant difference"
        for (what, method), c in counts(rows).items()
        if method in (PAPER, DEFAULTS)
    ]
    return "; ".join(parts) + (f". {ONE_SEED}" if parts and _one_seed(rows) else "")


def _one_seed(rows: pd.DataFrame) -> bool:
    return int(rows["pairs"].max()) == 1


def views(measured: Measured, rows: pd.DataFrame) -> tuple[View, ...]:
    """Make a table for readers of each block and measure.

    Args:
        measured: The runs.
        rows: Their rows.

    Returns:
        Five lines a rate: published, measured, worst seed, difference, verdict.
    """
    found = []
    for what in dict.fromkeys(rows["measure"]):
        for block in measured.settings.block:
            own = rows[(rows["measure"] == what) & (rows["baseline"] == block.baseline)]
            measure: Measure = "train_loss" if what == "train_loss" else "accuracy"
            caption = f"{block.label}, M = {block.curvature}: {MEASURE_NAMES[measure]}"
            found.append(View(caption, _block_view(own, block, measure)))
    return tuple(found)


def _block_view(own: pd.DataFrame, block: Block, what: Measure) -> pd.DataFrame:
    lines = []
    for lr in block.lr:
        rate = own[own["lr"] == lr]
        heads = [_head(r) for r in rate.itertuples(index=False)]
        shows: list[tuple[str, Callable[[Any], str]]] = [
            ("published", lambda r: _number(r.published, what)),
            ("measured", lambda r: _measured(r, what)),
            ("worst seed", lambda r: _number(r.worst, what)),
            ("difference", lambda r: _difference(r, what)),
            ("verdict", _verdict),
        ]
        for title, show in shows:
            cells = [show(r) for r in rate.itertuples(index=False)]
            lines.append({"lr": f"{lr:g}", "": title, **dict(zip(heads, cells, strict=True))})
    return pd.DataFrame(lines)


def _head(row: Any) -> str:
    method = str(row.method)
    eps = float(row.eps_vxx)
    clip = float(row.clip)
    return {
        BASELINE: "baseline",
        PAPER: f"paper, eps {eps:g}",
        DEFAULTS: "defaults",
        CLIPPED: "clipped" if math.isnan(clip) else f"clipped at {clip:g}",
    }[method]


def _number(number: float, what: Measure) -> str:
    if math.isnan(number):
        return EMPTY
    return f"{number:.4f}" if what == "train_loss" else f"{number:.2f}"


def _measured(row: Any, what: Measure) -> str:
    mean, sd = float(row.measured), float(row.sd)
    spread = "" if math.isnan(sd) else f" ± {_number(sd, what)}"
    lost = int(row.diverged)
    return _number(mean, what) + spread + (f", {lost} diverged" if lost else "")


def _difference(row: Any, what: Measure) -> str:
    if row.method == BASELINE or math.isnan(mean := float(row.difference)):
        return ""
    digits = 4 if what == "train_loss" else 2
    low, high = float(row.low), float(row.high)
    ends = "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:+.{digits}f}{ends}"


def _verdict(row: Any) -> str:
    said = str(row.verdict)
    return said.removeprefix("baseline, ") if said != "baseline" else ""
