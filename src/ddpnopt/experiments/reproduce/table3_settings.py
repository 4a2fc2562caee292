# SPDX-License-Identifier: MIT
"""What the settings file of Table 3 contains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddpnopt.experiments.models import wants_images
from ddpnopt.experiments.optimizers import OptionValue
from ddpnopt.experiments.reproduce.ablation_settings import Contender, Network
from ddpnopt.experiments.reproduce.mistakes import Misplaced
from ddpnopt.experiments.reproduce.schema import (
    Count,
    Name,
    OptimizerName,
    Options,
    Positive,
    Seed,
    SettingsError,
    Strict,
    distinct_names,
    takes,
)


class Candidate(Strict):
    """A learning rate to choose from, with the options that go with it."""

    lr: Positive
    options: Options = {}


Candidates = Annotated[tuple[Candidate, ...], Field(strict=False, min_length=1)]


class Method(Strict):
    """A row of the table.

    Attributes:
        label: Its name in the table.
        optimizer: Registry name.
        options: Options on every network.
        dense: Further options on fully connected networks.
        conv: Further options on convolutional ones.
        candidates: What is tried on the choosing seeds.
        short: The same for problems that ask for the short list; not given: all.
        not_on: Problems that it is not run on, with the reason.
    """

    label: Name
    optimizer: OptimizerName
    options: Options = {}
    dense: Options = {}
    conv: Options = {}
    candidates: Candidates
    short: Candidates | None = None
    not_on: dict[str, str] = {}

    @model_validator(mode="after")
    def _options_exist(self) -> Method:
        for key in ("candidates", "short"):
            listed: tuple[Candidate, ...] = getattr(self, key) or ()
            for number, candidate in enumerate(listed):
                for own in (self.dense, self.conv):
                    self._check(candidate.lr, own, candidate.options, key, number)
        return self

    def _check(self, lr: float, own: Options, last: Options, key: str, number: int) -> None:
        """Refuse options at the place that brings in the one that does not exist."""
        try:
            takes(self.optimizer, lr, {**self.options, **own, **last})
        except Misplaced:
            takes(self.optimizer, lr, self.options, "options")
            takes(
                self.optimizer,
                lr,
                {**self.options, **own},
                "dense" if own is self.dense else "conv",
            )
            takes(self.optimizer, lr, {**self.options, **own, **last}, key, number, "options")
            raise

    def contender(self, architecture: str, candidate: Candidate) -> Contender:
        """The optimizer and its options on a network."""
        own = self.conv if wants_images(architecture) else self.dense
        options: dict[str, OptionValue] = {**self.options, **own, **candidate.options}
        return self.optimizer, options

    def tried(self, problem: Problem) -> tuple[Candidate, ...]:
        """The candidates on a problem."""
        return self.short if problem.candidates == "short" and self.short else self.candidates


class Problem(Network):
    """A column of the table.

    Attributes:
        name: Its name in the table; the data's origin is added where it is a copy or a part.
        seeds: Seeds of the table.
        choosing_seeds: Seeds on which rates are chosen.
        choosing_epochs: Epochs of the trainings for choosing; not given: those of the table.
        choosing_samples: Training samples of them; not given: those of the table.
        candidates: Which of the methods' lists is tried.
    """

    name: Name
    seeds: Count
    choosing_seeds: Count = 1
    choosing_epochs: Count | None = None
    choosing_samples: Count | None = None
    candidates: Literal["all", "short"] = "all"


class QuickTable3(Strict):
    """Sizes with `--quick`: each method's first candidate, nothing is chosen.

    Attributes:
        seeds: Seeds.
        epochs: Epochs.
        train_samples: Most training samples of sets that are read from files.
    """

    seeds: Count = 1
    epochs: Count = 1
    train_samples: Count = 512


class Table3Settings(Strict):
    """The settings file of Table 3.

    Attributes:
        first_seed: First seed of the table.
        first_choosing_seed: First of the seeds on which rates are chosen.
        quick: Sizes with `--quick`.
        problem: Columns.
        method: Rows; differences are to the first one.
    """

    first_seed: Seed = 0
    first_choosing_seed: Seed = 1000
    quick: QuickTable3 = QuickTable3()
    problem: Annotated[tuple[Problem, ...], Field(strict=False, min_length=1)]
    method: Annotated[tuple[Method, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Table3Settings:
        names = [p.name for p in self.problem]
        distinct_names("problem", names)
        distinct_names("method", [m.label for m in self.method], "label")
        for number, method in enumerate(self.method):
            for name in method.not_on:
                if name not in names:
                    raise Misplaced(
                        f"no problem has this name; known: {', '.join(map(repr, names))}",
                        *("method", number, "not_on", name),
                    )
        for problem in self.problem:
            try:
                self.seeds_of(problem, problem.seeds)
            except SettingsError as error:
                raise Misplaced(str(error), "first_choosing_seed") from error
        return self

    def seeds_of(self, problem: Problem, seeds: int) -> tuple[range, range]:
        """The table's seeds and the choosing ones.

        Raises:
            SettingsError: They overlap.
        """
        own = range(self.first_seed, self.first_seed + seeds)
        chosen = range(self.first_choosing_seed, self.first_choosing_seed + problem.choosing_seeds)
        if set(own) & set(chosen):
            raise SettingsError(
                f"{problem.name}: choosing seeds {chosen[0]} to {chosen[-1]} overlap with its "
                f"{own[0]} to {own[-1]}; allowed is first_choosing_seed = {own[-1] + 1} or more"
            )
        return own, chosen
