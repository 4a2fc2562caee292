# SPDX-License-Identifier: MIT
"""The command `ddpnopt train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ddpnopt.experiments.checkpoints import Checkpoints
from ddpnopt.experiments.command_options import (
    OPTIMIZER_HELP,
    ArchOption,
    BatchOption,
    DataOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    OptionsOption,
    OutOption,
    SamplesOption,
    ScaleOption,
    console,
    readable_errors,
    stopping_errors,
)
from ddpnopt.experiments.records import Epoch, RunConfig
from ddpnopt.experiments.report import write_run
from ddpnopt.experiments.schedules import SCHEDULE_HELP
from ddpnopt.experiments.specs import parse_optimizer, parse_option
from ddpnopt.experiments.training import check, train
from ddpnopt.experiments.watch_command import LogOption, logged

EPILOG = (
    "Example: [bold]ddpnopt train --dataset digits --arch mlp-20x4-tanh --optimizer ddpnopt "
    "--lr 0.4 --option feedback=open_loop --out results/train[/]; a long training, started and "
    "started again with one line: [bold]ddpnopt train --optimizer ddpnopt --epochs 100 "
    "--checkpoint results/train/checkpoints --resume[/]"
)
_Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", metavar="DIR", help="Folder for checkpoints; none without it."),
]
_Every = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every", min=1, help="Steps between checkpoints; not given: every epoch."
    ),
]
_Keep = Annotated[
    int, typer.Option("--checkpoint-keep", min=1, help="So many of the newest checkpoints stay.")
]
_Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the newest checkpoint; from the beginning where there is none.",
    ),
]
_FallBack = Annotated[
    bool,
    typer.Option(
        "--fall-back",
        help="With --resume: where the newest checkpoint is damaged, go on from the one before it.",
    ),
]


def train_command(
    dataset: DatasetOption = "digits",
    arch: ArchOption = "mlp-20x4-tanh",
    optimizer: Annotated[str, typer.Option("--optimizer", "-m", help=OPTIMIZER_HELP)] = "ddpnopt",
    lr: Annotated[float, typer.Option("--lr", "-l", help="Learning rate.")] = 0.1,
    option: OptionsOption = None,
    schedule: Annotated[str, typer.Option("--schedule", help=SCHEDULE_HELP + ".")] = "constant",
    epochs: EpochsOption = 5,
    batch: BatchOption = 8,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed.")] = 0,
    scale: ScaleOption = "standard",
    device: DeviceOption = "cpu",
    data: DataOption = None,
    train_samples: SamplesOption = None,
    threads: Annotated[
        int,
        typer.Option("--threads", min=1, help="CPU threads; small networks are fastest with 1."),
    ] = 1,
    checkpoint: _Checkpoint = None,
    checkpoint_every: _Every = None,
    checkpoint_keep: _Keep = 2,
    resume: _Resume = False,
    fall_back: _FallBack = False,
    log: LogOption = None,
    out: OutOption = Path("results/train"),
) -> None:
    """Train one network; write its record (JSON), its curve (CSV) and a plot (PNG)."""
    with readable_errors():
        name, options = parse_optimizer(optimizer)
        options.update(parse_option(text) for text in option or [])
        config = RunConfig(
            dataset=dataset,
            scale=scale,
            architecture=arch,
            optimizer=name,
            lr=lr,
            options=options,
            schedule=schedule,
            batch=batch,
            epochs=epochs,
            seed=seed,
            device=device,
            data=data,
            train_samples=train_samples,
        )
        check(config)
        _check_options(checkpoint, checkpoint_every, resume, fall_back)
    checkpoints = None
    if checkpoint is not None:
        checkpoints = Checkpoints(
            checkpoint, checkpoint_every, checkpoint_keep, resume, fall_back, _tell
        )
    torch.set_num_threads(threads)
    _run(config, checkpoints, log, out)


def _check_options(folder: Path | None, every: int | None, resume: bool, fall_back: bool) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: One is given without that which it is about.
    """
    given = {"--checkpoint-every": every is not None, "--resume": resume, "--fall-back": fall_back}
    without = [name for name, there in given.items() if there and folder is None]
    if without:
        raise ValueError(f"{', '.join(without)}: name the folder with --checkpoint DIR")
    if fall_back and not resume:
        raise ValueError("--fall-back says where --resume goes on: give both")


def _tell(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(record: Epoch, epochs: int) -> None:
    console.print(
        f"epoch {record.epoch}/{epochs}: training loss {record.train_loss:.4f}, "
        f"test accuracy {100 * record.test_accuracy:.1f} %, {record.seconds:.2f} s"
    )


def _run(config: RunConfig, checkpoints: Checkpoints | None, log: Path | None, out: Path) -> None:
    """Train, show every epoch, write the results."""
    title = f"{config.label} on {config.dataset}, lr {config.lr:g}"
    with stopping_errors(), console.status(title), logged(log) as steps:

        def start(step: int) -> None:
            if steps is not None and checkpoints is not None and checkpoints.resume:
                steps.rewind(step)

        def show(record: Epoch) -> None:
            if steps is not None:
                steps.write({"loss": record.train_loss, "accuracy": record.test_accuracy})
            _show(record, config.epochs)

        result = train(config, show, checkpoints, start)
    if result.diverged:
        console.print(f"[yellow]diverged: {result.reason}[/]")
    for path in write_run(result, out):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
