# SPDX-License-Identifier: MIT
"""What has been traced, and what a run of it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ddpnopt.captured.tracing import Tracer
from ddpnopt.report import LayerReport, StepReport
from ddpnopt.typing import Tensor


@dataclass(frozen=True, eq=False)
class Slot:
    """A place of the optimizer's state.

    Attributes:
        holder: Finds the dictionary.
        key: The name in it.
        counts: A number is there that the host goes by.
        turns: What is there is in a basis that rounding alone may turn.
    """

    holder: Callable[[], dict[Any, Any]]
    key: Any
    counts: bool = False
    turns: bool = False

    @property
    def found(self) -> Any:
        """What is there now; None for nothing."""
        return self.holder().get(self.key)

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there."""
        found = self.found
        assert isinstance(found, torch.Tensor)
        return found

    def put(self, value: Any) -> None:
        """Replace it."""
        self.holder()[self.key] = value


class Places:
    """Several slots, each dictionary looked up once for all of its own.

    Args:
        slots: Those of one dictionary one after another.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._keys: list[tuple[Callable[[], dict[Any, Any]], list[Any]]] = []
        for slot in slots:
            if not self._keys or self._keys[-1][0] is not slot.holder:
                self._keys.append((slot.holder, []))
            self._keys[-1][1].append(slot.key)

    @property
    def found(self) -> list[Any]:
        """What is there now; None for nothing."""
        held = [(holder(), keys) for holder, keys in self._keys]
        return [known.get(key) for known, keys in held for key in keys]

    def put(self, values: Iterable[Any]) -> None:
        """Replace it."""
        rest = iter(values)
        for holder, keys in self._keys:
            holder().update(zip(keys, rest, strict=False))


@dataclass(frozen=True, eq=False)
class Recording:
    """What a traced iteration was given and has made.

    Attributes:
        tracer: Its operators.
        sound: Whether the decisions are as they were.
        inputs: Tensors that differ from run to run; None where there is none.
        rates: The groups' learning rates.
        state: The places of the state, with the tensors that were there before.
        counts: Those of numbers that the host goes by, with these.
        made: What the loss function returned.
        report: What the step has done.
        scratch: The optimizer's own memory for copies of weights, by parameter.
        modules: Those of the model.
    """

    tracer: Tracer
    sound: Tensor
    inputs: Sequence[Tensor | None]
    rates: Sequence[Tensor]
    state: Sequence[tuple[Slot, Tensor]]
    counts: Sequence[tuple[Slot, int]]
    made: Any
    report: StepReport | None
    scratch: dict[int, Tensor]
    modules: Sequence[nn.Module]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run has made.

    Attributes:
        made: As the loss function returns it; None where nobody asks.
        report: For ``opt.last_step``, made when it is asked for.
        state: The tensors for the slots.
        counts: The numbers for those of counts.
    """

    made: Any
    report: Callable[[], StepReport | None]
    state: Sequence[Tensor]
    counts: Sequence[int]


@dataclass(frozen=True)
class At:
    """Stands for a result of the program.

    Attributes:
        place: Which one.
    """

    place: int


def reported(report: StepReport | None) -> list[Any]:
    """The tensors of a step's record, or what stands for them, in order."""
    found: list[Any] = []
    mapped(report, found.append)
    return found


def mapped(report: StepReport | None, f: Callable[[Any], Any]) -> StepReport | None:
    """A record with each tensor replaced."""
    if report is None:
        return None
    front = None if report.front is None else _layer(report.front, f)
    return replace(report, layers=tuple(_layer(one, f) for one in report.layers), front=front)


def _layer(one: LayerReport, f: Callable[[Any], Any]) -> LayerReport:
    given = (getattr(one, field.name) for field in fields(one)[1:])
    return LayerReport(one.name, *(None if t is None else f(t) for t in given))


def told(outcome: Outcome, skipped: int) -> Callable[[], StepReport | None]:
    """The record of the step that a run has made, made when it is asked for.

    Args:
        outcome: What the run has made.
        skipped: Steps skipped so far.
    """

    def report() -> StepReport | None:
        made = outcome.report()
        return None if made is None else replace(made, skipped=skipped)

    return report
