# SPDX-License-Identifier: MIT
"""The command `ddpnopt tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from pydantic import ValidationError
from rich.console import Console

from ddpnopt.experiments.data import DATASETS, canonical
from ddpnopt.experiments.models import ARCHITECTURE_HELP, INITIALISATION_HELP
from ddpnopt.experiments.optimizers import OPTIMIZERS
from ddpnopt.experiments.specs import parse_optimizer, parse_option

if TYPE_CHECKING:
    import optuna

    from ddpnopt.experiments.tune import Settings

EPILOG = (
    "Example: [bold]ddpnopt tune --dataset digits --arch mlp-20x4-tanh --optimizer sgd "
    "--trials 20 --storage results/tune.journal --study digits-sgd[/]; on every further machine: "
    "[bold]ddpnopt tune --storage results/tune.journal --study digits-sgd --worker[/]"
)
#: Options of the command that make up a study's settings, by the settings' dotted names.
_SETTINGS = {
    "dataset": ("dataset",),
    "arch": ("architecture",),
    "optimizer": ("optimizer", "options"),
    "option": ("options",),
    "lr_range": ("search.lr",),
    "search": ("search",),
    "epochs": ("epochs",),
    "batch": ("batch",),
    "scale": ("scale",),
    "initialisation": ("initialisation",),
    "loss": ("loss",),
    "train_samples": ("train_samples",),
    "seeds": ("seeds",),
    "objective": ("objective",),
    "validation": ("validation",),
    "pruner": ("pruner",),
    "sampler_seed": ("sampler_seed",),
}


_Dataset = Annotated[str, typer.Option("--dataset", "-d", help=f"One of: {', '.join(DATASETS)}.")]
_Arch = Annotated[str, typer.Option("--arch", "-a", help=ARCHITECTURE_HELP + ".")]
_Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        "-m",
        help="Optimizer, with its own options after a colon. One of: "
        + ", ".join(OPTIMIZERS)
        + ".",
    ),
]
_Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-O", metavar="KEY=VALUE", help="Optimizer option, kept fixed; repeatable."
    ),
]
_LrRange = Annotated[
    str | None,
    typer.Option(
        "--lr-range",
        metavar="LOW,HIGH",
        help="Rates to search, on the logarithmic scale. Not given: Table 5's range of the "
        "optimizer or of the one whose curvature it borrows, else 0.001,10.",
    ),
]
_Search = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        metavar="KEY=LOW:HIGH[:log]",
        help="Another option to search, repeatable: momentum=0.0:0.99, "
        "curvature.damping=1e-4:1:log.",
    ),
]
_Trials = Annotated[
    int, typer.Option("--trials", "-n", min=1, help="Finished trials to reach, in total.")
]
_Seeds = Annotated[int, typer.Option("--seeds", "-s", min=1, help="Seeds per trial.")]
_Epochs = Annotated[int, typer.Option("--epochs", "-e", min=1, help="Passes.")]
_Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Samples per step.")]
_Scale = Annotated[
    str, typer.Option("--scale", help="Scaling of inputs: standard, pooled, unit or none.")
]
_Initialisation = Annotated[
    str, typer.Option("--initialisation", help=f"One of: {INITIALISATION_HELP}.")
]
_Loss = Annotated[str, typer.Option("--loss", help="cross_entropy or mmc.")]
_TrainSamples = Annotated[
    int | None, typer.Option("--train-samples", min=1, help="Training samples to draw.")
]
_Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of data sets' files.")
]
_Objective = Annotated[
    str,
    typer.Option(
        "--objective",
        help="accuracy (on the held-out part of the training part) or train_loss.",
    ),
]
_Validation = Annotated[
    float, typer.Option("--validation", help="Share of the training part held out.")
]
_Pruner = Annotated[
    str, typer.Option("--pruner", help="median, halving (successive halving) or none.")
]
_SamplerSeed = Annotated[int, typer.Option("--sampler-seed", min=0, help="Seed of the proposals.")]
_Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="SQLite file (tune.db), journal file on a shared disk (tune.journal) or database "
        "URL; not given: study.db in --out.",
    ),
]
_Study = Annotated[
    str | None,
    typer.Option("--study", help="Name; not given: made of data set, network, optimizer."),
]
_Worker = Annotated[
    bool,
    typer.Option(
        "--worker",
        help="Take part in a study that exists, from any machine, with the study's settings.",
    ),
]
_Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        min=0.0,
        help="Seconds of silence after which another machine's trial is taken over.",
    ),
]
_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for results.")]


def tune_command(
    context: typer.Context,
    dataset: _Dataset = "digits",
    arch: _Arch = "mlp-20x4-tanh",
    optimizer: _Optimizer = "sgd",
    option: _Option = None,
    lr_range: _LrRange = None,
    search: _Search = None,
    trials: _Trials = 20,
    seeds: _Seeds = 3,
    epochs: _Epochs = 5,
    batch: _Batch = 8,
    scale: _Scale = "standard",
    initialisation: _Initialisation = "torch",
    loss: _Loss = "cross_entropy",
    train_samples: _TrainSamples = None,
    data: _Data = None,
    objective: _Objective = "accuracy",
    validation: _Validation = 0.2,
    pruner: _Pruner = "median",
    sampler_seed: _SamplerSeed = 0,
    storage: _Storage = None,
    study: _Study = None,
    worker: _Worker = False,
    grace: _Grace = 3600.0,
    out: _Out = Path("results/tune"),
) -> None:
    """Search the learning rate, and other options, of an optimizer; resumable, any workers."""
    given = {
        name
        for name in (*_SETTINGS, "trials")
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    asked = dict(context.params)
    console = Console()
    try:
        _tune(asked, given, console)
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        console.print(
            "ddpnopt tune needs Optuna: pip install 'ddpnopt[experiments]' (missing: optuna)",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise typer.BadParameter(f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _asked_settings(asked: dict[str, Any]) -> Settings:
    """The settings that the command line spells out, checked for form."""
    from ddpnopt.experiments.training import RunConfig
    from ddpnopt.experiments.tune import Settings
    from ddpnopt.experiments.tune_ranges import Space, parse_space, range_of

    name, options = parse_optimizer(asked["optimizer"])
    options.update(parse_option(text) for text in asked["option"] or [])
    run = RunConfig(
        dataset=canonical(asked["dataset"]),
        scale=asked["scale"],
        architecture=asked["arch"],
        optimizer=name,
        options=options,
        batch=asked["batch"],
        epochs=asked["epochs"],
        initialisation=asked["initialisation"],
        loss=asked["loss"],
        train_samples=asked["train_samples"],
    )
    low, high = range_of(name, options, asked["lr_range"])
    spaces = {"lr": Space(low=low, high=high, log=True)}
    for text in asked["search"] or []:
        key, space = parse_space(text)
        if key in spaces or key in options:
            raise ValueError(f"--search {text}: {key} is given twice")
        spaces[key] = space
    rest = ("seeds", "objective", "validation", "pruner", "sampler_seed")
    return Settings(run=run, search=spaces, **{key: asked[key] for key in rest})


def _join(storage: Any, asked: dict[str, Any], given: set[str]) -> Settings:
    """A study's settings, after checking that what was asked beside them agrees."""
    from ddpnopt.experiments.tune import flat
    from ddpnopt.experiments.tune_study import read_settings

    if asked["study"] is None or asked["storage"] is None:
        raise ValueError("--worker needs --storage and --study, those of the study to take part in")
    settings = read_settings(storage, asked["study"])
    if given - {"trials"}:
        has, wants = flat(settings), flat(_asked_settings(asked))
        prefixes = [prefix for name in given if name in _SETTINGS for prefix in _SETTINGS[name]]
        for key in sorted({*has, *wants}):
            ours = any(key == p or key.startswith(p + ".") for p in prefixes)
            if ours and has.get(key) != wants.get(key):
                raise ValueError(
                    f"study {asked['study']!r} has {key} {has.get(key)!r}, asked "
                    f"{wants.get(key)!r}; a --worker takes the study's settings"
                )
    return settings


