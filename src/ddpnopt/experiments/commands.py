# SPDX-License-Identifier: MIT
"""The commands of `ddpnopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpnopt.experiments.bench_command import EPILOG as bench_epilog
from ddpnopt.experiments.bench_command import bench_command
from ddpnopt.experiments.command_options import (
    DATASET_HELP,
    OPTIMIZER_HELP,
    ArchOption,
    BatchOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    JobsOption,
    OptionsOption,
    OutOption,
    SamplesOption,
    ScaleOption,
    console,
    readable_errors,
    stopping_errors,
)
from ddpnopt.experiments.data import describe
from ddpnopt.experiments.explain_command import explain_command
from ddpnopt.experiments.plot_command import EPILOG as plot_epilog
from ddpnopt.experiments.plot_command import plot_command
from ddpnopt.experiments.pool import processes
from ddpnopt.experiments.report import print_optimizers, write_comparison
from ddpnopt.experiments.report_command import EPILOG as report_epilog
from ddpnopt.experiments.report_command import report_command
from ddpnopt.experiments.reproduce.command import reproduce_command
from ddpnopt.experiments.specs import parse_optimizer, parse_option, parse_rates
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import Contender, grid, sweep
from ddpnopt.experiments.train_command import EPILOG as train_epilog
from ddpnopt.experiments.train_command import train_command
from ddpnopt.experiments.training import RunConfig, check
from ddpnopt.experiments.tune_command import EPILOG as tune_epilog
from ddpnopt.experiments.tune_command import tune_command
from ddpnopt.experiments.watch_command import EPILOG as watch_epilog
from ddpnopt.experiments.watch_command import watch_command

app = typer.Typer(
    name="ddpnopt",
    help="Train small networks with DDPNOpt and its rivals, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
)
app.command("train", epilog=train_epilog)(train_command)

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
    with readable_errors():
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
    with stopping_errors():
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

    with readable_errors():
        processes(jobs)
    with stopping_errors():
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
