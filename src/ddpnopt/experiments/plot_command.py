# SPDX-License-Identifier: MIT
"""The command `ddpnopt plot`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from rich.console import Console

from ddpnopt.experiments.heat_maps import draw_heat_map, heat_map, with_option
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import OPTIMIZERS, OptionValue
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce.outcome import QUICK, Request
from ddpnopt.experiments.reproduce.policies import look_at
from ddpnopt.experiments.reproduce.policy_plots import draw
from ddpnopt.experiments.reproduce.policy_settings import Policies
from ddpnopt.experiments.reproduce.schema import load
from ddpnopt.experiments.selection import read_runs, refuse_mixtures, select, store_file
from ddpnopt.experiments.specs import parse_option
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.stored_plots import (
    FORMATS,
    Metric,
    draw_curves,
    draw_rates,
    save,
)

EPILOG = (
    "Example: [bold]ddpnopt plot rates --store results/compare --dataset digits --out rates.svg[/]"
    ", or [bold]ddpnopt plot heatmap --store results --optimizer ddpnopt --arch "
    "mlp-24x5-tanh --where curvature=identity --baseline sgd[/]"
)


class Kind(StrEnum):
    """What can be drawn."""

    curves = "curves"
    heatmap = "heatmap"
    rates = "rates"
    feedback = "feedback"


class Measure(StrEnum):
    """What of a run is drawn."""

    loss = "loss"
    accuracy = "accuracy"


_Kind = Annotated[Kind, typer.Argument(help="What to draw.")]
_Store = Annotated[
    Path, typer.Option("--store", help="Store, or folder of reproduce, compare or train.")
]
_Dataset = Annotated[
    list[str] | None, typer.Option("--dataset", "-d", help="Only this data set; repeatable.")
]
_Arch = Annotated[
    list[str] | None, typer.Option("--arch", "-a", help="Only this network; repeatable.")
]
_Optimizer = Annotated[
    list[str] | None, typer.Option("--optimizer", "-m", help="Only this optimizer; repeatable.")
]
_Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="KEY=VALUE",
        help="Only runs with this setting or optimizer's option (epochs=5, lr=0.1, "
        "value.strength=1); repeatable, several values of one key are alternatives.",
    ),
]
_Measure = Annotated[
    Measure | None, typer.Option("--metric", help="Not given: what the kind usually shows.")
]
_By = Annotated[
    str, typer.Option("--by", metavar="OPTION", help="Heat map: option along the horizontal axis.")
]
_Baseline = Annotated[
    str | None,
    typer.Option("--baseline", help="Heat map: draw this optimizer minus --optimizer."),
]
_Versions = Annotated[
    bool, typer.Option("--all-versions", help="Runs of other versions of the code, too.")
]
_Out = Annotated[
    Path | None, typer.Option("--out", "-o", help=f"File to write: {', '.join(FORMATS)}.")
]


def plot_command(
    kind: _Kind,
    store: _Store = Path("results/store.sqlite"),
    dataset: _Dataset = None,
    arch: _Arch = None,
    optimizer: _Optimizer = None,
    where: _Where = None,
    metric: _Measure = None,
    by: _By = "value.regularization",
    baseline: _Baseline = None,
    all_versions: _Versions = False,
    out: _Out = None,
) -> None:
    """Draw stored runs: curves, accuracy over the learning rate, heat maps, feedback images."""
    path = out or Path(f"results/{kind}.png")
    try:
        if path.suffix not in FORMATS:
            raise ValueError(f"--out {path}: write a {', '.join(FORMATS)} file")
        for name in [*(optimizer or []), *([baseline] if baseline else [])]:
            lookup(OPTIMIZERS, name, "optimizer")
        wanted: dict[str, list[OptionValue]] = {}
        for key, value in (parse_option(text) for text in where or []):
            wanted.setdefault(key, []).append(value)
        for key, names in (("dataset", dataset), ("architecture", arch)):
            if names:
                wanted.setdefault(key, []).extend(names)
        if kind is Kind.feedback:
            if optimizer:
                wanted["optimizer"] = list(optimizer)
            figure = _feedback(store, wanted)
        else:
            runs = read_runs(store, all_versions=all_versions)
            figure = _figure(kind, runs, wanted, optimizer, metric, by, baseline)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    written = save(figure, path)
    Console().print(f"written: {written}", soft_wrap=True, highlight=False)


def _figure(
    kind: Kind,
    runs: list[RunResult],
    wanted: dict[str, list[OptionValue]],
    optimizer: list[str] | None,
    metric: Measure | None,
    by: str,
    baseline: str | None,
) -> Figure:
    own: dict[str, list[OptionValue]] = {"optimizer": list(optimizer)} if optimizer else {}
    chosen = select(runs, {**wanted, **own})
    if kind is Kind.heatmap:
        chosen = with_option(chosen, by)
    refuse_mixtures(chosen)
    shown: Metric | None = None if metric is None else metric.value
    if kind is Kind.curves:
        return draw_curves(chosen, ("loss", "accuracy") if shown is None else (shown,))
    if kind is Kind.rates:
        return draw_rates(chosen, shown or "accuracy")
    rival = None
    if baseline is not None:
        # Options in --where are the optimizer's; the baseline has others.
        shared = {key: values for key, values in wanted.items() if _is_shared(key)}
        rival = _plain(select(runs, {**shared, "optimizer": [baseline]}))
        refuse_mixtures([*chosen, *rival])
    return draw_heat_map(heat_map(chosen, by, shown or "loss", rival))


def _plain(runs: list[RunResult]) -> list[RunResult]:
    """A baseline's runs without what others of its runs add, such as the clipping of Table 6."""
    fewest = min((r.config.options for r in runs), key=len, default={})
    if all(fewest.items() <= r.config.options.items() for r in runs):
        return [r for r in runs if r.config.options == fewest]
    return runs


