# SPDX-License-Identifier: MIT
"""What the commands have in common: their options, and errors as messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from ddpnopt.experiments.checkpoints import CheckpointError
from ddpnopt.experiments.cluster import ClusterError
from ddpnopt.experiments.data import DATASETS
from ddpnopt.experiments.models import ARCHITECTURE_HELP
from ddpnopt.experiments.optimizers import OPTIMIZERS
from ddpnopt.experiments.store import StoreError
from ddpnopt.experiments.sweep import SweepError

console = Console()

DATASET_HELP = ", ".join(DATASETS)
DatasetOption = Annotated[str, typer.Option("--dataset", "-d", help=f"One of: {DATASET_HELP}.")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder with the files of mnist, fashion-mnist, svhn, cifar-10 or cifar-100; without "
        "it they are fetched from OpenML.",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option("--train-samples", min=1, help="Training samples to draw; all if not given."),
]
ArchOption = Annotated[str, typer.Option("--arch", "-a", help=ARCHITECTURE_HELP + ".")]
BatchOption = Annotated[int, typer.Option("--batch", "-b", min=1, help="Samples per step.")]
EpochsOption = Annotated[int, typer.Option("--epochs", "-e", min=1, help="Passes over the data.")]
ScaleOption = Annotated[
    str, typer.Option("--scale", help="Scaling of inputs: standard, pooled, unit or none.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")]
JobsOption = Annotated[
    int, typer.Option("--jobs", "-j", min=-1, help="Parallel processes; -1: all cores.")
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")]
OptionsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-O",
        metavar="KEY=VALUE",
        help="Optimizer option, repeatable: momentum=0.9, grad_clip=1, feedback=open_loop, "
        "value=low_rank, value.backup=riccati, curvature.alpha=0.9.",
    ),
]
OPTIMIZER_HELP = (
    "Optimizer, with its own options after a colon (sgd-clip:grad_clip=0.5,momentum=0.9). One of: "
    + ", ".join(OPTIMIZERS)
    + "."
)


@contextmanager
def readable_errors() -> Iterator[None]:
    """Show a wrong name or number as one message, not as a traceback."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise typer.BadParameter(f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@contextmanager
def stopping_errors() -> Iterator[None]:
    """Show what ended a sweep or a training as one message; what is stored stays so."""
    try:
        yield
    except (CheckpointError, ClusterError, StoreError, SweepError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
