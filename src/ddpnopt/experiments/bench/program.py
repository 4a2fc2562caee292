# SPDX-License-Identifier: MIT
"""Runs the benchmark part by part; what is finished is in the JSON file at every moment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpnopt.experiments.bench import measure
from ddpnopt.experiments.bench.cases import BASELINE, LARGE, NETS, VARIANTS, Net, Variant, chosen
from ddpnopt.experiments.bench.document import Document, Entry, NetFigures, targets
from ddpnopt.experiments.bench.growth import measure_growth
from ddpnopt.experiments.bench.large import COMPARED, measure_apart
from ddpnopt.experiments.reproduce.step_cost import machine

PARTS = ("time", "memory", "growth", "large")
ROUNDS = 20
QUICK_ROUNDS, QUICK_CHUNK, QUICK_BATCH = 2, 0.005, 16


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        parts: Of `PARTS`.
        nets: Numbers in `NETS`.
        patterns: Optimizers, see `chosen`.
        rounds: Timed rounds.
        threads: Torch's threads.
        device: Torch device.
        batch: Samples in a step; None: each net's own.
        autocast: Nets are run in bfloat16 by `torch.autocast`.
        quick: Small sizes and short chunks; without patterns only what has a target.
        out: Folder of the growth's files.
        json: The document's file.
    """

    parts: tuple[str, ...]
    nets: tuple[int, ...]
    patterns: tuple[str, ...]
    rounds: int
    threads: int
    device: str
    batch: int | None
    autocast: bool
    quick: bool
    out: Path
    json: Path

    def case(self, number: int) -> Net:
        """A net, with the batch asked for."""
        net = NETS[number]
        own = min(net.batch, QUICK_BATCH) if self.quick else net.batch
        return replace(net, batch=self.batch or own, autocast=self.autocast)

    def variants(self, number: int) -> dict[str, Variant]:
        """The optimizers of a net."""
        patterns = list(self.patterns)
        if self.quick and not patterns:
            wanted = {target.variant for target in targets().target}
            patterns = sorted(n for n in wanted if not VARIANTS[n].compiled)
        return chosen(patterns, number)

    def command(self) -> str:
        """How to measure this again."""
        parts = ["ddpnopt bench", *(f"--net {n}" for n in self.nets if self.nets != tuple(NETS))]
        parts += [f"--part {p}" for p in self.parts if self.parts != PARTS]
        parts += [f"--only '{p}'" for p in self.patterns]
        parts += [f"--rounds {self.rounds}", f"--threads {self.threads}"]
        parts += [f"--device {self.device}"] if self.device != "cpu" else []
        parts += [f"--batch {self.batch}"] if self.batch is not None else []
        parts += ["--autocast"] if self.autocast else []
        return " ".join(parts + (["--quick"] if self.quick else []))


def run(plan: Plan, console: Console) -> Document:
    """Measure; the document's file is written after each part.

    Args:
        plan: What to measure.
        console: Where progress is shown.

    Returns:
        The figures. What failed is in `failures`; a peer that is not installed is no failure.
    """
    found = machine()
    on_gpu = plan.device.startswith("cuda")
    document = Document(
        torch=torch.__version__,
        device=plan.device,
        machine=torch.cuda.get_device_name(plan.device) if on_gpu else found["processor"],
        cores=found["cores"],
        threads=plan.threads,
        rounds=plan.rounds,
        quick=plan.quick,
        autocast=plan.autocast,
        command=plan.command(),
    )
    threads, chunk = torch.get_num_threads(), measure.CHUNK_SECONDS
    torch.set_num_threads(plan.threads)
    measure.CHUNK_SECONDS = QUICK_CHUNK if plan.quick else chunk
    try:
        for number in plan.nets if {"time", "memory"} & set(plan.parts) else ():
            document.nets.append(_net(plan, number, document, console))
            document.write(plan.json)
        if "growth" in plan.parts:
            document.growth, figure = measure_growth(plan.out, plan.quick, console)
            document.growth_figure = figure.name
            document.write(plan.json)
        if "large" in plan.parts:
            _large(plan, document, console)
    finally:
        torch.set_num_threads(threads)
        measure.CHUNK_SECONDS = chunk
    document.write(plan.json)
    return document


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _net(plan: Plan, number: int, document: Document, console: Console) -> NetFigures:
    """Time, memory and operations on one net."""
    net, all_variants = plan.case(number), plan.variants(number)
    variants = {name: v for name, v in all_variants.items() if v.installed}
    missing = {n: str(v.package) for n, v in all_variants.items() if not v.installed}
    for name, package in missing.items():
        console.print(f"{name}: skipped, {package} is not installed", highlight=False)
    entries = {name: Entry() for name in variants}
    with _progress(console) as bar:
        if "time" in plan.parts:
            total = plan.rounds * len(variants)
            task = bar.add_task(f"net {number}: time", total=total)
            timings, errors = measure.time_steps(
                net, variants, plan.rounds, plan.device, lambda: bar.advance(task)
            )
            for name, timing in timings.items():
                entries[name] = Entry(**asdict(timing))
            for name, error in errors.items():
                entries[name] = Entry(error=error)
            bar.update(task, completed=total)
        if "memory" in plan.parts:
            # A compiler's kernels are no operators, which is what is counted.
            seen = [name for name, v in variants.items() if not v.compiled]
            for name in bar.track(seen, description=f"net {number}: memory, operations"):
                if not entries[name].error:
                    entries[name] = _with_footprint(net, variants[name], plan, entries[name])
    for name, entry in entries.items():
        if entry.error:
            document.failures.append(f"{name} on net {number}: {entry.error}")
    return NetFigures(
        net=number, title=net.title, batch=net.batch, variants=entries, missing=missing
    )


def _with_footprint(net: Net, variant: Variant, plan: Plan, entry: Entry) -> Entry:
    try:
        cost = measure.footprint(net, variant, plan.device)
    except Exception as error:  # one that fails must not cost the figures of all others
        return entry.model_copy(update={"error": f"{type(error).__name__}: {error}"})
    return entry.model_copy(update=asdict(cost))


def _large(plan: Plan, document: Document, console: Console) -> None:
    asked: Mapping[str, Variant] = chosen(list(plan.patterns), 2)
    names = [n for n in COMPARED if n == BASELINE or n in asked]
    jobs = [(net, name) for net in LARGE for name in names]
    with _progress(console) as bar:
        for net, name in bar.track(jobs, description="large nets"):
            try:
                cost = measure_apart(net, name, plan.device, plan.threads, plan.quick)
            except RuntimeError as error:
                document.failures.append(str(error))
                continue
            document.large.append(cost)
            document.write(plan.json)


def default_console() -> Console:
    """A console for progress: the standard error stream, wide where it is no terminal."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else 120)
