# SPDX-License-Identifier: MIT
"""Stored runs to look at: read from a store or a folder, and narrowed down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ddpnopt.experiments.optimizers import OptionValue
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore

STORE = "store.sqlite"
# What may differ between runs that are drawn as one optimizer's seeds or as rivals.
_FREE = {
    "dataset",
    "architecture",
    "optimizer",
    "options",
    "lr",
    "seed",
    "device",
    "record_updates",
}


def store_file(path: Path) -> Path:
    """Find the store that a path means.

    Args:
        path: A store's file, or the folder that one of the commands wrote.

    Returns:
        The file.

    Raises:
        ValueError: There is none, or several in the folder.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; --store names the store of your runs")
    if (path / STORE).is_file():
        return path / STORE
    found = sorted(path.glob("*.sqlite"))
    if len(found) != 1:
        listed = ", ".join(f.name for f in found) or "none"
        raise ValueError(f"{path}: no {STORE} in this folder (databases there: {listed})")
    return found[0]


def read_runs(path: Path, *, all_versions: bool = False) -> list[RunResult]:
    """Read stored runs.

    Args:
        path: A store, a folder with one, or a `result.json` of `ddpnopt train` or its folder.
        all_versions: Runs of other versions of the code, too.

    Returns:
        The runs in the order they came; crashed ones, which have no numbers, are left out.

    Raises:
        ValueError: Nothing can be read there.
    """
    record = path if path.suffix == ".json" else path / "result.json"
    if record.is_file():
        try:
            return [RunResult.model_validate_json(record.read_text(encoding="utf-8"))]
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{record}: not a record of `ddpnopt train` ({reason})") from error
    results = SqliteStore(store_file(path)).results(all_versions=all_versions)
    return [result for result in results if result.epochs]


def field(config: RunConfig, name: str) -> OptionValue:
    """A setting by name: a field of the configuration, or one of the optimizer's options."""
    if name in config.options:
        return config.options[name]
    value = getattr(config, name, None) if name in RunConfig.model_fields else None
    return value if isinstance(value, bool | int | float | str) else None


def matches(config: RunConfig, wanted: Mapping[str, Sequence[OptionValue]]) -> bool:
    """Say whether each setting of `wanted` has one of the values given for it."""
    return all(
        any(have == value or str(have) == str(value) for value in values)
        for name, values in wanted.items()
        for have in (field(config, name),)
    )


def select(
    results: Sequence[RunResult], wanted: Mapping[str, Sequence[OptionValue]]
) -> list[RunResult]:
    """Keep the runs with the settings asked for.

    Args:
        results: Runs.
        wanted: Setting -> values of which one must hold; settings as in `field`.

    Returns:
        The runs, at least one.

    Raises:
        ValueError: There is none; the message lists what there is.
    """
    found = [r for r in results if matches(r.config, wanted)]
    if not found:
        asked = ", ".join(f"{k}={'|'.join(map(str, v))}" for k, v in wanted.items())
        reason = f"no stored run has {asked}" if asked else "there are no runs"
        raise ValueError(f"{reason}; {contents(results)}")
    return found


def contents(results: Iterable[RunResult]) -> str:
    """List what runs there are, one line per data set, network and optimizer."""
    counts = Counter((r.config.dataset, r.config.architecture, r.config.optimizer) for r in results)
    if not counts:
        return (
            "the store holds no runs of this version of the code (--all-versions shows older "
            "ones; ddpnopt compare and ddpnopt reproduce make new ones)"
        )
    lines = [f"{d}, {a}, {o}: {n} runs" for (d, a, o), n in sorted(counts.items())]
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join(["the store holds:", *lines[:20], *more])


def refuse_mixtures(results: Sequence[RunResult]) -> None:
    """Refuse runs that differ in what is neither drawn nor told apart.

    Raises:
        ValueError: Runs of one data set and network differ in epochs, batch, scaling, ...; the
            message names the settings and how to choose.
    """
    seen: dict[tuple[str, str], dict[str, list[str]]] = {}
    for result in results:
        config = result.config
        own = seen.setdefault((config.dataset, config.architecture), {})
        for name, value in config.model_dump(exclude=_FREE).items():
            values = own.setdefault(name, [])
            if str(value) not in values:
                values.append(str(value))
    for (dataset, architecture), settings in seen.items():
        mixed = {name: values for name, values in settings.items() if len(values) > 1}
        if mixed:
            listed = "; ".join(f"{name}: {', '.join(values)}" for name, values in mixed.items())
            name, values = next(iter(mixed.items()))
            raise ValueError(
                f"the runs on {dataset}, {architecture} differ in settings that a plot would mix "
                f"({listed}); choose one of each, such as --where {name}={values[0]}"
            )
