# SPDX-License-Identifier: MIT
"""Table 4 (how the cost of a step grows) and Fig. 3 (what it is), measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import Progress
from scipy import stats

from ddpnopt.experiments.reproduce import cost_plots
from ddpnopt.experiments.reproduce.cost_settings import (
    AXES,
    LETTERS,
    Axis,
    Exponents,
    Figure3,
    GrowingMethod,
    Table4,
)
from ddpnopt.experiments.reproduce.kept import kept
from ddpnopt.experiments.reproduce.outcome import EMPTY, Outcome, Request, View, rerun, show_number
from ddpnopt.experiments.reproduce.schema import load
from ddpnopt.experiments.reproduce.step_cost import Cost, Task, machine, measure

MODULE = "ddpnopt.experiments.reproduce.step_cost"
QUANTITIES = ("time", "memory")
AGREES, FASTER, SLOWER = "as published", "grows faster", "grows slower"
NOT_PUBLISHED, NOT_MEASURED = "none published", "not measured"

PROTOCOL = (
    "CPU time, one thread; all methods in turn, round after round, each chunk at least 20 ms "
    "long; the fastest of {rounds} chunks counts. EKFAC's chunks hold its decompositions (every "
    "tenth step). Time: backward pass and update. Memory: parameters, optimizer state, and the "
    "peak of the tensors that a step allocates, the forward pass's activations among them."
)


def _taken(
    request: Request, name: str, tasks: Sequence[Task], rounds: int, memory: bool
) -> dict[str, Any] | None:
    """Costs of tasks, kept under their settings; None where they have not been measured."""

    def make() -> dict[str, Any]:
        console = request.console or Console(stderr=True)
        with Progress(console=console) as progress:
            shown = progress.add_task(name, total=max(rounds, 1) * len(tasks))
            found = measure(tasks, rounds, memory=memory, advance=lambda: progress.advance(shown))
            progress.update(shown, completed=max(rounds, 1) * len(tasks))
        return {"machine": machine(), "costs": [cost.model_dump() for cost in found]}

    setting = {"tasks": [asdict(task) for task in tasks], "rounds": rounds, "memory": memory}
    return kept(request, "cost", setting, MODULE, make)


def _costs(payload: dict[str, Any] | None) -> list[Cost]:
    return [] if payload is None else [Cost(**cost) for cost in payload["costs"]]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit cost = c size^e.

    Args:
        sizes: Two or more.
        costs: The cost at each.

    Returns:
        e, the least-squares slope of log cost over log size, and the slope between the two
        largest sizes.
    """
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return float(stats.linregress(x, y).slope), (y[-1] - y[-2]) / (x[-1] - x[-2])


def judge(measured: float, bounds: tuple[float, float] | None, tolerance: float) -> str:
    """Compare a measured exponent with the published one.

    Args:
        measured: NaN: not measured.
        bounds: Published lowest and highest value; None: none.
        tolerance: Allowed on both sides.

    Returns:
        "as published", "grows faster", "grows slower", "none published" or "not measured".
    """
    if math.isnan(measured):
        return NOT_MEASURED
    if bounds is None:
        return NOT_PUBLISHED
    if measured > bounds[1] + tolerance:
        return FASTER
    return SLOWER if measured < bounds[0] - tolerance else AGREES


def _bounds(settings: Table4, method: GrowingMethod, quantity: str, axis: Axis) -> Any:
    if method.published is None:
        return None
    exponents: Exponents | None = getattr(settings.published[method.published], quantity)
    return None if exponents is None else getattr(exponents, axis)


