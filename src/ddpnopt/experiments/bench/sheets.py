# SPDX-License-Identifier: MIT
"""A benchmark document as tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from ddpnopt.experiments.bench.cases import BASELINE, NETS, VARIANTS
from ddpnopt.experiments.bench.document import (
    FIELDS,
    Document,
    Entry,
    Exponent,
    NetFigures,
    applies,
    figure_of,
    targets,
)
from ddpnopt.experiments.markdown import table

QUICK = "QUICK RUN: few rounds and small sizes; not a result."
EMPTY = "–"
MET, MISSED, OPEN = "met", "missed", "not measured"
DEFAULT, FIRST_ORDER = "DDPNOpt", "SGD"


@dataclass(frozen=True)
class Sheet:
    """A table for readers.

    Attributes:
        title: What it shows.
        header: Headings; the first column is text, all others numbers.
        rows: Cells.
        note: How to read it.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def rich(self) -> Table:
        """For a terminal."""
        shown = Table(title=self.title, title_justify="left", caption=self.note)
        shown.caption_justify = "left"
        for number, heading in enumerate(self.header):
            shown.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        """As Markdown."""
        parts = [f"**{self.title}**", table(self.header, self.rows)]
        return "\n\n".join([*parts, self.note] if self.note else parts)


def _ratio(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.2f}"


def sheets(document: Document, before: Document | None = None) -> list[Sheet]:
    """All tables that a document has figures for.

    Args:
        document: What was measured.
        before: An earlier document, whose figures stand beside the targets; None: none.
    """
    found = [_targets(document, before)]
    found += [_net(net) for net in document.nets]
    found += [_growth(document.growth)] if document.growth else []
    found += [_large(document)] if document.large else []
    return [sheet for sheet in found if sheet.rows]


def verdict(value: float | None, limit: float) -> str:
    """Compare a measured ratio with its target: "met", "missed" or "not measured"."""
    if value is None:
        return OPEN
    return MET if value <= limit else MISSED


def _targets(document: Document, before: Document | None) -> Sheet:
    rows = []
    for name, net, floor, limit, old, value, spread in _judged(document, before):
        rows.append(
            (
                *(name, net, _ratio(floor), _ratio(limit)),
                *([_ratio(old)] if before is not None else []),
                *(_ratio(value), spread or EMPTY, verdict(value, limit)),
            )
        )
    head = ("ratio to plain SGD", "net", "floor", "target")
    middle = ("before",) if before is not None else ()
    tail = ("measured", "quartiles", "verdict")
    counts = [row[-1] for row in rows]
    note = f"{counts.count(MET)} of {len(rows)} targets met, {counts.count(OPEN)} not measured"
    return Sheet("Targets", head + middle + tail, rows, note)


Judged = tuple[str, str, float | None, float, float | None, float | None, str]


def _judged(document: Document, before: Document | None) -> Iterator[Judged]:
    """Name, net, floor, target, earlier ratio, ratio and spread of each target."""
    for target in targets().target:
        name = f"{target.variant}: {target.quantity}"
        for found in document.nets:
            if not applies(target, document, found, NETS[found.net].batch):
                continue
            earlier = before.net(found.net) if before is not None else None
            old = None if earlier is None else figure_of(earlier, target)[0]
            floor, limit = target.floor.get(found.net), target.limit[found.net]
            yield name, f"net {found.net}", floor, limit, old, *figure_of(found, target)
        for net, limit in target.large.items() if document.large else ():
            if document.device.startswith(target.device):
                field = FIELDS[target.quantity]
                ratio = document.large_ratio(net, target.variant, field)
                old = before.large_ratio(net, target.variant, field) if before else None
                yield name, net, None, limit, old, ratio, ""