def _is_shared(key: str) -> bool:
    return key in RunConfig.model_fields


def _feedback(store: Path, wanted: dict[str, list[OptionValue]]) -> Figure:
    """Draw the gain matrices' singular vectors that `ddpnopt reproduce fig5` or `fig7` kept."""
    unknown = sorted(set(wanted) - {"dataset", "architecture", "optimizer", "epochs"})
    if unknown:
        raise ValueError(f"feedback images are not told apart by {', '.join(unknown)}")
    request = Request(out=store.parent, store=SqliteStore(store_file(store)), run=False)
    there: list[str] = []
    asked = wanted.pop("epochs", [])
    lengths: list[int | None] = [n for n in asked if isinstance(n, int)]
    if len(lengths) < len(asked):
        raise ValueError(f"--where epochs={asked[0]}: give a whole number")
    lengths = lengths or [None]
    made = itertools.product((False, True), lengths, ("fig5", "fig7"))
    for quick, epochs, name in made:
        settings = load(Policies, name)
        own = replace(request, quick=quick, epochs=epochs)
        looks = [look_at(own, settings, p) for p in settings.problem]
        chosen: list[tuple[str, list[dict[str, Any]]]] = []
        for look in looks:
            if look.payload is None:
                continue
            known = {
                "dataset": look.problem.dataset,
                "architecture": settings.architecture,
                "optimizer": settings.optimizer,
            }
            there.append(f"{', '.join(known.values())} ({name}{', quick' if quick else ''})")
            if all(known[key] in values for key, values in wanted.items()):
                chosen.append((look.title, look.payload["samples"]))
        if chosen:
            figure = draw(chosen)
            if quick:
                figure.text(0.005, 0.995, QUICK, color="#B00020", va="top", fontsize=9)
            return figure
    raise ValueError(
        "no such feedback images are stored; there: "
        + ("; ".join(there) or "none. `ddpnopt reproduce fig5` makes them")
        + ("" if lengths != [None] else "; those of `--epochs N` are found by --where epochs=N")
    )