def _range(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return ""
    return f"{bounds[0]:g}" if bounds[0] == bounds[1] else f"{bounds[0]:g} to {bounds[1]:g}"


def _row(
    settings: Table4, method: GrowingMethod, quantity: str, axis: Axis, costs: Sequence[Cost]
) -> dict[str, object]:
    bounds = _bounds(settings, method, quantity, axis)
    own = [c for c in costs if c.method == method.name]
    values = [c.backward if quantity == "time" else c.mib for c in own]
    complete = len(own) > 1 and None not in values
    sizes = [float(getattr(c, axis)) for c in own]
    fit, last = (
        exponent(sizes, [float(v) for v in values if v]) if complete else (math.nan, math.nan)
    )
    refused = next((c.refused for c in own if c.refused), "")
    return {
        "method": method.name,
        "cost": quantity,
        "in": LETTERS[axis],
        "published": _range(bounds),
        "measured": fit,
        "difference": math.nan if bounds is None else fit - min(max(fit, bounds[0]), bounds[1]),
        "verdict": f"not measured: {refused}"
        if refused
        else judge(fit, bounds, settings.tolerance),
        "last_two": last,
        "sizes": " ".join(f"{size:g}" for size in sizes),
        "costs": " ".join(EMPTY if v is None else f"{v:.4g}" for v in values),
        "unit": "ms" if quantity == "time" else "MiB",
    }


def table4(request: Request) -> Outcome:
    """Measure how time and memory of a step grow with batch, width and depth (Table 4).

    Args:
        request: What the user asked for; seeds and epochs have no meaning here.

    Returns:
        An exponent for each method, cost and size.

    Raises:
        SettingsError: The settings file can't be used.
    """
    settings = load(Table4, "table4", request.settings)
    rounds = settings.quick.rounds if request.quick else settings.rounds
    most = settings.quick.sizes if request.quick else None
    rows: list[dict[str, object]] = []
    payloads = []
    curves: list[tuple[str, Axis, list[Cost]]] = []
    for quantity in QUANTITIES:
        for axis in AXES:
            tasks = [
                method.task(*size)
                for method in settings.method
                for size in getattr(method, quantity).along(axis, most)
            ]
            timed = rounds if quantity == "time" else 0
            title = f"{quantity} in {LETTERS[axis]}"
            payload = _taken(request, title, tasks, timed, quantity == "memory")
            payloads.append(payload)
            costs = _costs(payload)
            curves.append((quantity, axis, costs))
            rows += [_row(settings, m, quantity, axis, costs) for m in settings.method]
    frame = pd.DataFrame(rows)
    verdicts = list(frame["verdict"])
    judged = [v for v in verdicts if v in (AGREES, FASTER, SLOWER)]
    agree = judged.count(AGREES)
    return Outcome(
        name="table4",
        title="Table 4: how time and memory of the backward pass grow",
        settings=_table4_setting(settings, rounds, payloads),
        rows=frame,
        notes=_table4_notes(settings),
        figure=lambda: cost_plots.growth(curves, [m.name for m in settings.method]),
        quick=request.quick,
        command=rerun(request, "table4"),
        seconds=_seconds(payloads),
        views=tuple(_growth_view(settings, frame, quantity) for quantity in QUANTITIES),
        summary=f"{agree} of {len(judged)} measured exponents as published "
        f"(within {settings.tolerance:g})",
    )


def _growth_view(settings: Table4, frame: pd.DataFrame, quantity: str) -> View:
    """Rows methods, columns B, X, L: measured (published)."""
    lines = []
    for method in settings.method:
        line = {"method": method.name}
        for axis in AXES:
            letter = LETTERS[axis]
            at = (frame["method"] == method.name) & (frame["cost"] == quantity)
            row = frame[at & (frame["in"] == letter)].iloc[0]
            mark = {FASTER: " ↑", SLOWER: " ↓"}.get(row["verdict"], "")
            line[f"{letter} measured"] = show_number(float(row["measured"]), 3) + mark
            line[f"{letter} published"] = row["published"] or EMPTY
        lines.append(line)
    what = "Time of the backward pass and the update" if quantity == "time" else "Memory of a step"
    return View(f"{what}: exponents", pd.DataFrame(lines))


def _table4_notes(settings: Table4) -> tuple[str, ...]:
    return (
        f"↑ and ↓: grows faster or slower than published by more than {settings.tolerance:g}. The "
        "published exponent of a sum of terms is a range. Where the source states no growth the "
        "published column is empty. `last_two` in the CSV is the slope between the two largest "
        "sizes: a fixed cost per operation flattens the exponents of small sizes.",
        "The published memory of first-order methods, X² L, leaves out the activations B X L that "
        "every forward pass keeps. They are counted here; the first-order sizes have B well below "
        "X, where the weights dominate.",
        "Vanilla DDP writes out its layers' maps, of X² weights, beside the (B X)³ of its "
        "recursion, so that it may grow faster in X than the recursion alone.",
    )


def _table4_setting(settings: Table4, rounds: int, payloads: Sequence[Any]) -> str:
    lines = [PROTOCOL.format(rounds=rounds), _machine(payloads), "Sizes:"]
    for method in settings.method:
        sizes = []
        for quantity in QUANTITIES:
            grid = getattr(method, quantity)
            axes = ", ".join(f"{LETTERS[a]} {list(getattr(grid, a))}" for a in AXES)
            sizes.append(f"{quantity} {axes} around (B, X, L) = {grid.base}")
        lines.append(f"- {method.name}: {'; '.join(sizes)}")
    return "\n\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:])


def _machine(payloads: Sequence[dict[str, Any] | None]) -> str:
    found = {tuple(sorted(p["machine"].items())) for p in payloads if p is not None}
    if not found:
        return "Nothing has been measured yet."
    said = [", ".join(f"{k} {v}" for k, v in one) for one in sorted(found)]
    return "Measured on: " + "; and on: ".join(said)


def _seconds(payloads: Sequence[dict[str, Any] | None]) -> float:
    return sum(float(p["seconds"]) for p in payloads if p is not None)


def fig3(request: Request) -> Outcome:
    """Measure time and memory of a training step over the batch size (Fig. 3).

    Args:
        request: What the user asked for; seeds and epochs have no meaning here.

    Returns:
        A row for each method and batch size.

    Raises:
        SettingsError: The settings file can't be used.
    """
    settings = load(Figure3, "fig3", request.settings)
    batches = settings.quick.batches if request.quick else settings.batches
    rounds = settings.quick.rounds if request.quick else settings.rounds
    tasks = [
        method.task(batch, settings.width, settings.depth, settings.inputs)
        for method in settings.method
        for batch in batches
        if method.most is None or batch <= method.most
    ]
    payload = _taken(request, "time and memory of a step", tasks, rounds, True)
    known = {(cost.method, cost.batch): cost for cost in _costs(payload)}
    frame = pd.DataFrame(
        _bar(settings, method.name, batch, known, {(t.method, t.batch) for t in tasks})
        for method in settings.method
        for batch in batches
    )
    net = f"{settings.inputs}-{'-'.join([str(settings.width)] * settings.depth)}-10"
    return Outcome(
        name="fig3",
        title="Fig. 3: time and memory of a training step",
        settings=f"Tanh net {net}. {PROTOCOL.format(rounds=rounds)}\n\n{_machine([payload])}",
        rows=frame,
        notes=(
            "Read from the figure: how far a method lies above SGD, and how steeply it rises with "
            "the batch. Both axes are logarithmic. The paper's figure is not in our source, so the "
            "published column is empty. Vanilla DDP is measured with its line search, and only up "
            "to the batch that is feasible (*left out* above).",
        ),
        figure=lambda: cost_plots.bars(frame, [m.name for m in settings.method]),
        quick=request.quick,
        command=rerun(request, "fig3"),
        seconds=_seconds([payload]),
        views=(
            _pivot(frame, "measured", "Milliseconds of a whole step, by batch size"),
            _pivot(frame, "ratio", f"Time of a step as a multiple of {settings.baseline}'s"),
            _pivot(frame, "mib", "MiB of a step, by batch size"),
        ),
        summary=_fig3_summary(frame, settings.baseline),
    )


def _bar(
    settings: Figure3,
    method: str,
    batch: int,
    known: dict[tuple[str, int], Cost],
    wanted: set[tuple[str, int]],
) -> dict[str, object]:
    cost, base = known.get((method, batch)), known.get((settings.baseline, batch))

    def get(name: str) -> float:
        value = getattr(cost, name, None)
        return math.nan if value is None else float(value)

    left_out = "left out: batch too large" if (method, batch) not in wanted else NOT_MEASURED
    verdict = left_out if cost is None else (cost.refused or "measured")
    ratio = get("step") / base.step if base is not None and base.step else math.nan
    return {
        "method": method,
        "B": batch,
        "published": math.nan,
        "measured": get("step"),
        "verdict": verdict,
        "ratio": ratio,
        "median": get("median"),
        "backward": get("backward"),
        "mib": get("mib"),
    }


def _pivot(frame: pd.DataFrame, column: str, caption: str) -> View:
    wide = frame.pivot(index="method", columns="B", values=column)
    wide = wide.reindex(list(dict.fromkeys(frame["method"])))
    shown = wide.map(lambda v: show_number(float(v), 3))
    shown.columns = [f"B = {batch}" for batch in wide.columns]
    return View(caption, shown.reset_index())


def _fig3_summary(frame: pd.DataFrame, baseline: str) -> str:
    ratios = frame.dropna(subset=["ratio"])
    if ratios.empty:
        return "nothing measured"
    worst = ratios.loc[ratios["ratio"].idxmax()]
    return f"up to {worst['ratio']:.0f} times {baseline} ({worst['method']}, B = {worst['B']})"
