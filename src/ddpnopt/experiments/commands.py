# SPDX-License-Identifier: MIT
"""The commands of `ddpnopt`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import ValidationError
from rich.console import Console

from ddpnopt.experiments.bench_command import EPILOG as bench_epilog
from ddpnopt.experiments.bench_command import bench_command
from ddpnopt.experiments.cluster import ClusterError
from ddpnopt.experiments.data import DATASETS, describe
from ddpnopt.experiments.explain_command import explain_command
from ddpnopt.experiments.models import ARCHITECTURE_HELP
from ddpnopt.experiments.optimizers import OPTIMIZERS
from ddpnopt.experiments.plot_command import EPILOG as plot_epilog
from ddpnopt.experiments.plot_command import plot_command
from ddpnopt.experiments.pool import processes
from ddpnopt.experiments.report import print_optimizers, write_comparison, write_run
from ddpnopt.experiments.report_command import EPILOG as report_epilog
from ddpnopt.experiments.report_command import report_command
from ddpnopt.experiments.reproduce.command import reproduce_command
from ddpnopt.experiments.specs import parse_optimizer, parse_option, parse_rates
from ddpnopt.experiments.store import SqliteStore, StoreError
from ddpnopt.experiments.sweep import Contender, SweepError, grid, sweep
from ddpnopt.experiments.training import Epoch, RunConfig, check
from ddpnopt.experiments.training import train as run_training
from ddpnopt.experiments.tune_command import EPILOG as tune_epilog
from ddpnopt.experiments.tune_command import tune_command
from ddpnopt.experiments.watch_command import EPILOG as watch_epilog
from ddpnopt.experiments.watch_command import LogOption, logged, watch_command

app = typer.Typer(
    name="ddpnopt",
    help="Train small networks with DDPNOpt and its rivals, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
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
def _readable_errors() -> Iterator[None]:
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
def _sweep_errors() -> Iterator[None]:
    """Show what ended a sweep as one message; the finished runs are stored."""
    try:
        yield
    except (ClusterError, StoreError, SweepError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command(
    epilog="Example: [bold]ddpnopt train --dataset digits --arch mlp-20x4-tanh "
    "--optimizer ddpnopt --lr 0.4 --option feedback=open_loop --out results/train[/]"
)
def train(
    dataset: DatasetOption = "digits",
    arch: ArchOption = "mlp-20x4-tanh",
    optimizer: Annotated[str, typer.Option("--optimizer", "-m", help=OPTIMIZER_HELP)] = "ddpnopt",
    lr: Annotated[float, typer.Option("--lr", "-l", help="Learning rate.")] = 0.1,
    option: OptionsOption = None,
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
    log: LogOption = None,
    out: OutOption = Path("results/train"),
) -> None:
    """Train one network; write its record (JSON), its curve (CSV) and a plot (PNG)."""
    with _readable_errors():
        name, options = parse_optimizer(optimizer)
        options.update(parse_option(text) for text in option or [])
        config = RunConfig(
            dataset=dataset,
            scale=scale,
            architecture=arch,
            optimizer=name,
            lr=lr,
            options=options,
            batch=batch,
            epochs=epochs,
            seed=seed,
            device=device,
            data=data,
            train_samples=train_samples,
        )
        check(config)

    torch.set_num_threads(threads)
    with console.status(f"{config.label} on {dataset}, lr {lr:g}"), logged(log) as note:

        def show(record: Epoch) -> None:
            note(record)
            console.print(
                f"epoch {record.epoch}/{epochs}: training loss {record.train_loss:.4f}, "
                f"test accuracy {100 * record.test_accuracy:.1f} %, {record.seconds:.2f} s"
            )

        result = run_training(config, show)
    if result.diverged:
        console.print(f"[yellow]diverged: {result.reason}[/]")
    for path in write_run(result, out):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


DaskOption = Annotated[
    str | None,
    typer.Option("--dask", metavar="ADDRESS", help="Run on the workers of a Dask scheduler."),
]
RetryOption = Annotated[bool, typer.Option("--retry-failed", help="Run again what crashed before.")]


def _contenders(
    optimizer: list[str] | None, lr: list[str] | None, option: list[str] | None
) -> list[Contender]:
    """Optimizers with their rates and options, as `compare` takes them from the command line."""
    shared = dict(parse_option(text) for text in option or [])
    rates = parse_rates(lr or ["0.1"])
    contenders: list[Contender] = []
    for text in optimizer or ["sgd", "ddpnopt"]:
        spec, _, own = text.partition("@")
        kind, options = parse_optimizer(spec)
        chosen = tuple(sorted({**shared, **options}.items()))
        contenders.append(Contender(kind, parse_rates([own]) if own else rates, chosen))
    return contenders


def _comparison(
    base: RunConfig, datasets: list[str], contenders: list[Contender], seeds: int
) -> list[RunConfig]:
    """All runs of a comparison, checked; each says which files its data are."""
    configs: list[RunConfig] = []
    for name in datasets:
        checksum = describe(name, folder=base.data).checksum
        own = base.model_copy(update={"dataset": name, "checksum": checksum})
        configs += grid(own, contenders, range(seeds))
    for config in {(c.dataset, c.label): c for c in configs}.values():
        check(config)
    return configs


@app.command(
    epilog="Example: [bold]ddpnopt compare --dataset digits --arch cnn --optimizer sgd "
    "--optimizer sgd-clip:grad_clip=0.5 --optimizer ddpnopt --lr 0.1,0.2,0.6 --seeds 4 "
    "--jobs 2 --out results/cnn[/]"
)
def compare(
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", "-d", help=f"One of: {DATASET_HELP}; repeatable."),
    ] = None,
    arch: ArchOption = "mlp-20x4-tanh",
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizer",
            "-m",
            help=OPTIMIZER_HELP + " Repeatable; own rates after an at-sign (adam@0.001,0.01).",
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option("--lr", "-l", help="Learning rates, repeatable or separated by commas."),
    ] = None,
    option: OptionsOption = None,
    epochs: EpochsOption = 5,
    batch: BatchOption = 8,
    seeds: Annotated[int, typer.Option("--seeds", "-s", min=1, help="Seeds 0 ... N - 1.")] = 3,
    jobs: JobsOption = -1,
    dask: DaskOption = None,
    retry_failed: RetryOption = False,
    scale: ScaleOption = "standard",
    device: DeviceOption = "cpu",
    data: DataOption = None,
    train_samples: SamplesOption = None,
    out: OutOption = Path("results/compare"),
) -> None:
    """Compare optimizers over learning rates and seeds; resumes where it was interrupted."""
    with _readable_errors():
        contenders = _contenders(optimizer, lr, option)
        base = RunConfig(
            architecture=arch,
            epochs=epochs,
            batch=batch,
            scale=scale,
            device=device,
            data=data,
            train_samples=train_samples,
        )
        configs = _comparison(base, dataset or ["digits"], contenders, seeds)
        processes(jobs)
        store = SqliteStore(out / "store.sqlite")
    with _sweep_errors():
        runs = sweep(
            configs,
            store,
            jobs=jobs,
            title="comparing",
            console=console,
            dask=dask,
            retry_failed=retry_failed,
        )
    print_optimizers(runs, console)
    for path in write_comparison(runs, out):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: [bold]ddpnopt demo --jobs 2 --out results/demo[/]")
def demo(
    out: OutOption = Path("results/demo"),
    jobs: JobsOption = -1,
    budget: Annotated[
        float,
        typer.Option("--budget", min=0.0, help="Seconds after which no further seed is begun."),
    ] = 130.0,
    seeds: Annotated[int, typer.Option("--seeds", "-s", min=1, help="Most seeds to run.")] = 3,
) -> None:
    """Train SGD, SGD + clipping, RMSprop, Adam and DDPNOpt on WINE and DIGITS (3 minutes)."""
    from ddpnopt.experiments.demo import run_demo

    with _readable_errors():
        processes(jobs)
    with _sweep_errors():
        written = run_demo(out, jobs=jobs, budget=budget, seeds=seeds, console=console)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


for name, command, epilog in (
    (
        "reproduce",
        reproduce_command,
        "Example: [bold]ddpnopt reproduce table6 fig4 --jobs 2 --out results[/]",
    ),
    ("report", report_command, report_epilog),
    ("tune", tune_command, tune_epilog),
    ("plot", plot_command, plot_epilog),
    ("bench", bench_command, bench_epilog),
    ("watch", watch_command, watch_epilog),
):
    app.command(name, epilog=epilog)(command)

app.command(
    "explain",
    epilog="Example: [bold]ddpnopt explain cnn-16-bn --input 8,1,8,8[/], or "
    "[bold]ddpnopt explain mynets:resnet --input 8,3,32,32[/]",
)(explain_command)
