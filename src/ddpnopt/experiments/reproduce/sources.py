# SPDX-License-Identifier: MIT
"""Where the data of a table come from, or why they are missing. Nothing is fetched unasked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpnopt.experiments.data import describe
from ddpnopt.experiments.reproduce.outcome import Request

#: Kind of the records that say what a result was trained on.
KIND = "data"
BUILT_IN = ("digits", "wine")


@dataclass(frozen=True)
class Source:
    """Data of a name.

    Attributes:
        folder: Where they are read from; None: in scikit-learn, or downloaded before.
        origin: What was read, for labels; empty where they are the complete original.
        checksum: Of the files; empty for what comes with scikit-learn.
        reason: Why they can't be had; empty where they can.
    """

    folder: Path | None = None
    origin: str = ""
    checksum: str = ""
    reason: str = ""


def locate(request: Request, dataset: str) -> Source:
    """Find a data set's files, download them where that is asked for, or say what is missing.

    Args:
        request: What the user asked for.
        dataset: Registry name.

    Returns:
        The source; from the store's records where nothing is to be run.
    """
    if dataset in BUILT_IN:
        return Source(origin="scikit-learn")
    if not request.run:
        kept = request.store.get_record(KIND, dataset)
        return (
            Source(reason="not run")
            if kept is None
            else Source(origin=str(kept["origin"]), checksum=str(kept["checksum"]))
        )
    said = "no files: name their folder with --data DIR, or fetch them with --download"
    folders: list[Path | None] = [] if request.data is None else [request.data]
    for folder in [*folders, *([None] if request.download else [])]:
        try:
            found = describe(dataset, folder=folder)
        except (ValueError, OSError) as error:
            said = str(error)
            continue
        kept_now = {"origin": found.origin, "checksum": found.checksum}
        request.store.put_record(KIND, dataset, kept_now)
        return Source(folder, found.origin, found.checksum)
    return Source(reason=said)
