# SPDX-License-Identifier: MIT
"""Baselines against their twins: the trainings of Tables 6-10 and Fig. 4, as rows.

Four kinds of columns: the borrowed optimizer, the paper's algorithm around it at each eps_Vxx, the
library's default around it, and the borrowed optimizer behind a tuned `clip_grad_norm_`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings, Block, Contender
from ddpnopt.experiments.reproduce.outcome import Request
from ddpnopt.experiments.reproduce.published import MEASURES, Cell, Measure, find
from ddpnopt.experiments.reproduce.runs import obtain, spent
from ddpnopt.experiments.reproduce.schema import SettingsError
from ddpnopt.experiments.reproduce.statistics import (
    NOT_RUN,
    NOTHING,
    paired,
    summarise,
    verdict,
)
from ddpnopt.experiments.training import check

#: The data set of all printed numbers of Tables 6-10.
PUBLISHED_DATASET = "digits"

BASELINE, PAPER, DEFAULTS, CLIPPED = "baseline", "paper", "defaults", "clipped"
METHODS = {
    BASELINE: "borrowed optimizer",
    PAPER: "paper's algorithm",
    DEFAULTS: "library's defaults",
    CLIPPED: "borrowed optimizer, clipped",
}


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        seeds: Seeds of the table.
        choosing: Seeds on which the clipping threshold is chosen.
        epochs: Epochs of every training.
    """

    seeds: range
    choosing: range
    epochs: int


def sizes(request: Request, settings: AblationSettings) -> Sizes:
    """Settle what the command line and `--quick` change in the file's sizes.

    Raises:
        SettingsError: So many seeds are asked for that they meet the choosing ones.
    """
    file, quick = settings.runs, settings.quick if request.quick else None
    seeds = request.seeds or (quick.seeds if quick else file.seeds)
    choosing = quick.choosing_seeds if quick else file.choosing_seeds
    epochs = request.epochs or (quick.epochs if quick else settings.network.epochs)
    return Sizes(*settings.seeds_of(seeds, choosing), epochs)


@dataclass(frozen=True)
class Measured:
    """The trainings of a table.

    Attributes:
        settings: The settings file.
        sizes: What was run of it.
        base: What all runs share.
        results: By `RunConfig.key`.
        clips: The threshold chosen for each block, by its baseline; None: no choosing runs.
    """

    settings: AblationSettings
    sizes: Sizes
    base: RunConfig
    results: Mapping[str, RunResult]
    clips: Mapping[str, float | None]

    @property
    def seconds(self) -> float:
        """Time in the steps of all runs."""
        return spent(self.results.values())

    def of(self, contender: Contender, lr: float) -> list[RunResult | None]:
        """One result per seed of the table; None where it is missing."""
        configs = (configure(self.base, contender, lr, seed) for seed in self.sizes.seeds)
        return [self.results.get(config.key) for config in configs]

    def values(self, contender: Contender, lr: float, measure: Measure) -> list[float | None]:
        """One number per seed of the table."""
        loss = self.settings.runs.loss_measure
        return [r if r is None else value(r, measure, loss) for r in self.of(contender, lr)]


def value(result: RunResult, measure: Measure, loss_measure: str) -> float:
    """What a table shows of a run: its loss (infinite if it diverged), or its accuracy in %."""
    if measure == "accuracy":
        return 100.0 * result.test_accuracy
    if result.diverged:
        return math.inf
    return result.train_loss if loss_measure == "train" else result.epochs[-1].running_loss


def configure(base: RunConfig, contender: Contender, lr: float, seed: int) -> RunConfig:
    """The configuration of one training."""
    name, options = contender
    update = {"optimizer": name, "options": options, "lr": lr, "seed": seed}
    return base.model_copy(update=update)


def measure(request: Request, settings: AblationSettings, title: str) -> Measured:
    """Choose each block's threshold on the choosing seeds, then make the table's runs.

    Args:
        request: What the user asked for.
        settings: The table's file.
        title: Shown beside the progress bar.

    Returns:
        The runs.

    Raises:
        SettingsError: The network can't take the data.
        ValueError: The data can't be had.
    """
    size = sizes(request, settings)
    base = settings.network.config(request, size.epochs)
    if request.quick and settings.quick.train_samples is not None:
        base = base.model_copy(update={"train_samples": settings.quick.train_samples})
    if request.run:
        try:
            check(configure(base, settings.block[0].baseline_run, 0.1, size.seeds[0]))
        except ValueError as error:
            raise SettingsError(str(error)) from error
    choosing = [
        configure(base, block.clipped(clip), lr, seed)
        for seed in size.choosing
        for block in settings.block
        if len(block.clip) > 1
        for clip in block.clip
        for lr in block.lr
    ]
    results = obtain(request, choosing, f"{title}: thresholds")
    partial = Measured(settings, size, base, results, {})
    clips = {block.baseline: _choose(partial, block) for block in settings.block}
    configs = [
        configure(base, contender, lr, seed)
        for seed in size.seeds
        for block in settings.block
        for contender in _contenders(block, clips[block.baseline])
        for lr in block.lr
    ]
    return Measured(settings, size, base, {**results, **obtain(request, configs, title)}, clips)


