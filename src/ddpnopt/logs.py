# SPDX-License-Identifier: MIT
"""What the steps of a training run did, in a folder: as CSV, and for TensorBoard.

``ddpnopt watch FOLDER`` shows it while the training goes on. The same numbers go to any other
tracker: ``wandb.log(ddpnopt.scalars(opt.last_step))``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

import torch

from ddpnopt.report import LayerReport, StepReport
from ddpnopt.typing import Tensor

FILE = "steps.csv"
HEADER = ("step", "scalar", "value")


def scalars(report: StepReport | None) -> dict[str, float]:
    """A step's record as numbers by name, "coefficient/fc1": what loggers and trackers take.

    Args:
        report: ``opt.last_step``; None (no step yet) gives none.

    Returns:
        "samples", "rescale", "skipped", and for each layer in feedback: "coefficient/...",
        "coefficient_min/..." (mean and least factor on a sample's gradient), "bounded/..." (share
        of samples cut to less than half), "S/...", and with ``opt.diagnose = True`` "k/..." and
        "Kdx/..." (norms of the feedforward and the feedback step).
    """
    if report is None:
        return {}
    found = {
        "samples": float(report.samples),
        "rescale": report.rescale,
        "skipped": float(report.skipped),
    }
    layers = report.layers if report.front is None else (report.front, *report.layers)
    for layer in layers:
        found.update(_of_layer(layer))
    return found


def _of_layer(layer: LayerReport) -> Iterator[tuple[str, float]]:
    values = {
        "coefficient": layer.coefficient_mean,
        "coefficient_min": layer.coefficient_min,
        "bounded": layer.bounded_share,
        "S": layer.S_mean,
        "k": layer.k_norm,
        "Kdx": layer.feedback_norm,
    }
    return ((f"{name}/{layer.name}", one) for name, one in values.items() if one is not None)


class StepLog:
    """Writes every step's record to ``FOLDER/steps.csv``, and to TensorBoard's event files.

    A folder that has a log already is gone on with: so resumed runs are one curve.

    Args:
        folder: Where to write; made if need be.
        tensorboard: Write event files beside the CSV (needs the package ``tensorboard``).
        every: Steps between two records.

    Raises:
        ValueError: ``every`` is out of range, or the folder's file is no log of steps.
        ModuleNotFoundError: ``tensorboard`` is not installed.

    Examples:
        >>> log = StepLog("runs/first", tensorboard=True)
        >>> loss.backward(); opt.step(); log(opt, loss)
    """

    def __init__(self, folder: str | Path, tensorboard: bool = False, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: must be a whole number, at least 1")
        self.folder, self.every = Path(folder), every
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        self.step = last_step(path)
        self._events = _events(self.folder) if tensorboard else None
        self._open()

    def _open(self) -> None:
        self._file: TextIO = (self.folder / FILE).open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if self._file.tell() == 0:
            self._rows.writerow(HEADER)

    def rewind(self, step: int) -> None:
        """Take off what was logged behind a step, from which a training goes on (a checkpoint's).

        Args:
            step: The last one that stays.
        """
        self._file.close()
        path, part = self.folder / FILE, self.folder / f"{FILE}.part"
        with path.open(newline="", encoding="utf-8") as old:
            with part.open("w", newline="", encoding="utf-8") as new:
                head = next(old, "")
                new.writelines([head, *(line for line in old if int(line.split(",")[0]) <= step)])
        part.replace(path)
        self.step = min(self.step, step)
        if self._events is not None:
            self._events.close()
            self._events = _events(self.folder, self.step + 1)
        self._open()

    def __call__(
        self, optimizer: object, loss: Tensor | float | None = None, **more: Tensor | float
    ) -> None:
        """After ``optimizer.step()``.

        Args:
            optimizer: A `DDPNOpt`, a `Feedback`, or the handle of `open_loop`; of an optimizer
                without a ``last_step`` only the learning rate is known.
            loss: This step's loss.
            more: Other numbers, by name.
        """
        self.step += 1
        if self.step % self.every:
            return
        groups = getattr(optimizer, "param_groups", None)
        found: dict[str, Any] = {} if loss is None else {"loss": loss}
        if groups:
            found["lr"] = groups[0]["lr"]
        self.write({**found, **more, **scalars(getattr(optimizer, "last_step", None))})

    def write(self, found: dict[str, Any]) -> None:
        """Write numbers under the present step, and let readers see them."""
        with torch.no_grad():
            values = {name: float(value) for name, value in found.items()}
        self._rows.writerows((self.step, name, repr(value)) for name, value in values.items())
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, self.step)
            self._events.flush()

    def close(self) -> None:
        """Write no more."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        """As a context manager: closed at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()


def last_step(path: Path) -> int:
    """The last step that a log has; 0 where there is no log. A line cut off by a crash is removed.

    Raises:
        ValueError: The file is no log of steps.
    """
    if not path.exists():
        return 0
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    if not whole:
        return 0
    if whole.splitlines()[0].decode(errors="replace") != ",".join(HEADER):
        raise ValueError(f"{path}: no log of steps (its first line is not {','.join(HEADER)})")
    return max((step for step, _, _ in rows(path)), default=0)


def rows(path: Path) -> Iterator[tuple[int, str, float]]:
    """The whole lines of a log, also of one that is being written.

    Raises:
        ValueError: A line is damaged (it is named).
    """
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if number == 1 or not line.endswith("\n"):
                continue
            try:
                step, name, value = next(csv.reader([line]))
                yield int(step), name, float(value)
            except (ValueError, StopIteration) as error:
                raise ValueError(f"{path}, line {number}: not a step, a name and a number") from (
                    error
                )


def _events(folder: Path, purged: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "StepLog(tensorboard=True) needs the package tensorboard: pip install tensorboard, or "
            "leave the option out and read steps.csv"
        ) from error
    return SummaryWriter(str(folder), purge_step=purged)
