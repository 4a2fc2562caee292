# SPDX-License-Identifier: MIT
"""Fig. 4: (a) baseline minus twin in training loss, (b) mean and spread of training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ddpnopt.experiments.plots import COLOURS
from ddpnopt.experiments.records import RunResult
from ddpnopt.experiments.reproduce.ablation import (
    BASELINE,
    CLIPPED,
    DEFAULTS,
    METHODS,
    PAPER,
    Measured,
    measure,
    rows,
)
from ddpnopt.experiments.reproduce.ablation_settings import Contender, CurvesBlock, Fig4Settings
from ddpnopt.experiments.reproduce.describe import (
    closeness,
    count_note,
    setting,
    short_summary,
)
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun
from ddpnopt.experiments.reproduce.schema import load
from ddpnopt.experiments.reproduce.statistics import DIVERGED, METHOD, summarise

CONVENTION = "baseline minus twin in training loss (positive: the twin is lower)"
HEAT_MAP, CURVE = "heat map", "curve"


def fig4(request: Request) -> Outcome:
    """Heat maps over rate and eps_Vxx, and training curves at one rate of each block.

    Args:
        request: What the user asked for.

    Returns:
        Rows of both parts (column `part`); the figure.
    """
    settings = load(Fig4Settings, "fig4", request.settings)
    measured = measure(request, settings, "fig4")
    cells = rows(measured, "ablation")
    losses = cells[cells["measure"] == "train_loss"]
    heat = _heat_rows(losses)
    curves = _curve_rows(measured, settings.block)
    return Outcome(
        name="fig4",
        title="Fig. 4: where the twin's training loss is lower, and training curves, "
        f"{measured.base.dataset.upper()}",
        settings=setting(measured),
        rows=pd.concat([heat, curves], ignore_index=True) if len(curves) else heat,
        notes=(*_notes(settings.block), count_note(cells), closeness(losses), METHOD, DIVERGED),
        figure=lambda: draw(heat, curves, settings.block, measured),
        quick=request.quick,
        command=rerun(request, "fig4"),
        seconds=measured.seconds,
        views=_views(heat, settings.block),
        summary=short_summary(cells),
    )


def _notes(blocks: Sequence[CurvesBlock]) -> tuple[str, ...]:
    listed = "; ".join(
        f"{b.label} at rate {b.curve_lr:g}, the paper's algorithm with eps_Vxx {b.curve_eps_vxx:g}"
        for b in blocks
    )
    return (
        f"**(a) Convention**: a cell is {CONVENTION}, as the paper prints it; in this result's "
        "rows `published`, `measured`, `difference`, `low` and `high` are all that way round. The "
        "last column, set apart, is the library's default, which has no eps_Vxx and is not in the "
        "paper. Cells whose interval contains 0 have a dot.",
        "**(b) Curves**: training loss over the training part after each epoch; line: mean over "
        f"the seeds; band: mean ± one standard deviation. {listed}.",
    )


def _heat_rows(losses: pd.DataFrame) -> pd.DataFrame:
    """Twin cells, turned to baseline - twin."""
    twins = losses[losses["method"] != BASELINE].copy()
    low, high = -twins["high"], -twins["low"]
    is_paper = twins["method"] == PAPER
    frame = pd.DataFrame(
        {
            "part": HEAT_MAP,
            **{name: twins[name] for name in ("baseline", "lr", "method", "eps_vxx", "clip")},
            "published": (-twins["published_difference"]).where(is_paper),
            "measured": -twins["difference"],
            "sd": twins["difference_sd"],
            "seeds": twins["pairs"],
            "worst": -twins["difference_worst"],
            "difference": -twins["difference"],
            "low": low,
            "high": high,
            "verdict": twins["verdict"],
            "convention": "baseline - twin",
            "diverged": twins["diverged"],
        }
    )
    return frame.reset_index(drop=True)


def _contenders(block: CurvesBlock, clip: float | None) -> dict[str, Contender]:
    eps = min(block.eps_vxx, key=lambda e: abs(e - block.curve_eps_vxx))
    found = {BASELINE: block.baseline_run, PAPER: block.paper(eps), DEFAULTS: block.defaults}
    return found if clip is None else {**found, CLIPPED: block.clipped(clip)}


def _curve_rows(measured: Measured, blocks: Sequence[CurvesBlock]) -> pd.DataFrame:
    """One row per block, method and epoch."""
    found = []
    for block in blocks:
        lr = min(block.lr, key=lambda rate: abs(rate - block.curve_lr))
        for method, contender in _contenders(block, measured.clips.get(block.baseline)).items():
            runs = [r for r in measured.of(contender, lr) if r is not None]
            for number in range(measured.sizes.epochs if runs else 0):
                summary = summarise([_at(r, number) for r in runs], higher_is_better=False)
                found.append(
                    {
                        "part": CURVE,
                        "baseline": block.baseline,
                        "lr": lr,
                        "method": method,
                        "epoch": number + 1,
                        "measured": summary.mean,
                        "sd": summary.sd,
                        "seeds": summary.seeds,
                        "worst": summary.worst,
                        "diverged": summary.diverged,
                    }
                )
    return pd.DataFrame(found)


def _at(result: RunResult, number: int) -> float:
    """Training loss after an epoch; infinite from where the run diverged."""
    if number < len(result.epochs) and not (result.diverged and number == len(result.epochs) - 1):
        return result.epochs[number].train_loss
    return math.inf


def _views(heat: pd.DataFrame, blocks: Sequence[CurvesBlock]) -> tuple[View, ...]:
    found = []
    for block in blocks:
        lines = []
        for lr in block.lr:
            own = heat[(heat["baseline"] == block.baseline) & (heat["lr"] == lr)]
            shows: list[tuple[str, Callable[[Any], str]]] = [
                ("published", lambda r: _signed(r.published)),
                ("measured", lambda r: _signed(r.measured) + _spread(r.sd)),
                ("worst seed", lambda r: _signed(r.worst)),
                ("interval", lambda r: _ends(r.low, r.high)),
                ("verdict", lambda r: str(r.verdict)),
            ]
            for title, show in shows:
                cells = {_head(r): show(r) for r in own.itertuples(index=False)}
                lines.append({"lr": f"{lr:g}", "": title, **cells})
        caption = f"{block.label}, M = {block.curvature}: {CONVENTION}"
        found.append(View(caption, pd.DataFrame(lines)))
    return tuple(found)


def _signed(number: float) -> str:
    return EMPTY if math.isnan(number) else f"{number:+.4f}"


def _spread(sd: float) -> str:
    return "" if math.isnan(sd) else f" ± {sd:.4f}"


def _ends(low: float, high: float) -> str:
    return EMPTY if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"


def _head(row: Any) -> str:
    if row.method == PAPER:
        return f"paper, eps {row.eps_vxx:g}"
    return str(row.method)


def draw(
    heat: pd.DataFrame, curves: pd.DataFrame, blocks: Sequence[CurvesBlock], measured: Measured
) -> Figure:
    """Draw published and measured heat maps above each other, and the curves below.

    Args:
        heat: Rows of part (a).
        curves: Rows of part (b).
        blocks: A column each.
        measured: The runs, for the number of seeds.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.4 * len(blocks), 11.5), layout="constrained")
    grid = figure.subplots(3, len(blocks), squeeze=False)
    for column, block in enumerate(blocks):
        own = heat[heat["baseline"] == block.baseline]
        largest = _reach(own)
        for line, what in enumerate(("published", "measured")):
            image = _heat(grid[line][column], own, block, what, largest)
        bar = figure.colorbar(
            image, ax=list(grid[:2, column]), shrink=0.85, pad=0.02, extend="both"
        )
        bar.set_label(CONVENTION, fontsize=8.5)
        _curves(grid[2][column], curves, block, measured)
    seeds = len(measured.sizes.seeds)
    figure.suptitle(
        f"Fig. 4 on {measured.base.dataset.upper()}: published (10 seeds) and measured ({seeds} "
        "seeds; a dot: the interval contains 0)"
    )
    return figure


