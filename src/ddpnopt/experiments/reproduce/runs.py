# SPDX-License-Identifier: MIT
"""The trainings behind a result: made where the store lacks them, read from it otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console

from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.reproduce.outcome import Request
from ddpnopt.experiments.store import SqliteStore
from ddpnopt.experiments.sweep import sweep

#: Seconds per step of a small dense network on one core, by the beginning of what is run; only for
#: an estimate before anything like it is in the store.
_GUESSES = (
    ("ddpnopt dense", 6e-3),
    ("ddpnopt", 4e-3),
    ("ekfac", 4e-3),
    ("kfac", 4e-3),
    ("vanilla-ddp", 5e-2),
    ("emsa", 1e-2),
    ("", 5e-4),
)
#: Samples assumed where a data set's training part is not known without loading it.
_SAMPLES = {"digits": 1437, "wine": 142, "mnist": 60_000, "fashion-mnist": 60_000}
#: Minutes from which on the estimate is told.
_TELL = 0.5


def obtain(request: Request, configs: Sequence[RunConfig], title: str) -> dict[str, RunResult]:
    """Return the results of `configs`, training what the store lacks unless `request.run` is False.

    Args:
        request: What the user asked for.
        configs: What is needed, repeats allowed.
        title: Shown beside the progress bar.

    Returns:
        Results by `RunConfig.key`; what could not be had is left out.
    """
    store = request.store
    unique = {config.key: config for config in configs}
    if request.run:
        present = store.keys()
        missing = [c for c in unique.values() if store.key(c) not in present]
        if missing:
            tell(request, missing, title)
            sweep(
                missing,
                store,
                jobs=request.jobs,
                title=title,
                console=request.console,
                dask=request.dask,
            )
    found = {key: store.get(store.key(config)) for key, config in unique.items()}
    return {key: result for key, result in found.items() if result is not None}


def tell(request: Request, missing: Sequence[RunConfig], title: str) -> None:
    """Say about how long the missing trainings take, where that is long."""
    minutes = estimate(missing, request.store) / 60 / max(request.jobs, 1)
    if minutes >= _TELL:
        console = request.console or Console(stderr=True)
        console.print(f"{title}: {len(missing)} trainings, about {minutes:.0f} minutes")


def estimate(configs: Iterable[RunConfig], store: SqliteStore) -> float:
    """Estimate the seconds that trainings take on one core.

    Args:
        configs: What is going to be run.
        store: Where similar runs may be: their seconds per step and sample are used, else a guess.

    Returns:
        Seconds, summed.
    """
    known: dict[tuple[object, ...], list[float]] = {}
    for result in store.results():
        steps = _steps(result.config) * len(result.epochs) / max(result.config.epochs, 1)
        if steps and result.seconds:
            known.setdefault(_kind(result.config), []).append(result.seconds / steps)
    total = 0.0
    for config in configs:
        measured = known.get(_kind(config))
        total += _steps(config) * (statistics.median(measured) if measured else _guess(config))
    return total


def _kind(config: RunConfig) -> tuple[object, ...]:
    """What decides the cost of a step."""
    options = config.options
    names = tuple(sorted((k, v) for k, v in options.items() if isinstance(v, str)))
    return config.dataset, config.architecture, config.batch, config.optimizer, names


def _steps(config: RunConfig) -> float:
    samples = config.train_samples or _SAMPLES.get(config.dataset, 50_000)
    return config.epochs * samples / config.batch


def _guess(config: RunConfig) -> float:
    name = f"{config.optimizer} {config.options.get('value', '')}"
    dense = next(seconds for start, seconds in _GUESSES if name.startswith(start))
    # A convolutional step on a batch of images is hundreds of times a small dense one.
    return dense if config.architecture.startswith(("mlp", "linear")) else dense + 0.2


def spent(results: Iterable[RunResult]) -> float:
    """Seconds in the steps of `results`, summed."""
    return sum(r.seconds for r in results)
