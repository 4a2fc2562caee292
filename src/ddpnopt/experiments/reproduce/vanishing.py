# SPDX-License-Identifier: MIT
"""Figs. 6 and 10: vanishing gradients in a deep sigmoid network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from ddpnopt.experiments.records import RunResult
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun, show_number
from ddpnopt.experiments.reproduce.runs import obtain, spent
from ddpnopt.experiments.reproduce.schema import load
from ddpnopt.experiments.reproduce.statistics import METHOD, NOT_RUN, paired, summarise
from ddpnopt.experiments.reproduce.vanishing_plots import Curves, draw
from ddpnopt.experiments.reproduce.vanishing_settings import Method, Sizes, Vanishing, sizes

#: Loss of the best constant output, all classes equally frequent: 1/2 |mu|^2 with |mu| = 10, whose
#: mean over the classes is 0; log 10.
PLATEAU = {"mmc": 50.0, "cross_entropy": math.log(10.0)}
NAMES = {"mmc": "MMC loss", "cross_entropy": "cross-entropy (nats)"}
AS_PUBLISHED, NOT_AS_PUBLISHED, NONE_PUBLISHED = (
    "as published",
    "not as published",
    "none published",
)


@dataclass(frozen=True)
class Trained:
    """A method's runs.

    Attributes:
        method: The method.
        lr: The rate chosen; NaN: none could be.
        search: Mean final training loss on the choosing seeds at each rate; infinite: a run
            diverged.
        results: Runs of the figure's seeds that exist.
    """

    method: Method
    lr: float
    search: dict[float, float]
    results: tuple[RunResult, ...]

    @property
    def losses(self) -> list[float]:
        """Final training losses; infinite where a run diverged."""
        return [math.inf if r.diverged else r.train_loss for r in self.results]

    @property
    def update(self) -> float:
        """Mean norm of an update over all steps, and over the runs that did not diverge."""
        norms = [fmean(e.update_norm for e in r.epochs) for r in self.results if not r.diverged]
        return fmean(norms) if norms else math.nan

    def escaped(self, limit: float) -> int:
        """Number of runs that ended below a loss."""
        return sum(loss < limit for loss in self.losses)


def fig6(request: Request) -> Outcome:
    """Train a deep sigmoid network with the MMC loss (Fig. 6).

    Args:
        request: What the user asked for.

    Returns:
        A row for each method, and one for the ratio of update norms.

    Raises:
        SettingsError: The settings file can't be used, or the seeds reach the choosing seeds.
    """
    return _reproduce(request, "fig6", "Fig. 6: vanishing gradients, MMC loss")


def fig10(request: Request) -> Outcome:
    """Train the same networks with cross-entropy (Fig. 10).

    Args:
        request: What the user asked for.

    Returns:
        As in `fig6`.

    Raises:
        SettingsError: As in `fig6`.
    """
    return _reproduce(request, "fig10", "Fig. 10: vanishing gradients, cross-entropy")


def _reproduce(request: Request, name: str, title: str) -> Outcome:
    settings = load(Vanishing, name, request.settings)
    size = sizes(settings, request)
    trained, seconds = _train(request, settings, size, name)
    limit = settings.escape * PLATEAU[settings.loss]
    rows = pd.DataFrame([*_method_rows(settings, trained, limit), *_ratio_rows(settings, trained)])
    curves = [Curves(t.method.name, t.method.ours, t.results) for t in trained]
    judged = [v for v in rows["verdict"] if v in (AS_PUBLISHED, NOT_AS_PUBLISHED)]
    return Outcome(
        name=name,
        title=title,
        settings=_setting(settings, size, trained),
        rows=rows,
        notes=_notes(settings, trained, limit, len(size.seeds)),
        figure=lambda: draw(curves, NAMES[settings.loss], PLATEAU[settings.loss]),
        quick=request.quick,
        command=rerun(request, name),
        seconds=seconds,
        views=(_view(rows, settings),),
        summary=f"{judged.count(AS_PUBLISHED)} of {len(judged)} claims as published",
    )


def _train(
    request: Request, settings: Vanishing, size: Sizes, name: str
) -> tuple[list[Trained], float]:
    """Choose each method's rate on the choosing seeds, then run the figure's seeds."""
    tried = {
        (number, lr): [
            settings.config(request, method, lr, seed, size.choosing_epochs)
            for seed in size.choosing
        ]
        for number, method in enumerate(settings.method)
        for lr in method.lr
        if len(method.lr) > 1
    }
    found = obtain(request, [c for own in tried.values() for c in own], f"{name}: rates")
    searches: list[dict[float, float]] = []
    for number, method in enumerate(settings.method):
        search = {}
        for lr in method.lr:
            own = [found[c.key] for c in tried.get((number, lr), []) if c.key in found]
            if own:
                losses = [math.inf if r.diverged else r.train_loss for r in own]
                search[lr] = fmean(losses)
        searches.append(search)
    chosen = [_chosen(m, s) for m, s in zip(settings.method, searches, strict=True)]
    configs = [
        []
        if math.isnan(lr)
        else [settings.config(request, method, lr, seed, size.epochs) for seed in size.seeds]
        for method, lr in zip(settings.method, chosen, strict=True)
    ]
    # Seed by seed: an interrupted figure has few seeds of all methods.
    by_seed = [c for same in zip(*[own for own in configs if own], strict=True) for c in same]
    results = obtain(request, by_seed, name)
    trained = [
        Trained(method, lr, search, tuple(results[c.key] for c in own if c.key in results))
        for method, lr, search, own in zip(settings.method, chosen, searches, configs, strict=True)
    ]
    return trained, spent([*found.values(), *results.values()])


def _chosen(method: Method, search: dict[float, float]) -> float:
    if len(method.lr) == 1:
        return method.lr[0]
    return min(search, key=lambda lr: search[lr]) if search else math.nan


def _best_baseline(trained: Sequence[Trained]) -> Trained | None:
    """The baseline with the lowest mean final loss."""
    found = [t for t in trained if not t.method.ours and t.results]
    return min(found, key=lambda t: fmean(t.losses)) if found else None


def _method_rows(
    settings: Vanishing, trained: Sequence[Trained], limit: float
) -> list[dict[str, object]]:
    best = _best_baseline(trained)
    rows = []
    for one in trained:
        loss = summarise(one.losses, higher_is_better=False)
        escaped = one.escaped(limit)
        row: dict[str, object] = {
            "method": one.method.name,
            "quantity": "final training loss",
            "published": one.method.published or "",
            "measured": loss.mean,
            "sd": loss.sd,
            "seeds": loss.seeds,
            "worst": loss.worst,
            "verdict": _verdict(one, escaped),
            "lr": one.lr,
            "diverged": loss.diverged,
            "escaped": escaped if one.results else math.nan,
            "test_accuracy": 100 * fmean(r.test_accuracy for r in one.results)
            if one.results
            else math.nan,
            "update_norm": one.update,
        }
        if one.method.ours and best is not None and one.results:
            difference = _against(one, best)
            row |= {"difference": difference[0], "low": difference[1], "high": difference[2]}
        rows.append(row)
    return rows


def _against(one: Trained, best: Trained) -> tuple[float, float, float]:
    """Mean and interval of the paired difference in final loss, on the seeds that both have."""
    other = {r.config.seed: loss for r, loss in zip(best.results, best.losses, strict=True)}
    pairs = [
        (loss, other[r.config.seed])
        for r, loss in zip(one.results, one.losses, strict=True)
        if r.config.seed in other
    ]
    found = paired([a for a, _ in pairs], [b for _, b in pairs])
    return found.mean, found.low, found.high


def _verdict(one: Trained, escaped: int) -> str:
    """A claim holds when more than half of the seeds agree."""
    if not one.results:
        return NOT_RUN
    if one.method.published is None:
        return NONE_PUBLISHED
    does = 2 * escaped > len(one.results)
    return AS_PUBLISHED if does == (one.method.published == "escapes") else NOT_AS_PUBLISHED


def _ratio_rows(settings: Vanishing, trained: Sequence[Trained]) -> list[dict[str, object]]:
    """The update norm of each variant over the largest of the baselines."""
    norms = [t.update for t in trained if not t.method.ours and not math.isnan(t.update)]
    largest = max(norms) if norms else math.nan
    bounds = settings.update_ratio
    rows = []
    for one in (t for t in trained if t.method.ours):
        ratio = one.update / largest if largest else math.nan
        verdict = NONE_PUBLISHED
        if math.isnan(ratio):
            verdict = NOT_RUN
        elif bounds is not None:
            verdict = AS_PUBLISHED if bounds[0] <= ratio <= bounds[1] else NOT_AS_PUBLISHED
        rows.append(
            {
                "method": one.method.name,
                "quantity": "update norm / largest baseline's",
                "published": "" if bounds is None else f"{bounds[0]:g} to {bounds[1]:g}",
                "measured": ratio,
                "seeds": len(one.results),
                "verdict": verdict,
            }
        )
    return rows


def _view(rows: pd.DataFrame, settings: Vanishing) -> View:
    lines = []
    for row in rows.to_dict("records"):
        loss = row["quantity"] == "final training loss"
        lines.append(
            {
                "method": row["method"],
                "quantity": row["quantity"],
                "published": row["published"] or EMPTY,
                "measured": _with_sd(row["measured"], row.get("sd")),
                "worst seed": show_number(float(row.get("worst", math.nan)), 3),
                "less the best baseline": _interval(row),
                "escaped": f"{row['escaped']:.0f} of {row['seeds']:.0f}"
                if loss and row["seeds"]
                else EMPTY,
                "test accuracy (%)": show_number(float(row.get("test_accuracy", math.nan)), 3),
                "update norm": show_number(float(row.get("update_norm", math.nan)), 3),
                "lr": show_number(float(row.get("lr", math.nan)), 3),
                "verdict": row["verdict"],
            }
        )
    return View(f"Final {NAMES[settings.loss]} over the training part", pd.DataFrame(lines))


def _with_sd(mean: float, sd: float | None) -> str:
    shown = show_number(float(mean), 3)
    return shown if sd is None or sd != sd else f"{shown} ± {sd:.2g}"


def _interval(row: dict[str, float]) -> str:
    mean = row.get("difference", math.nan)
    if mean != mean:
        return EMPTY
    if row["low"] != row["low"]:  # one seed has no interval
        return f"{mean:+.3g}"
    return f"{mean:+.3g} ({row['low']:+.3g} to {row['high']:+.3g})"


def _notes(
    settings: Vanishing, trained: Sequence[Trained], limit: float, seeds: int
) -> tuple[str, ...]:
    plateau = PLATEAU[settings.loss]
    said = [
        f"{t.method.name}: {t.escaped(limit)} of {len(t.results)}" for t in trained if t.results
    ]
    return (
        f"**What to see**: whether the loss leaves the dotted line, {plateau:.3g}, the loss of the "
        f"best constant output. A run has escaped when it ends below {limit:.3g}; a claim holds "
        "when more than half of the seeds agree. Escaped: "
        + ("; ".join(said) if said else "nothing has been run")
        + ". Bands: lowest to highest seed, lines: means.",
        "**Update norm**: |u_new - u_old| over all parameters, mean over the steps of an epoch; in "
        "the table over all epochs. The source says that DDPNOpt's is 5 to 10 times larger with "
        "the MMC loss, not at which stage: once a network has escaped, its updates are larger "
        "whatever the method.",
        METHOD,
    )


def _setting(settings: Vanishing, size: Sizes, trained: Sequence[Trained]) -> str:
    net = settings.network
    lines = [
        f"- data: {net.dataset}, {net.test_share:.0%} held out by class, inputs scaled "
        f'"{net.scale}"',
        f'- network: `{net.architecture}`, initialisation "{net.initialisation}", '
        f"{NAMES[settings.loss]}",
        f"- batch {net.batch}, {size.epochs} epochs, seeds {_span(size.seeds)}",
        "- rates: for each method the one with the lowest mean training loss after "
        f"{size.choosing_epochs} epochs on seeds {_span(size.choosing)}, of those listed",
    ]
    for one in trained:
        options = ", ".join(f"{k} = {v}" for k, v in one.method.options.items())
        tried = ", ".join(
            f"{lr:g}" + (f" (loss {one.search[lr]:.3g})" if lr in one.search else "")
            for lr in one.method.lr
        )
        chosen = EMPTY if math.isnan(one.lr) else f"{one.lr:g}"
        lines.append(
            f"- {one.method.name}: `{one.method.optimizer}`"
            f"{f' ({options})' if options else ''}, lr {chosen} of {tried}"
        )
    return "\n".join(lines)


def _span(seeds: Sequence[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