def _reach(own: pd.DataFrame) -> float:
    """End of a block's colour scale: cells beyond it, which have their number, share its colour."""
    # The paper's algorithm alone, and few times what is printed: one large difference would leave
    # no colour for the rest.
    paper = own[own["method"] == PAPER]
    ends = [
        float(np.abs(finite).max()) if (finite := values[np.isfinite(values)]).size else 0.0
        for values in (paper[name].to_numpy(dtype=float) for name in ("published", "measured"))
    ]
    printed, measured = ends
    return min(measured, _MOST_COLOUR * printed) if 0.0 < printed < measured else max(ends) or 1.0


#: Colours reach to so many times the largest printed difference.
_MOST_COLOUR = 3.0


def _heat(axis: Axes, own: pd.DataFrame, block: CurvesBlock, what: str, largest: float) -> Any:
    """One heat map: rates down, eps_Vxx across; the measured one with the defaults set apart."""
    columns: list[tuple[str, float]] = [(PAPER, eps) for eps in block.eps_vxx]
    names = [f"{eps:g}" for eps in block.eps_vxx]
    if what == "measured":
        columns += [("", math.nan), (DEFAULTS, math.nan)]
        names += ["", "defaults"]
    values = np.full((len(block.lr), len(columns)), math.nan)
    for line, lr in enumerate(block.lr):
        for column, (method, eps) in enumerate(columns):
            cell = own[(own["lr"] == lr) & (own["method"] == method)]
            cell = cell[cell["eps_vxx"] == eps] if method == PAPER else cell
            if cell.empty:
                continue
            number = float(cell.iloc[0][what])
            values[line, column] = number
            low, high = cell.iloc[0]["low"], cell.iloc[0]["high"]
            unsure = what == "measured" and not (low > 0 or high < 0)
            _write(axis, line, column, number, largest, unsure)
    image = axis.imshow(
        values, cmap="RdBu", norm=TwoSlopeNorm(0.0, -largest, largest), aspect="auto"
    )
    axis.set_xticks(range(len(columns)), names)
    axis.set_yticks(range(len(block.lr)), [f"{lr:g}" for lr in block.lr])
    axis.set(xlabel="eps_Vxx of the paper's algorithm", ylabel="learning rate")
    axis.set_title(f"{block.label}, M = {block.curvature}: {what}")
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
    return image


