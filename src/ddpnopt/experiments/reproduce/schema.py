# SPDX-License-Identifier: MIT
"""Settings files: one small TOML file per table, checked, that a user copies to make their own.

Whatever is wrong with a file is said with the file, the line, the key and what is allowed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ddpnopt.experiments.data import DATASETS
from ddpnopt.experiments.models import INITIALISATIONS, build_model
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import OPTIMIZERS, OptionValue, build_optimizer
from ddpnopt.experiments.reproduce.locate import line_of, lines_of
from ddpnopt.experiments.reproduce.mistakes import Misplaced, describe
from ddpnopt.experiments.scaling import SCALES

#: Characters of a settings file at most; the longest packaged one has a tenth of that.
MAX_LENGTH = 60_000


class SettingsError(ValueError):
    """A settings file can't be used; the message has a line for each mistake."""


class Strict(BaseModel):
    """Base of all settings: no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Strict)
Item = TypeVar("Item")


def _distinct(values: tuple[Item, ...]) -> tuple[Item, ...]:
    twice = [v for i, v in enumerate(values) if v in values[:i]]
    if twice:
        raise ValueError(f"{twice[0]} stands in the list twice")
    return values


def _initialisation(name: str) -> str:
    lookup(INITIALISATIONS, name.removesuffix("-zero-bias"), "initialisation")
    return name


def _architecture(name: str) -> str:
    for size in map(int, re.findall(r"\d+", name)):
        if not 1 <= size <= _LARGEST:
            raise ValueError(f"size {size} in {name!r}: allowed is 1 to {_LARGEST}")
    # On images of 8 x 8, which every kind of network takes; whether it takes the table's data is
    # checked before the first training. Without memory: a typo may be a network of terabytes.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        build_model(name, (1, 8, 8), 10)
    return name


def takes(optimizer: str, lr: float, options: Options, *where: str | int) -> None:
    """Check that an optimizer takes options.

    Args:
        optimizer: Registry name.
        lr: Learning rate.
        options: Its options.
        where: Keys that lead to the options from the model that asks.

    Raises:
        Misplaced: It does not.
    """
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(2, 2)
    try:
        build_optimizer(optimizer, model, lr, options)
    except (ValueError, TypeError) as error:
        raise Misplaced(str(error), *(where if options else ())) from error


def distinct_names(kind: str, names: Sequence[str], key: str = "name") -> None:
    """Check that the tables of an array are told apart by their names.

    Args:
        kind: Key of the array.
        names: Their names.
        key: Key of the names.

    Raises:
        Misplaced: Two have the same.
    """
    for number, name in enumerate(names):
        if name in names[:number]:
            raise Misplaced(f"{name!r} is the name of another {kind}, too", kind, number, key)


#: Largest width, depth or number of channels.
_LARGEST = 10_000
#: A TOML array as a tuple without repeats, one element at least.
Several = Annotated[tuple[Item, ...], Field(strict=False, min_length=1), AfterValidator(_distinct)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
ArchitectureName = Annotated[str, AfterValidator(_architecture)]
DatasetName = Annotated[str, AfterValidator(lambda n: lookup(DATASETS, n, "data set") and n)]
OptimizerName = Annotated[str, AfterValidator(lambda n: lookup(OPTIMIZERS, n, "optimizer") and n)]
InitialisationName = Annotated[str, AfterValidator(_initialisation)]
ScaleName = Annotated[str, AfterValidator(lambda n: lookup(SCALES, n, "scale") and n)]
Name = Annotated[str, Field(min_length=1)]
Options = dict[str, OptionValue]


class Quick(Strict):
    """Sizes of a run with `--quick`.

    Attributes:
        seeds: Seeds of the table.
        epochs: Epochs of every training.
        choosing_seeds: Seeds on which thresholds and rates are chosen.
        train_samples: Training samples to draw; the table's own number if not given.
    """

    seeds: Count = 2
    epochs: Count = 2
    choosing_seeds: Count = 1
    train_samples: Count | None = None


def packaged(name: str) -> str:
    """Return the text of the packaged settings file of a table or figure.

    Args:
        name: "table6", ...

    Returns:
        TOML.

    Raises:
        SettingsError: There is none.
    """
    file = files(__package__).joinpath("settings", f"{name}.toml")
    if not file.is_file():
        raise SettingsError(f"{name} has no settings file")
    return file.read_text()


def parse(model: type[Settings], text: str, source: str) -> Settings:
    """Read settings.

    Args:
        model: What the file describes.
        text: TOML.
        source: Name of the file, for messages.

    Returns:
        The settings.

    Raises:
        SettingsError: No TOML, unknown or missing keys, impossible values; every mistake on a line
            of its own: file, line, key, what was given, what is allowed.
    """
    # TOML allows texts that take time quadratic in their length to read.
    if len(text) > MAX_LENGTH:
        raise SettingsError(
            f"{source}: {len(text):,} characters, too long for settings (at most {MAX_LENGTH:,})"
        )
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source}: not TOML: {error}") from error
    except RecursionError as error:
        raise SettingsError(f"{source}: values inside values without end") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = lines_of(text)
        found = sorted(
            (line_of(lines, mistake.path), mistake.message)
            for mistake in describe(model, error.errors())
        )
        raise SettingsError(
            "\n".join(f"{source}, line {n}: {said}" for n, said in found)
        ) from error


def load(model: type[Settings], name: str, path: Path | None = None) -> Settings:
    """Load the settings of a table or figure.

    Args:
        model: What its file describes.
        name: "table6", ...
        path: The user's own file; None: the packaged one.

    Returns:
        The settings.

    Raises:
        SettingsError: See `parse`; also where the file can't be read.
    """
    if path is None:
        return parse(model, packaged(name), f"{name}.toml")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_LENGTH + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise SettingsError(
            f"{path}: can't be read ({reason}); `ddpnopt reproduce {name} --print-settings` prints "
            "a file to start from"
        ) from error
    return parse(model, text, str(path))


def closest(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean ...?", or nothing where no known name is close."""
    close = get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