def _net(net: NetFigures) -> Sheet:
    rows = [_row(net, name, net.variants[name]) for name in VARIANTS if name in net.variants]
    note = (
        "time, flops, memory, steady: over SGD's. SGD's own time ratio is a chunk over its "
        "neighbours: its quartiles are the noise. memory: peak of live tensors; steady: after "
        "the first steps; held: between steps."
    )
    failed = [f"{name} failed: {e.error}" for name, e in net.variants.items() if e.error]
    absent = [f"{name}: not installed ({package})" for name, package in net.missing.items()]
    return Sheet(
        f"Net {net.net}: {net.title}, batch {net.batch}",
        ("optimizer", "ms", "time", "quartiles", "flops", "memory", "steady", "held"),
        rows,
        "\n\n".join([note, *failed, *absent]),
    )


def _row(net: NetFigures, name: str, entry: Entry) -> tuple[str, ...]:
    return (
        name,
        EMPTY if entry.milliseconds is None else f"{entry.milliseconds:.2f}",
        _ratio(entry.ratio),
        EMPTY if entry.low is None else f"{entry.low:.2f} to {entry.high:.2f}",
        *(
            _ratio(net.over_baseline(name, field))
            for field in ("gflop", "tensor_mib", "steady_mib", "held_mib")
        ),
    )


def _growth(growth: Sequence[Exponent]) -> Sheet:
    tolerance = targets().growth_tolerance
    base = {(e.cost, e.size): e.measured for e in growth if e.method == FIRST_ORDER}
    rows = []
    for method in dict.fromkeys(e.method for e in growth):
        own = [e for e in growth if e.method == method]
        judged = ""
        if method == DEFAULT:
            faster = [
                f"{e.cost} in {e.size}"
                for e in own
                if e.measured is not None
                and (reference := base.get((e.cost, e.size))) is not None
                and e.measured > reference + tolerance
            ]
            judged = f"{MISSED}: {', '.join(faster)}" if faster else MET
        cells = [_ratio(e.measured) for cost in ("time", "memory") for e in own if e.cost == cost]
        rows.append((method, *cells, judged or EMPTY))
    header = ("exponents", *(f"{c} in {s}" for c in ("time", "memory") for s in ("B", "X", "L")))
    note = (
        f"cost = c size^e, fitted. {DEFAULT} is to grow like {FIRST_ORDER}: no exponent larger by "
        f"more than {tolerance:g}. Backward pass and update, CPU time, one thread."
    )
    return Sheet("Growth with batch B, width X, depth L", (*header, "like SGD"), rows, note)


def _large(document: Document) -> Sheet:
    rows = [
        (
            f"{cost.title}, batch {cost.batch}: {cost.variant}",
            f"{cost.tensor_mib:.0f}",
            *(
                _ratio(document.large_ratio(cost.net, cost.variant, field))
                for field in ("tensor_mib", "steady_mib", "process_mib", "gflop", "milliseconds")
            ),
        )
        for cost in document.large
    ]
    header = ("large net: optimizer", "MiB", "memory", "steady", "process", "flops", "time")
    note = (
        f"Over {BASELINE}'s, each in a process of its own. process: the resident memory's peak; "
        "time: median of 3 steps, one process after the other, so only a rough figure."
    )
    return Sheet("Large nets", header, rows, note)


def heading(document: Document) -> str:
    """One line: what it was measured on."""
    line = (
        f"{document.machine}, {document.device}, {document.threads} threads, torch "
        f"{document.torch}, {document.rounds} rounds"
    ) + (", bfloat16 by autocast" if document.autocast else "")
    return f"{line}. {QUICK}" if document.quick else line


def show(document: Document, console: Console, before: Document | None = None) -> None:
    """Print all tables."""
    for sheet in sheets(document, before):
        console.print(sheet.rich())
    console.print(heading(document), highlight=False, soft_wrap=True)


def markdown(document: Document, before: Document | None = None) -> str:
    """All tables as Markdown, with what they were measured on and the command."""
    parts = [heading(document)]
    if before is not None:
        parts.append(f"*before*: {heading(before)}")
    parts += [sheet.markdown() for sheet in sheets(document, before)]
    if document.command:
        parts.append(f"```console\n{document.command}\n```")
    return "\n\n".join(parts) + "\n"
