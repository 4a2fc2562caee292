# SPDX-License-Identifier: MIT
"""The search for a learning rate (Table 5) as an Optuna study that any number of workers share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, Field
from sklearn.model_selection import train_test_split

from ddpnopt.experiments.data import DATASETS
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.training import Epoch, RunConfig, check, train
from ddpnopt.experiments.tune_ranges import Space
from ddpnopt.experiments.tune_study import beat, claim, open_places, requeue


class Settings(BaseModel):
    """Everything that decides a study's trials; the study itself carries it to its workers.

    Attributes:
        run: Data set, network, optimizer, options, batch, epochs. Its rate and seed are unused.
        search: What is searched: "lr" and options of the optimizer.
        seeds: Trainings per trial, of seeds 0, 1, ...; a trial's value is their mean.
        objective: "accuracy": that of the validation part (to maximise). "train_loss": the loss of
            the part trained on (to minimise).
        validation: Share of the training part held out, by class, in (0, 1).
        pruner: "median", "halving" (successive halving) or "none".
        sampler_seed: Seed of the proposals.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig
    search: dict[str, Space]
    seeds: int = Field(default=3, ge=1)
    objective: Literal["accuracy", "train_loss"] = "accuracy"
    validation: float = Field(default=0.2, gt=0.0, lt=1.0)
    pruner: Literal["median", "halving", "none"] = "median"
    sampler_seed: int = Field(default=0, ge=0)

    def with_values(self, values: Mapping[str, float | int], seed: int = 0) -> RunConfig:
        """The configuration of a trial's training.

        Args:
            values: A value for every name of `search`.
            seed: The training's seed.
        """
        options = {name: value for name, value in values.items() if name != "lr"}
        changes = {"lr": values["lr"], "seed": seed, "options": {**self.run.options, **options}}
        return RunConfig.model_validate({**self.run.model_dump(), **changes})


def flat(settings: Settings) -> dict[str, Any]:
    """Settings by dotted name, to compare them with another study's."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix.removeprefix("run."), value

    return {k: v for k, v in walk("", settings.model_dump(mode="json")) if k not in ("lr", "seed")}


def validate(settings: Settings, data: Path | None = None) -> None:
    """Raise what a training would raise for impossible settings, at both ends of every range.

    Args:
        settings: The study's.
        data: Folder of files of data sets that are read from files.

    Raises:
        ValueError: Unknown names, options or values.
    """
    with holdout(settings.run.dataset, settings.validation) as name:
        for end in ("low", "high"):
            values = {key: getattr(space, end) for key, space in settings.search.items()}
            for key, space in settings.search.items():
                values[key] = int(values[key]) if space.whole else values[key]
            check(settings.with_values(values).model_copy(update={"dataset": name, "data": data}))


@contextmanager
def holdout(dataset: str, share: float) -> Iterator[str]:
    """Register, for a while, the data set whose test part is a share of another's training part.

    The other's test part is not in it at all; what is scaled is scaled with the statistics of what
    remains to train on.

    Args:
        dataset: Registry name.
        share: Share of the training part to hold out, by class, in (0, 1).

    Yields:
        The name to load it by.

    Raises:
        ValueError: Unknown data set.
    """
    source = lookup(DATASETS, dataset, "data set")
    name = f"{dataset}:held-out={share:g}"

    def split(request: Any) -> Any:
        raw = source(replace(request, name=dataset))
        x, x_held, y, y_held = train_test_split(
            raw.x_train,
            raw.y_train,
            test_size=share,
            random_state=request.seed,
            stratify=raw.y_train,
        )
        return replace(raw, x_train=x, y_train=y, x_test=x_held, y_test=y_held)

    DATASETS[name] = split
    try:
        yield name
    finally:
        del DATASETS[name]


def _worst(settings: Settings) -> float:
    return 0.0 if settings.objective == "accuracy" else math.inf


def _measured(settings: Settings, epoch: Epoch) -> float:
    value = epoch.test_accuracy if settings.objective == "accuracy" else epoch.train_loss
    return value if math.isfinite(value) else _worst(settings)


def evaluate(trial: optuna.Trial, settings: Settings, data: Path | None = None) -> float:
    """Train with a trial's values on every seed.

    Args:
        trial: Chooses the values and says when to give up.
        settings: The study's.
        data: Folder of files of data sets that are read from files.

    Returns:
        The mean over seeds of the last epoch's objective. A training that diverges counts with the
        weights as they are, one that crashes as the worst value there is; both are noted.

    Raises:
        optuna.TrialPruned: The trial is worse than others were at this point.
    """
    values = {name: space.draw(trial, name) for name, space in settings.search.items()}
    finished: list[float] = []
    diverged = 0
    pruned = False

    def report(epoch: Epoch) -> None:
        nonlocal pruned
        beat(trial)
        step = len(finished) * settings.run.epochs + epoch.epoch
        so_far = [*finished, _measured(settings, epoch)]
        trial.report(sum(so_far) / len(so_far), step)
        if trial.should_prune():
            pruned = True
            raise optuna.TrialPruned

    with holdout(settings.run.dataset, settings.validation) as name:
        for seed in range(settings.seeds):
            changes = {"dataset": name, "data": data}
            config = settings.with_values(values, seed).model_copy(update=changes)
            # A study of hours must not end because one trial can't be run: what went wrong is
            # kept with the trial, which gets the worst value.
            try:
                result = train(config, report)
            except Exception as error:
                if pruned:
                    raise
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                finished.append(_worst(settings))
                continue
            diverged += result.diverged
            finished.append(_measured(settings, result.epochs[-1]))
    trial.set_user_attr("diverged", diverged)
    trial.set_user_attr("values", finished)
    return sum(finished) / len(finished)


def work(
    study: optuna.Study,
    settings: Settings,
    trials: int,
    *,
    data: Path | None = None,
    alone: bool = True,
    grace: float = 3600.0,
    on_trial: Callable[[optuna.trial.FrozenTrial], None] = lambda trial: None,
) -> None:
    """Run trials until the study has as many finished ones as asked for, all workers together.

    Alone, the proposals follow from the settings: a study that was interrupted and resumed is the
    study that was not.

    Args:
        study: From `ddpnopt.experiments.tune_study.open_study`.
        settings: The study's.
        trials: Finished (complete or pruned) trials to reach.
        data: Folder of files of data sets that are read from files.
        alone: No other worker takes part: proposals are deterministic.
        grace: Seconds without a sign of life after which another machine's trial is taken over.
        on_trial: Called after every trial.

    Raises:
        KeyboardInterrupt: Its trial is put back into the queue first.
    """
    requeue(study, grace)
    while open_places(study, trials) > 0:
        trial = claim(study, trials, settings.sampler_seed, alone=alone)
        if trial is None:
            break
        try:
            value = evaluate(trial, settings, data)
            study.tell(trial, value, skip_if_finished=True)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            study.enqueue_trial(trial.params)
            raise
        on_trial(study.trials[trial.number])
