# SPDX-License-Identifier: MIT
"""Where results are kept between sweeps. This file is the only one that knows the format.

A store offers `keys`, `append` and `results`; a database with the same three methods can take
the CSV file's place without a change elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Protocol, runtime_checkable

from ddpnopt.experiments.training import RunResult

COLUMNS = (
    "key",
    "dataset",
    "architecture",
    "optimizer",
    "options",
    "lr",
    "batch",
    "epochs",
    "seed",
    "train_loss",
    "test_accuracy",
    "diverged",
    "failed",
    "seconds",
    "record",
)


@runtime_checkable
class Store(Protocol):
    """What a sweep needs of a place for results."""

    def keys(self) -> set[str]:
        """Keys of the configurations that have a result."""

    def append(self, result: RunResult) -> None:
        """Add one result; it is on disk when this returns."""

    def results(self) -> list[RunResult]:
        """All results, in the order they came."""


class CsvStore:
    """Results as rows of a CSV file: columns to read by eye, and the whole record as JSON.

    Args:
        path: The file; it and its folder are made when the first result comes.

    Raises:
        ValueError: The file exists and is no such table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            self._drop_partial_line()
            with path.open(newline="") as file:
                header = next(csv.reader(file), None)
            if header is not None and tuple(header) != COLUMNS:
                raise ValueError(f"{path} is no table of results (its columns differ)")

    def _drop_partial_line(self) -> None:
        # A run that was killed while writing leaves a last line without its end.
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            self.path.write_bytes(content[: content.rfind(b"\n") + 1])

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def keys(self) -> set[str]:
        """Keys of the configurations that have a result."""
        return {row["key"] for row in self._rows()}

    def results(self) -> list[RunResult]:
        """All results, in the order they came."""
        return [RunResult.model_validate_json(row["record"]) for row in self._rows()]

    def append(self, result: RunResult) -> None:
        """Add one result; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        config = result.config
        values: dict[str, object] = {
            "key": config.key,
            **config.model_dump(include=set(COLUMNS)),
            "options": json.dumps(config.options, sort_keys=True),
            "train_loss": f"{result.train_loss:.6g}",
            "test_accuracy": f"{result.test_accuracy:.6f}",
            "diverged": result.diverged,
            "failed": result.failed,
            "seconds": f"{result.seconds:.3f}",
            "record": result.model_dump_json(),
        }
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(values)
        with self.path.open("a", newline="") as file:
            file.write(text.getvalue())
