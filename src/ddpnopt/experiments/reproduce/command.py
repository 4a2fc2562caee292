# SPDX-License-Identifier: MIT
"""The command `ddpnopt reproduce`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import joblib
import typer
from rich.console import Console

from ddpnopt.experiments.reproduce.outcome import QUICK, Outcome, Request, write
from ddpnopt.experiments.reproduce.registry import RESULTS
from ddpnopt.experiments.reproduce.schema import SettingsError, closest, packaged
from ddpnopt.experiments.store import SqliteStore, StoreError

NAMES_HELP = "One or more of: " + ", ".join(RESULTS) + "; or all."

console = Console()
messages = Console(stderr=True)


NamesArgument = Annotated[list[str], typer.Argument(metavar="NAME...", help=NAMES_HELP)]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for results.")]
SeedsOption = Annotated[
    int | None,
    typer.Option("--seeds", "-s", min=1, help="Seeds; the settings file's if not given."),
]
EpochsOption = Annotated[
    int | None,
    typer.Option("--epochs", "-e", min=1, help="Epochs; the settings file's if not given."),
]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Parallel processes; all cores if not given."),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Fewer seeds and epochs: to try it out, not a result.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Folder of the data sets' files.",
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch data sets that aren't in --data from OpenML.")
]
DaskOption = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Train on the cluster of this scheduler."),
]
SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="Your own copy of the settings file."),
]
PrintOption = Annotated[
    bool, typer.Option("--print-settings", help="Print the settings file, and do nothing else.")
]


def reproduce_command(
    names: NamesArgument,
    out: OutOption = Path("results"),
    seeds: SeedsOption = None,
    epochs: EpochsOption = None,
    jobs: JobsOption = None,
    quick: QuickOption = False,
    data: DataOption = None,
    download: DownloadOption = False,
    dask: DaskOption = None,
    settings: SettingsOption = None,
    print_settings: PrintOption = False,
) -> None:
    """Make the paper's tables and figures again, beside the published numbers.

    Every finished training is kept in DIR/store.sqlite: interrupt at any moment, and the same
    command goes on where it was.
    """
    chosen = _chosen(names)
    if settings is not None and len(chosen) > 1:
        raise typer.BadParameter("a settings file is for one table: name one NAME with --settings")
    try:
        if print_settings:
            for name in chosen:
                typer.echo(packaged(name), nl=False)
            return
        store = SqliteStore(out / "store.sqlite")
        store.prepare()
        request = Request(
            out=out,
            store=store,
            seeds=seeds,
            epochs=epochs,
            jobs=jobs or joblib.cpu_count(),
            quick=quick,
            data=data,
            dask=dask,
            console=messages,
            settings=settings,
            download=download,
        )
    except (SettingsError, StoreError) as error:
        raise typer.BadParameter(str(error)) from error
    _run(chosen, request)


def _chosen(names: Sequence[str]) -> list[str]:
    """The results asked for, in the registry's order."""
    unknown = [name for name in names if name != "all" and name not in RESULTS]
    if unknown:
        known = [*RESULTS, "all"]
        raise typer.BadParameter(
            f"unknown name {unknown[0]!r}; known: {', '.join(known)}.{closest(unknown[0], known)}"
        )
    return [name for name in RESULTS if name in names or "all" in names]


def _run(chosen: Sequence[str], request: Request) -> None:
    start = time.monotonic()
    failed: list[str] = []
    if request.quick:
        console.print(f"[yellow]{QUICK}[/]", highlight=False)
    for name in chosen:
        try:
            _show(RESULTS[name](request), request.out)
        except KeyboardInterrupt:
            messages.print(
                f"Stopped. What was finished is in {request.out / 'store.sqlite'}: the same "
                "command goes on from there.",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
        except Exception as error:
            expected = isinstance(error, ValueError | RuntimeError | OSError)
            if not expected and len(chosen) == 1:
                raise
            # The other results must not wait for this one.
            said = str(error) if expected else f"{type(error).__name__}: {error}"
            messages.print(f"[red]{name}:[/] ", end="")
            messages.print(said, markup=False, highlight=False, soft_wrap=True)
            failed.append(name)
    if len(chosen) > 1:
        minutes = (time.monotonic() - start) / 60
        console.print(
            f"{len(chosen) - len(failed)} of {len(chosen)} results, {minutes:.1f} minutes"
        )
    if failed:
        raise typer.Exit(1)


def _show(outcome: Outcome, out: Path) -> None:
    written = write(outcome, out)
    console.print(f"[bold]{outcome.title}[/]", highlight=False)
    if outcome.summary:
        console.print(f"  {outcome.summary}", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"  written: {path}", soft_wrap=True, highlight=False)
