# SPDX-License-Identifier: MIT
"""Settings of Table 4 and Fig. 3: whose steps are measured, and at which sizes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddpnopt.experiments.reproduce.mistakes import Misplaced
from ddpnopt.experiments.reproduce.schema import (
    Count,
    Name,
    OptimizerName,
    Options,
    Positive,
    Several,
    Strict,
    distinct_names,
    takes,
)
from ddpnopt.experiments.reproduce.step_cost import Task

Axis = Literal["batch", "width", "depth"]
AXES: tuple[Axis, ...] = ("batch", "width", "depth")
#: The paper's letters.
LETTERS = {"batch": "B", "width": "X", "depth": "L"}
Rounds = Annotated[int, Field(ge=1, le=1000)]
Bounds = Annotated[tuple[float, float], Field(strict=False)]


class Method(Strict):
    """An optimizer whose step is measured.

    Attributes:
        name: Its name in tables.
        optimizer: Registry name.
        lr: Learning rate; no cost depends on it.
        options: The optimizer's options.
        period: Steps between two decompositions (KFAC, EKFAC): timed together.
    """

    name: Name
    optimizer: OptimizerName
    lr: Positive = 0.01
    options: Options = {}
    period: Annotated[int, Field(ge=1, le=1000)] = 1

    @model_validator(mode="after")
    def _options_exist(self) -> Self:
        takes(self.optimizer, self.lr, self.options, "options")
        return self

    def task(self, batch: int, width: int, depth: int, inputs: int | None = None) -> Task:
        """A step at a size."""
        options = tuple(sorted(self.options.items()))
        return Task(
            self.name, self.optimizer, options, self.lr, self.period, batch, width, depth, inputs
        )


class Sizes(Strict):
    """Sizes along each axis, and where the two others stand meanwhile.

    Attributes:
        batch: Values of B, rising.
        width: Values of X, rising.
        depth: Values of L, rising.
        base: (B, X, L).
    """

    batch: Several[Count]
    width: Several[Count]
    depth: Several[Count]
    base: Annotated[tuple[Count, Count, Count], Field(strict=False)]

    @model_validator(mode="after")
    def _two_or_more_rising(self) -> Self:
        for axis in AXES:
            values: tuple[int, ...] = getattr(self, axis)
            if len(values) < 2 or list(values) != sorted(values):
                raise Misplaced(
                    f"{list(values)}: allowed are two sizes or more, in rising order", axis
                )
        return self

    def along(self, axis: Axis, most: int | None) -> list[tuple[int, int, int]]:
        """Sizes (B, X, L) along one axis; the `most` smallest only, unless None."""
        values: tuple[int, ...] = getattr(self, axis)
        at = AXES.index(axis)
        found = []
        for value in values[:most]:
            batch, width, depth = (value if i == at else one for i, one in enumerate(self.base))
            found.append((batch, width, depth))
        return found


class GrowingMethod(Method):
    """A method of Table 4.

    Attributes:
        time: Sizes at which it is timed.
        memory: Sizes at which its memory is measured.
        published: Name of the published growth to compare with; None: none is published.
    """

    time: Sizes
    memory: Sizes
    published: str | None = None


class Exponents(Strict):
    """Published exponents in B, X and L, each a lowest and a highest value.

    A sum such as X^2 L + B X grows like B^0 where the first term is larger and like B^1 where
    the second is.
    """

    batch: Bounds
    width: Bounds
    depth: Bounds | None = None


class Growth(Strict):
    """Published growth of a class of methods; None: the source does not say."""

    time: Exponents | None = None
    memory: Exponents | None = None


class QuickGrowth(Strict):
    """Sizes of a quick run.

    Attributes:
        rounds: Timed rounds.
        sizes: The so many smallest sizes of each axis are measured.
    """

    rounds: Rounds = 2
    sizes: Annotated[int, Field(ge=2, le=100)] = 2


class Table4(Strict):
    """Table 4.

    Attributes:
        rounds: Timed rounds; the fastest counts.
        tolerance: A measured exponent agrees with the published one within this.
        quick: Sizes of a quick run.
        published: What the paper states, by name.
        method: The methods.
    """

    rounds: Rounds
    tolerance: Positive
    quick: QuickGrowth = QuickGrowth()
    published: dict[str, Growth]
    method: Several[GrowingMethod]

    @model_validator(mode="after")
    def _names_known(self) -> Self:
        distinct_names("method", [method.name for method in self.method])
        for number, method in enumerate(self.method):
            if method.published is not None and method.published not in self.published:
                raise Misplaced(
                    f"unknown name {method.published!r}; known: {', '.join(self.published)}",
                    *("method", number, "published"),
                )
        return self


class BarMethod(Method):
    """A method of Fig. 3.

    Attributes:
        most: Largest batch at which it is measured; None: all.
    """

    most: Count | None = None


class QuickBars(Strict):
    """Sizes of a quick run of Fig. 3."""

    rounds: Rounds = 2
    batches: Several[Count] = (8, 32)


class Figure3(Strict):
    """Fig. 3.

    Attributes:
        rounds: Timed rounds; the fastest counts.
        inputs: Features of a sample.
        width: X.
        depth: Hidden layers.
        batches: Values of B.
        baseline: Name of the method that ratios are taken to.
        quick: Sizes of a quick run.
        method: The methods.
    """

    rounds: Rounds
    inputs: Count
    width: Count
    depth: Count
    batches: Several[Count]
    baseline: str
    quick: QuickBars = QuickBars()
    method: Several[BarMethod]

    @model_validator(mode="after")
    def _baseline_known(self) -> Self:
        names = [method.name for method in self.method]
        distinct_names("method", names)
        if self.baseline not in names:
            raise Misplaced(
                f"unknown method {self.baseline!r}; known: {', '.join(names)}", "baseline"
            )
        return self
