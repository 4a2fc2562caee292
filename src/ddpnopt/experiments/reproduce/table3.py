# SPDX-License-Identifier: MIT
"""Table 3: accuracy of every method on every data set; its printed figures are not available."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce.ablation import configure
from ddpnopt.experiments.reproduce.describe import span
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun
from ddpnopt.experiments.reproduce.runs import obtain, spent
from ddpnopt.experiments.reproduce.schema import SettingsError, load
from ddpnopt.experiments.reproduce.sources import BUILT_IN, Source, locate
from ddpnopt.experiments.reproduce.statistics import METHOD, paired, summarise
from ddpnopt.experiments.reproduce.table3_settings import (
    Candidate,
    Method,
    Problem,
    Table3Settings,
)
from ddpnopt.experiments.training import check

UNPUBLISHED = "no published number"


@dataclass
class _Cell:
    """A method on a problem: what is tried, what was chosen, what came out."""

    problem: Problem
    method: Method
    source: Source
    seeds: range
    choosing: range
    base: RunConfig
    choosing_base: RunConfig
    tried: tuple[Candidate, ...]
    chosen: Candidate | None = None
    results: list[RunResult | None] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """Why the cell stays empty; empty where it is run."""
        return self.source.reason or self.method.not_on.get(self.problem.name, "")

    def choosing_configs(self, candidate: Candidate) -> list[RunConfig]:
        contender = self.method.contender(self.problem.architecture, candidate)
        base = self.choosing_base
        return [configure(base, contender, candidate.lr, seed) for seed in self.choosing]

    def configs(self) -> list[RunConfig]:
        if self.chosen is None:
            return []
        contender = self.method.contender(self.problem.architecture, self.chosen)
        return [configure(self.base, contender, self.chosen.lr, seed) for seed in self.seeds]

    def choose(self, found: dict[str, RunResult]) -> None:
        """Keep the candidate with the best mean accuracy; none while a run is missing."""
        if len(self.tried) == 1:
            self.chosen = self.tried[0]
            return
        best = -math.inf
        for candidate in self.tried:
            runs = [found.get(c.key) for c in self.choosing_configs(candidate)]
            # A crashed run has no accuracy: its candidate is the last to be taken.
            accuracies = [_accuracy(r) for r in runs if r is not None]
            if len(accuracies) < len(runs):
                self.chosen = None
                return
            mean = sum(accuracies) / len(accuracies)
            if mean > best:
                best, self.chosen = mean, candidate


def _accuracy(result: RunResult) -> float:
    return 0.0 if math.isnan(result.test_accuracy) else result.test_accuracy


def table3(request: Request) -> Outcome:
    """Choose every method's rate on seeds of its own, then measure it on the table's.

    Args:
        request: What the user asked for.

    Returns:
        A row per problem and method; cells that are not run say why.
    """
    settings = load(Table3Settings, "table3", request.settings)
    sources = {p.dataset: locate(request, p.dataset) for p in settings.problem}
    cells = [
        _cell(request, settings, problem, method, sources[problem.dataset])
        for problem in settings.problem
        for method in settings.method
    ]
    open_cells = [cell for cell in cells if not cell.reason]
    if request.run:
        _check(open_cells)
    choosing = [
        config
        for cell in open_cells
        if len(cell.tried) > 1
        for candidate in cell.tried
        for config in cell.choosing_configs(candidate)
    ]
    chosen_on = obtain(request, choosing, "table3: choosing rates")
    for cell in open_cells:
        cell.choose(chosen_on)
    configs = [config for cell in open_cells for config in cell.configs()]
    results = obtain(request, configs, "table3")
    for cell in open_cells:
        cell.results = [results.get(config.key) for config in cell.configs()]
    rows = pd.DataFrame(_rows(cells))
    return Outcome(
        name="table3",
        title="Table 3: test accuracy (%) of every method on every data set",
        settings=_setting(settings, cells),
        rows=rows,
        notes=_notes(settings, rows),
        quick=request.quick,
        command=rerun(request, "table3"),
        seconds=spent({**chosen_on, **results}.values()),
        views=_views(settings, rows),
        summary=f"{int((rows['seeds'] > 0).sum())} of {len(rows)} cells measured",
    )


def _cell(
    request: Request, settings: Table3Settings, problem: Problem, method: Method, source: Source
) -> _Cell:
    quick = settings.quick if request.quick else None
    count = request.seeds or (quick.seeds if quick else problem.seeds)
    epochs = request.epochs or (quick.epochs if quick else problem.epochs)
    base = problem.config(request, epochs).model_copy(
        update={"data": source.folder, "checksum": source.checksum}
    )
    if quick and problem.dataset not in BUILT_IN:
        fewer = min(quick.train_samples, problem.train_samples or quick.train_samples)
        base = base.model_copy(update={"train_samples": fewer})
    update: dict[str, object] = {}
    if problem.choosing_samples is not None:
        update["train_samples"] = problem.choosing_samples
    if problem.choosing_epochs is not None:
        update["epochs"] = min(problem.choosing_epochs, epochs)
    tried = method.tried(problem)[:1] if quick else method.tried(problem)
    seeds, choosing = settings.seeds_of(problem, count)
    return _Cell(
        problem,
        method,
        source,
        seeds,
        choosing,
        base,
        base.model_copy(update=update),
        tried,
    )


def _check(cells: Sequence[_Cell]) -> None:
    """Refuse what can't be trained before hours of training."""
    for cell in {cell.problem.name: cell for cell in cells}.values():
        contender = cell.method.contender(cell.problem.architecture, cell.tried[0])
        try:
            check(configure(cell.base, contender, cell.tried[0].lr, cell.seeds[0]))
        except ValueError as error:
            raise SettingsError(f"table3, {cell.problem.name}: {error}") from error