def _write(axis: Axes, line: int, column: int, number: float, largest: float, unsure: bool) -> None:
    if math.isnan(number):
        axis.text(column, line, EMPTY, ha="center", va="center", fontsize=9)
        return
    # White on dark cells, black on pale ones.
    colour = "white" if abs(number) > 0.6 * largest else "black"
    text = f"{number:+.3f}" + ("\n•" if unsure else "")
    axis.text(column, line, text, ha="center", va="center", fontsize=9, color=colour)


def _curves(axis: Axes, curves: pd.DataFrame, block: CurvesBlock, measured: Measured) -> None:
    """Mean line and a band of one standard deviation."""
    own = curves[curves["baseline"] == block.baseline] if len(curves) else curves
    for number, method in enumerate((BASELINE, PAPER, DEFAULTS, CLIPPED)):
        line = own[own["method"] == method] if len(own) else own
        if line.empty:
            continue
        name = block.label if method == BASELINE else METHODS[method]
        if method == PAPER:
            name += f", eps {block.curve_eps_vxx:g}"
        if method == CLIPPED:
            name = f"{block.label}, clipped at {measured.clips[block.baseline]:g}"
        epochs, mean = line["epoch"].to_numpy(), line["measured"].to_numpy()
        sd = line["sd"].fillna(0.0).to_numpy()
        style = "--" if method in (BASELINE, CLIPPED) else "-"
        axis.plot(
            epochs, mean, style, marker="o", markersize=3.5, color=COLOURS[number], label=name
        )
        axis.fill_between(
            epochs, mean - sd, mean + sd, color=COLOURS[number], alpha=0.15, linewidth=0
        )
    axis.set(xlabel="epoch", ylabel="training loss (nats)")
    axis.set_ylim(bottom=0.0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlim(0.5, measured.sizes.epochs + 0.5)
    axis.set_title(f"{block.label} at rate {block.curve_lr:g}: mean and one standard deviation")
    axis.grid(alpha=0.25)
    if axis.has_data():
        axis.legend(frameon=False, fontsize=8.5)