def _choose(measured: Measured, block: Block) -> float | None:
    """The threshold with the lowest mean training loss over rates and choosing seeds."""
    if len(block.clip) == 1:
        return block.clip[0]
    loss = measured.settings.runs.loss_measure
    best, chosen = math.inf, None
    for clip in block.clip:
        found = [
            measured.results.get(configure(measured.base, block.clipped(clip), lr, seed).key)
            for lr in block.lr
            for seed in measured.sizes.choosing
        ]
        losses = [value(r, "train_loss", loss) for r in found if r is not None]
        if len(losses) == len(found) and (chosen is None or sum(losses) < best):
            best, chosen = sum(losses), clip
    return chosen


def _contenders(block: Block, clip: float | None) -> list[Contender]:
    twins = [block.paper(eps) for eps in block.eps_vxx]
    clipped = [] if clip is None else [block.clipped(clip)]
    return [block.baseline_run, *twins, block.defaults, *clipped]


def rows(measured: Measured, table: str, measures: Sequence[Measure] = MEASURES) -> pd.DataFrame:
    """Make a row for each cell.

    Args:
        measured: The runs.
        table: Whose published numbers stand beside: "table6", ..., or "ablation".
        measures: What to show of a run.

    Returns:
        Columns measure, baseline, lr, method, eps_vxx, clip, published, measured, sd, seeds, worst,
        difference (twin - baseline, paired), low, high, verdict, deviation (measured against
        published, %), published_difference, diverged, pairs.
    """
    found = [
        row
        for what in measures
        for block in measured.settings.block
        for lr in block.lr
        for row in _rate(measured, table, what, block, lr)
    ]
    return pd.DataFrame(found)


def _rate(
    measured: Measured, table: str, what: Measure, block: Block, lr: float
) -> list[dict[str, object]]:
    """The rows of one rate: baseline, twins, rival."""
    # What is printed is about DIGITS; a user's file may be about anything.
    printed_for = measured.base.dataset == PUBLISHED_DATASET
    base, *printed = (
        find(table, block.baseline, lr, eps) if printed_for else None
        for eps in (None, *block.eps_vxx)
    )
    reference = measured.values(block.baseline_run, lr, what)
    gaps = [_gap(cell, base, what) for cell in printed]
    known = [gap for gap in gaps if not math.isnan(gap)]
    # The other columns have no number of their own in print: their sign is judged by the twins'.
    mean_gap = sum(known) / len(known) if known else math.nan
    clip = measured.clips.get(block.baseline)
    cells: list[tuple[str, Contender | None, float, Cell | None, float]] = [
        (BASELINE, block.baseline_run, math.nan, base, math.nan),
        *(
            (PAPER, block.paper(eps), eps, cell, gap)
            for eps, cell, gap in zip(block.eps_vxx, printed, gaps, strict=True)
        ),
        (DEFAULTS, block.defaults, math.nan, None, mean_gap),
        (CLIPPED, None if clip is None else block.clipped(clip), math.nan, None, mean_gap),
    ]
    found = []
    for method, contender, eps, cell, gap in cells:
        values = measured.values(contender, lr, what) if contender else [None] * len(reference)
        named = {
            "measure": what,
            "baseline": block.baseline,
            "lr": lr,
            "method": method,
            "eps_vxx": eps,
            "clip": clip if method == CLIPPED and clip is not None else math.nan,
        }
        found.append({**named, **_cell(values, reference, what, method, cell, gap)})
    return found


def _gap(cell: Cell | None, base: Cell | None, what: Measure) -> float:
    """Published twin - baseline."""
    return math.nan if cell is None or base is None else cell.value(what) - base.value(what)


def _cell(
    values: Sequence[float | None],
    reference: Sequence[float | None],
    what: Measure,
    method: str,
    cell: Cell | None,
    gap: float,
) -> dict[str, object]:
    own = [v for v in values if v is not None]
    pairs = zip(values, reference, strict=True)
    both = [(v, r) for v, r in pairs if v is not None and r is not None]
    summary = summarise(own, higher_is_better=what == "accuracy")
    printed = math.nan if cell is None else cell.value(what)
    deviation = 100.0 * (summary.mean / printed - 1.0)
    row: dict[str, object] = {
        "published": printed,
        "measured": summary.mean,
        "sd": summary.sd,
        "seeds": summary.seeds,
        "worst": summary.worst,
    }
    if method == BASELINE:
        apart = NOTHING
        said = NOT_RUN if not own else "baseline"
        if not math.isnan(deviation):
            said = f"baseline, {deviation:+.0f} % against published"
    else:
        apart = paired([v for v, _ in both], [r for _, r in both])
        said = verdict(gap, apart)
    worst = apart.least if what == "accuracy" else apart.most
    return {
        **row,
        "difference": apart.mean,
        "low": apart.low,
        "high": apart.high,
        "verdict": said,
        "deviation": deviation,
        "published_difference": gap,
        "difference_sd": apart.sd,
        "difference_worst": worst,
        "diverged": summary.diverged,
        "pairs": apart.pairs,
    }