def _rows(cells: Sequence[_Cell]) -> list[dict[str, object]]:
    first = {cell.problem.name: cell for cell in reversed(cells)}
    return [_row(cell, first[cell.problem.name]) for cell in cells]


def _row(cell: _Cell, reference: _Cell) -> dict[str, object]:
    own = [100 * r.test_accuracy for r in cell.results if r is not None]
    summary = summarise(own, higher_is_better=True)
    pairs = [
        (100 * r.test_accuracy, 100 * other.test_accuracy)
        for r, other in zip(cell.results, reference.results, strict=False)
        if r is not None and other is not None and cell is not reference
    ]
    apart = paired([a for a, _ in pairs], [b for _, b in pairs])
    verdict = UNPUBLISHED if own else f"not run: {cell.reason or 'nothing stored'}"
    chosen = cell.chosen if own else None
    options = {} if chosen is None else chosen.options
    return {
        "problem": cell.problem.name,
        "data": cell.source.origin,
        "method": cell.method.label,
        "published": math.nan,
        "measured": summary.mean,
        "sd": summary.sd,
        "seeds": summary.seeds,
        "worst": summary.worst,
        "difference": apart.mean,
        "low": apart.low,
        "high": apart.high,
        "verdict": verdict,
        "lr": math.nan if chosen is None else chosen.lr,
        "options": ", ".join(f"{k}={v}" for k, v in options.items()),
        "tried": len(cell.tried) if not cell.reason else 0,
        "epochs": cell.base.epochs,
        "train_samples": cell.base.train_samples or "all",
        "diverged": sum(r.diverged for r in cell.results if r is not None),
    }


def _title(row: pd.Series) -> str:
    """Name of a problem, with its data's origin where that is not the complete original."""
    part = "" if row["train_samples"] == "all" else f", {row['train_samples']} training samples"
    origin = f" ({row['data']})" if "copy" in str(row["data"]) else ""
    return f"{row['problem']}{origin}{part}"


def _views(settings: Table3Settings, rows: pd.DataFrame) -> tuple[View, ...]:
    accuracy: dict[str, list[str]] = {"method": [m.label for m in settings.method]}
    rates: dict[str, list[str]] = {"method": [m.label for m in settings.method]}
    for _, own in rows.groupby("problem", sort=False):
        title = _title(own.iloc[0])
        accuracy[title] = [_accuracy_text(row) for _, row in own.iterrows()]
        rates[title] = [_rate_text(row) for _, row in own.iterrows()]
    return (
        View(
            "Test accuracy (%): mean ± standard deviation (worst seed; number of seeds)",
            pd.DataFrame(accuracy),
        ),
        View("Chosen rate and options (number of candidates)", pd.DataFrame(rates)),
    )


def _accuracy_text(row: pd.Series) -> str:
    if row["seeds"] == 0:
        return EMPTY
    spread = "" if math.isnan(row["sd"]) else f" ± {row['sd']:.1f}"
    lost = f"; {row['diverged']} diverged" if row["diverged"] else ""
    return f"{row['measured']:.1f}{spread} ({row['worst']:.1f}; {row['seeds']}{lost})"


def _rate_text(row: pd.Series) -> str:
    if row["seeds"] == 0:
        return EMPTY
    options = f", {row['options']}" if row["options"] else ""
    return f"{row['lr']:g}{options} ({row['tried']})"


def _notes(settings: Table3Settings, rows: pd.DataFrame) -> tuple[str, ...]:
    listed = []
    for reason, own in rows[rows["seeds"] == 0].groupby("verdict", sort=False):
        places: dict[str, list[str]] = {}
        for problem, cells in own.groupby("problem", sort=False):
            whole = len(cells) == len(settings.method)
            who = "all methods" if whole else ", ".join(cells["method"])
            places.setdefault(who, []).append(str(problem))
        where = "; ".join(f"{who} on {' / '.join(where)}" for who, where in places.items())
        listed.append(f"- {where}: {reason}")
    missing = "\n".join(listed) if listed else "- none"
    return (
        "**Published** accuracies of this table are not in the source of the published numbers: "
        "the column is empty, and nothing is said about signs. `difference`, `low` and `high` in "
        f"the CSV are against {settings.method[0].label} on the same seeds.",
        "**Choosing**: each method's rate (and what else its candidates vary) is the one with the "
        "best mean test accuracy on the choosing seeds, none of which is in the table. WINE and "
        "DIGITS are split anew by every seed; the other sets have one test part, which the choice "
        "has thus seen, alike for all methods.",
        f"**Empty cells**:\n\n{missing}",
        METHOD,
    )


def _setting(settings: Table3Settings, cells: Sequence[_Cell]) -> str:
    lines = []
    for cell in {c.problem.name: c for c in reversed(cells)}.values():
        net, base, trial = cell.problem, cell.base, cell.choosing_base
        samples = "all" if base.train_samples is None else str(base.train_samples)
        chosen = "all" if trial.train_samples is None else str(trial.train_samples)
        choosing = "nothing is chosen"
        if len(cell.tried) > 1:
            choosing = (
                f"rates chosen on seeds {span(cell.choosing)}, "
                f"epochs: {trial.epochs}, {chosen} training samples"
            )
        lines.append(
            f'- {net.name}: `{net.architecture}`, initialisation "{net.initialisation}", inputs '
            f'scaled "{net.scale}", batch {net.batch}, epochs: {base.epochs}, {samples} training '
            f"samples, seeds {span(cell.seeds)}; {choosing}"
        )
    return "\n".join(reversed(lines))
