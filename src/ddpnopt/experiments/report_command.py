# SPDX-License-Identifier: MIT
"""The command `ddpnopt report`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ddpnopt.experiments.page import Section, environment, failed_section, render, section
from ddpnopt.experiments.page.sections import measured_cells
from ddpnopt.experiments.page.study import study_section
from ddpnopt.experiments.reproduce.outcome import Outcome, Request
from ddpnopt.experiments.reproduce.registry import RESULTS, Reproduction
from ddpnopt.experiments.reproduce.schema import SettingsError, closest
from ddpnopt.experiments.selection import STORE, store_file
from ddpnopt.experiments.store import SqliteStore

EPILOG = "Example: [bold]ddpnopt report --store results/store.sqlite --out results/report.html[/]"
PAGE = "report.html"

_Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="The store, or its folder; not given: store.sqlite in the folder of --out.",
        show_default="results/store.sqlite",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="The page, or the folder of ddpnopt reproduce that it is written into.",
        show_default="report.html beside the store",
    ),
]
_Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of the data sets' files.")
]
_Seeds = Annotated[
    int | None, typer.Option("--seeds", "-s", min=1, help="As they were given to reproduce.")
]
_Epochs = Annotated[
    int | None, typer.Option("--epochs", "-e", min=1, help="As they were given to reproduce.")
]
_Quick = Annotated[
    bool,
    typer.Option(
        "--quick", help="Show quick runs; without it, only where nothing else has been run."
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--settings",
        metavar="NAME=FILE",
        help="Your own settings file of a result, as it was given to reproduce; once for each.",
    ),
]
_Study = Annotated[
    Path | None,
    typer.Option("--study", help="Store of the study when_it_helps, to be shown, too."),
]


def report_command(
    store: _Store = None,
    out: _Out = None,
    data: _Data = None,
    seeds: _Seeds = None,
    epochs: _Epochs = None,
    quick: _Quick = False,
    settings: _Settings = None,
    study: _Study = None,
) -> None:
    """Build one HTML page, for reading offline, of every table and figure in the store."""
    console = Console()
    try:
        file, page = places(store, out)
        kept = SqliteStore(file)
        request = Request(
            out=_shown(file.parent),
            store=kept,
            seeds=seeds,
            epochs=epochs,
            quick=quick,
            data=data,
            run=False,
            console=console,
        )
        sections = list(collect(request, own=own_settings(settings or [])))
        if study is not None:
            sections.append(study_section(study))
        remarks = _remarks(kept)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page.parent.mkdir(parents=True, exist_ok=True)
    text = render(sections, environment(), date=date, store=file.name, remarks=remarks)
    page.write_text(text, encoding="utf-8")
    for own in sections:
        if own.state == "failed":
            console.print(f"{own.name} can't be shown: {own.message}", markup=False)
    missing = [s.name for s in sections if s.state == "not run"]
    if missing:
        console.print(f"not run yet: {', '.join(missing)}", highlight=False)
    size = page.stat().st_size / 2**20
    console.print(f"written: {page} ({size:.1f} MB)", soft_wrap=True, highlight=False)


def places(store: Path | None, out: Path | None) -> tuple[Path, Path]:
    """Find the store and where the page goes.

    Args:
        store: A store or its folder; None: in the folder of `out`, or in results/.
        out: An .html file, or a folder; None: beside the store.

    Returns:
        The store's file and the page's.

    Raises:
        ValueError: There is no store.
    """
    is_page = out is not None and out.suffix in (".html", ".htm")
    if out is not None and not is_page and out.is_file():
        raise ValueError(f"--out {out}: give an .html file or a folder")
    folder = None if out is None else out.parent if is_page else out
    if store is None:
        beside = folder is not None and (folder / STORE).is_file()
        store = folder / STORE if folder is not None and beside else Path("results") / STORE
    if not store.exists():
        raise ValueError(
            f"--store {store}: no such file; `ddpnopt reproduce NAME --out DIR` makes "
            f"DIR/{STORE}, which --store or --out DIR names"
        )
    file = store_file(store)
    if out is not None and is_page:
        return file, out
    return file, (folder or file.parent) / PAGE


def _shown(folder: Path) -> Path:
    """A folder as the page names it: the page is sent around, the machine's paths are not."""
    absolute, here = folder.resolve(), Path.cwd()
    if absolute == here:
        return Path(".")
    return absolute.relative_to(here) if absolute.is_relative_to(here) else Path(absolute.name)


def own_settings(pairs: Sequence[str]) -> dict[str, Path]:
    """Read the values of --settings.

    Args:
        pairs: "table6=my.toml", ...

    Returns:
        The user's own settings file of each result that has one.

    Raises:
        ValueError: Not a pair, an unknown name, or one named twice.
    """
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not equals or not file:
            raise ValueError(f"--settings {pair}: give NAME=FILE, such as table6=my.toml")
        if name not in RESULTS:
            known = list(RESULTS)
            raise ValueError(
                f"--settings {pair}: unknown name {name!r}; known: {', '.join(known)}."
                f"{closest(name, known)}"
            )
        if name in found:
            raise ValueError(f"--settings: {name} has two files")
        found[name] = Path(file)
    return found


def collect(
    request: Request,
    results: Mapping[str, Reproduction] = RESULTS,
    own: Mapping[str, Path] | None = None,
) -> Iterator[Section]:
    """Make a section of every result, from what the store holds alone.

    Args:
        request: With `run=False`. Without `quick`, a result that has only been run quickly is
            shown as such.
        results: What there is.
        own: The user's settings file of a result, by its name.

    Yields:
        One section per result, in their order.

    Raises:
        SettingsError: A file in `own` is wrong.
    """
    own = own or {}
    for name, reproduce in results.items():
        # One result that can't be shown must not hide the others; the page says what happened.
        try:
            yield section(_outcome(replace(request, settings=own.get(name)), reproduce))
        except Exception as error:
            if name in own and isinstance(error, SettingsError):
                raise
            yield failed_section(name, error)


def _outcome(request: Request, reproduce: Reproduction) -> Outcome:
    outcome = reproduce(request)
    if request.quick or measured_cells(outcome.rows):
        return outcome
    quick = reproduce(replace(request, quick=True))
    return quick if measured_cells(quick.rows) else outcome


def _remarks(store: SqliteStore) -> list[str]:
    """Say what else the store holds."""
    with warnings.catch_warnings():
        # Rows that this version can't read are counted below with the others.
        warnings.simplefilter("ignore")
        everything = len(store.results(all_versions=True))
    own = len(store.results())
    remarks = [f"The store holds {own:,} trainings of this version of the code."]
    if everything > own:
        remarks.append(
            f"{everything - own:,} more were made by other versions of the code and are not shown."
        )
    return remarks
