# SPDX-License-Identifier: MIT
"""Where a study is kept, and how its workers share it: storages, settings, interrupted trials."""

from __future__ import annotations

import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from ddpnopt.experiments.tune import Settings

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_FORMS = (
    "an SQLite file (tune.db), a journal file on a shared disk (tune.journal) or a database URL "
    "(postgresql://user@host/name)"
)
# Signs of life are written at most this often, in seconds.
_BEAT = 10.0


class StorageError(ValueError):
    """A study's storage can't be used; the message says which and why."""


def open_storage(text: str) -> BaseStorage:
    """Open or make the place where studies are kept.

    Args:
        text: An SQLite file (.db, .sqlite, .sqlite3), a journal file (.journal, .log), which is
            safe on network file systems, or a database URL that SQLAlchemy takes.

    Raises:
        StorageError: None of these, or the database can't be reached.
    """
    path = Path(text.removeprefix("sqlite:///")) if text.startswith("sqlite:///") else Path(text)
    is_url = "://" in text and not text.startswith("sqlite:///")
    shown = text
    try:
        if is_url:
            shown = _without_password(text)
            return RDBStorage(text)
        if path.suffix not in (".db", ".sqlite", ".sqlite3", ".journal", ".log"):
            raise StorageError(f"storage {text!r}: give {_FORMS}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".journal", ".log"):
            return JournalStorage(JournalFileBackend(str(path)))
        # Workers wait for one another instead of failing on a locked file.
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    except StorageError:
        raise
    # Whatever a database driver raises, it is this storage that can't be used.
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        reason = first.replace(text, shown)
        raise StorageError(f"storage {shown!r} can't be used: {reason}; give {_FORMS}") from error


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def _pruner(kind: str, epochs: int) -> optuna.pruners.BasePruner:
    if kind == "median":
        # The first epoch says little: rates that begin slowly would be lost.
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=min(2, epochs))
    if kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return optuna.pruners.NopPruner()


def read_settings(storage: BaseStorage, name: str) -> Settings:
    """Read the settings that a study carries.

    Args:
        storage: From `open_storage`.
        name: The study's.

    Raises:
        ValueError: No such study (the message lists those there are), or one made otherwise.
    """
    from ddpnopt.experiments.tune import Settings

    names = sorted(optuna.get_all_study_names(storage))
    if name not in names:
        known = ", ".join(names) or "none"
        raise ValueError(f"no study {name!r} in this storage; there: {known}")
    study = optuna.load_study(study_name=name, storage=storage)
    if "settings" not in study.user_attrs:
        raise ValueError(f"study {name!r} was not made by ddpnopt tune; give another --study")
    return Settings.model_validate(study.user_attrs["settings"])


def open_study(storage: BaseStorage, name: str, settings: Settings) -> optuna.Study:
    """Open a study, or make it.

    Args:
        storage: From `open_storage`.
        name: The study's.
        settings: What is asked.

    Returns:
        The study.

    Raises:
        ValueError: The study has other settings; the message names the differences.
    """
    names = optuna.get_all_study_names(storage)
    if name in names:
        refuse_differences(name, read_settings(storage, name), settings)
    direction = "maximize" if settings.objective == "accuracy" else "minimize"
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        direction="maximize" if direction == "maximize" else "minimize",
        pruner=_pruner(settings.pruner, settings.run.epochs),
        load_if_exists=True,
    )
    if name not in names:
        study.set_user_attr("settings", settings.model_dump(mode="json"))
    return study


def refuse_differences(name: str, has: Settings, asked: Settings) -> None:
    """Raise where two settings differ.

    Raises:
        ValueError: They differ; the message names every difference.
    """
    from ddpnopt.experiments.tune import flat

    old, new = flat(has), flat(asked)
    keys = [k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    if keys:
        listed = "; ".join(f"{k} is {old.get(k)!r}, asked {new.get(k)!r}" for k in keys)
        raise ValueError(
            f"study {name!r} has other settings: {listed}. Give another --study, or --worker "
            "without these options to take part with the study's own"
        )


def _place() -> str:
    """Name the machine, and on Linux this boot and space of process numbers."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_dead(trial: FrozenTrial, grace: float) -> bool:
    worker = trial.user_attrs.get("worker", {})
    if worker.get("place") == _place():
        try:
            os.kill(worker["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False
    started = trial.datetime_start.timestamp() if trial.datetime_start else time.time()
    return time.time() - float(trial.user_attrs.get("beat", started)) > grace


def requeue(study: optuna.Study, grace: float = 3600.0) -> list[int]:
    """Fail the trials whose worker has died, and queue their values for another try.

    Args:
        study: The study.
        grace: Seconds without a sign of life that another machine's worker is given; a worker of
            this machine is looked up.

    Returns:
        Numbers of the trials.
    """
    found: list[int] = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial, grace):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            if trial.params:
                study.enqueue_trial(trial.params)
            found.append(trial.number)
    return found


def open_places(study: optuna.Study, trials: int) -> int:
    """How many trials are left to begin until `trials` are finished."""
    taken = (*FINISHED, TrialState.RUNNING)
    return trials - len(study.get_trials(deepcopy=False, states=taken))


def claim(study: optuna.Study, trials: int, seed: int, *, alone: bool) -> optuna.Trial | None:
    """Begin the next trial.

    Args:
        study: The study.
        trials: Trials that the study is to have.
        seed: Seed of the proposals.
        alone: The proposal follows from `seed` and the trial's place among those that count, so
            that resuming proposes what would have been proposed; else workers differ.

    Returns:
        The trial; None where other workers have begun the last ones at the same moment.
    """
    counted = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
    index = len(study.get_trials(deepcopy=False, states=counted))
    own = index if alone else uuid.uuid4().int
    study.sampler = optuna.samplers.TPESampler(
        seed=(seed * 1_000_003 + own) % 2**32, constant_liar=not alone
    )
    trial = study.ask()
    trial.set_user_attr("worker", {"place": _place(), "pid": os.getpid()})
    beat(trial)
    running = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING))
    if sorted(t.number for t in running).index(trial.number) >= trials:
        study.tell(trial, state=TrialState.FAIL)
        return None
    return trial


def beat(trial: optuna.Trial) -> None:
    """Leave a sign of life, unless the last one is recent."""
    now = time.time()
    if now - float(trial.user_attrs.get("beat", 0.0)) > _BEAT:
        trial.set_user_attr("beat", now)