def _tune(asked: dict[str, Any], given: set[str], console: Console) -> None:
    import optuna

    from ddpnopt.experiments.tune import validate, work
    from ddpnopt.experiments.tune_results import trials_frame, write_study
    from ddpnopt.experiments.tune_study import open_storage, open_study

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    out, data, worker = asked["out"], asked["data"], asked["worker"]
    if not worker:
        settings = _asked_settings(asked)
        validate(settings, data)
    storage = open_storage(asked["storage"] or str(out / "study.db"))
    if worker:
        settings = _join(storage, asked, given)
        validate(settings, data)
    run = settings.run
    name = asked["study"] or f"{run.dataset}-{run.architecture}-{run.optimizer}"
    study = open_study(storage, name, settings)
    total = asked["trials"]
    if worker and "trials" not in given:
        total = int(study.user_attrs.get("trials", total))
    else:
        study.set_user_attr("trials", total)
    span = settings.search["lr"]
    console.print(
        f"study {name}: {run.label} on {run.dataset}, rates {span.low:g} to {span.high:g}, "
        f"{settings.seeds} seeds x {run.epochs} epochs a trial, until {total} are finished",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    work(
        study,
        settings,
        total,
        data=data,
        alone=not worker,
        grace=asked["grace"],
        on_trial=lambda trial: _say(trial, settings, console),
    )
    frame = trials_frame(study, settings)
    _conclude(frame, settings, total, console)
    for path in write_study(frame, settings, name, out):
        console.print(f"written: {path}", soft_wrap=True, highlight=False)


def _say(trial: optuna.trial.FrozenTrial, settings: Settings, console: Console) -> None:
    values = ", ".join(f"{key} {value:.4g}" for key, value in trial.params.items())
    shown = "no value" if trial.value is None else f"{trial.value:.4f}"
    error = trial.user_attrs.get("error")
    console.print(
        f"trial {trial.number}: {values}: {settings.objective} {shown}, {trial.state.name.lower()}"
        + (f" ({error})" if error else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _conclude(frame: Any, settings: Settings, total: int, console: Console) -> None:
    from ddpnopt.experiments.tune_results import best_trial, objective_label, train_command

    counts = frame["state"].value_counts()
    finished = int(counts.get("complete", 0) + counts.get("pruned", 0))
    running = int(counts.get("running", 0))
    others = f"; other workers are at {running} more" if running else ""
    console.print(
        f"{finished} of {total} trials finished, {int(counts.get('pruned', 0))} of them "
        f"pruned{others}",
        highlight=False,
    )
    best = best_trial(frame, settings)
    if best is None:
        console.print("no trial is complete with a finite value: widen or move --lr-range")
        return
    values = {key: best[key] for key in settings.search}
    chosen = ", ".join(f"{key} {value:.6g}" for key, value in values.items())
    console.print(
        f"best: {chosen}: {objective_label(settings)} {best['value']:.4g}, worst seed "
        f"{best['worst']:.4g}\ntrain with it: {train_command(settings, values)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
