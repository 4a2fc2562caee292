# SPDX-License-Identifier: MIT
"""Cost of a whole training step of DDPNOpt and of torch's optimizers, as ratios to plain SGD.

Examples:
    python benchmarks/step_cost.py --nets 1 2 3 --rounds 30 --threads 2 --out results/bench.json
    python benchmarks/step_cost.py markdown results/bench.json
    python benchmarks/step_cost.py --nets 2 --only "SGD + clip" --only "DDPNOpt open loop"
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cases import BASELINE, NETS, VARIANTS
from measure import Footprint, Timing, footprint, time_steps

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# A table in a log is not cut to the 80 columns of a terminal that is not there.
console = Console(width=None if sys.stdout.isatty() else 100)


def _footprint_apart(net: int, variant: str, threads: int, device: str) -> Footprint:
    """Measure a footprint in a process of its own, where no other variant left anything."""
    command = [sys.executable, __file__, "footprint", str(net), variant]
    options = ["--threads", str(threads), "--device", device]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the footprint of {variant!r} on net {net} failed:\n{done.stderr}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


@app.command(name="footprint")
def footprint_command(
    net: int, variant: str, threads: int = 2, device: str = "cpu", steps: int = 5
) -> None:
    """Print the memory and the operations of one variant's step as one line of JSON."""
    torch.set_num_threads(threads)
    sys.stdout.write(json.dumps(asdict(footprint(net, variant, steps, device))) + "\n")


def _table(net: int, timings: dict[str, Timing], footprints: dict[str, Footprint]) -> Table:
    case = NETS[net]
    table = Table(title=f"net {net}: {case.title}, batch {case.batch}", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    table.caption = "time, flop, memory, process: over SGD's; process: the whole process's memory"
    for heading in ("ms", "time", "quartiles", "flop", "memory", "process"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = footprints.get(BASELINE)
    for name, timing in timings.items():
        cells = [
            f"{timing.milliseconds:.2f}",
            f"{timing.ratio:.2f}",
            f"{timing.low:.2f}-{timing.high:.2f}",
        ]
        if base is not None:
            cost = footprints[name]
            cells += [
                f"{cost.gflop / base.gflop:.2f}",
                f"{cost.tensor_mib / base.tensor_mib:.2f}",
                f"{cost.process_mib / base.process_mib:.2f}",
            ]
        table.add_row(name, *cells)
    return table


def _record(net: int, timings: dict[str, Timing], footprints: dict[str, Footprint]) -> Any:
    return {
        "net": net,
        "title": NETS[net].title,
        "batch": NETS[net].batch,
        "variants": {
            name: {
                **asdict(timing),
                **(asdict(footprints[name]) if name in footprints else {}),
            }
            for name, timing in timings.items()
        },
    }


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


@app.command(name="run")
def run_command(
    nets: Annotated[list[int], typer.Option(help="nets to measure: 1, 2, 3")] = [1, 2, 3],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="optimizers to measure beside SGD")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="timed rounds")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads")] = 2,
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    memory: Annotated[bool, typer.Option(help="measure memory and operations, too")] = True,
    out: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Measure step time, memory and operations; print a table for each net."""
    unknown = [f"net {n}" for n in nets if n not in NETS] + [n for n in only if n not in VARIANTS]
    if unknown:
        known = ", ".join([*(f"net {n}" for n in NETS), *VARIANTS])
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}. Known: {known}")
    torch.set_num_threads(threads)
    results = []
    for net in nets:
        names = [n for n, v in VARIANTS.items() if net in v.nets and (not only or n in only)]
        names = [BASELINE, *(n for n in names if n != BASELINE)]
        with _progress() as bar:
            timing = bar.add_task(f"net {net}: time", total=rounds * len(names))
            timings = time_steps(net, names, rounds, device, partial(bar.advance, timing))
            footprints: dict[str, Footprint] = {}
            if memory:
                for name in bar.track(names, description=f"net {net}: memory"):
                    footprints[name] = _footprint_apart(net, name, threads, device)
        console.print(_table(net, timings, footprints))
        results.append(_record(net, timings, footprints))
    if out is not None:
        machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
        head = {"torch": torch.__version__, "device": device, "machine": machine}
        document = {**head, "threads": threads, "rounds": rounds, "nets": results}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"wrote {out}")


@app.command(name="markdown")
def markdown_command(source: Path) -> None:
    """Print the figures of a JSON file as the README's table: time and (memory) over SGD's."""
    document = json.loads(source.read_text())
    nets = document["nets"]
    rows = [["optimizer", *(f"net {n['net']}: {n['title']}, batch {n['batch']}" for n in nets)]]
    rows.append(["---"] + ["---:"] * len(nets))
    for name in VARIANTS:
        cells = [_cell(n["variants"], name) for n in nets]
        if any(cells):
            rows.append([name, *cells])
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))
    head = "torch {torch}, {machine}, {threads} threads, {rounds} rounds"
    sys.stdout.write("\n" + head.format(**document) + "\n")


def _cell(variants: dict[str, dict[str, float]], name: str) -> str:
    if name not in variants:
        return ""
    memory = "tensor_mib" in variants[name]
    share = variants[name]["tensor_mib"] / variants[BASELINE]["tensor_mib"] if memory else None
    cell = f"{variants[name]['ratio']:.2f}"
    return cell if share is None else f"{cell} ({share:.2f})"


def _spread(arguments: list[str]) -> list[str]:
    """Let `--nets 1 2 3` mean `--nets 1 --nets 2 --nets 3`, and `run` be the default command."""
    spread: list[str] = []
    listing = False
    for argument in arguments:
        if argument == "--nets":
            listing = True
        elif listing and argument.isdigit():
            spread += ["--nets", argument]
        else:
            listing = False
            spread.append(argument)
    named = spread[:1] in (["footprint"], ["markdown"], ["run"], ["--help"])
    return spread if named else ["run", *spread]


if __name__ == "__main__":
    app(_spread(sys.argv[1:]))
