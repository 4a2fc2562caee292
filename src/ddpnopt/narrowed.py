# SPDX-License-Identifier: MIT
"""Somebody else's optimizer, stepping for some of its parameters alone."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ddpnopt.decisions import traced
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inner import Reader, own_step, reader_of
from ddpnopt.typing import Tensor

Group = dict[str, Any]


@dataclass(eq=False)
class Inner:
    """One wrapped optimizer.

    Attributes:
        optimizer: It.
        reader: What is known about it.
        gains: By parameter: what its last update was per gradient, where that is all there is.
    """

    optimizer: torch.optim.Optimizer
    reader: Reader
    gains: dict[Tensor, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Inner:
        """With the reader of its type."""
        return cls(optimizer, reader_of(optimizer))

    def group_of(self) -> dict[Tensor, Group]:
        """Its groups by parameter."""
        return {p: group for group in self.optimizer.param_groups for p in group["params"]}

    def parameters(self) -> list[Tensor]:
        """Its parameters, in order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, parameters: Sequence[Tensor]) -> list[tuple[Group, Group]]:
        """Its own step for some of its parameters alone; hooks are not run.

        Returns:
            Each group with the copy of it that the step has seen, and may have counted in.
        """
        members: dict[int, list[Tensor]] = {}
        groups = self.group_of()
        for p in parameters:
            members.setdefault(id(groups[p]), []).append(p)
        # In place: some optimizers only show the groups of another one.
        shown = self.optimizer.param_groups
        whole = list(shown)
        used = [(g, _narrow(g, members[id(g)])) for g in whole if id(g) in members]
        try:
            shown[:] = [narrow for _, narrow in used]
            with torch.no_grad():
                own_step(type(self.optimizer))(self.optimizer)
        finally:
            shown[:] = whole
        return used


class Counted:
    """What narrowed steps have written to their groups: it must be the same for each of them."""

    def __init__(self) -> None:
        self._changed: dict[int, tuple[Group, Group]] = {}

    def add(self, used: Sequence[tuple[Group, Group]]) -> None:
        """After a step.

        Args:
            used: Each group with what the step has made of its copy.

        Raises:
            UnsupportedModelError: The groups' entries are named.
        """
        for group, seen in used:
            changed = {k: v for k, v in seen.items() if k != "params" and not holds(group, k, v)}
            _, known = self._changed.setdefault(id(group), (group, changed))
            differing = [k for k in {**known, **changed} if not holds(known, k, changed.get(k))]
            if known.keys() != changed.keys() or differing:
                raise UnsupportedModelError(
                    "the wrapped optimizer takes its parameters together (its groups' "
                    f"{', '.join({**known, **changed})} differ from layer to layer), so it "
                    "can't step layer by layer; use feedback='open_loop'"
                )

    def clear(self) -> None:
        """Forget."""
        self._changed.clear()

    def commit(self) -> None:
        """Write it to the groups."""
        for group, changed in self._changed.values():
            group.update(changed)
        self.clear()


def attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the numbers and tensors that an optimizer keeps outside its groups and state."""
    kinds = (int, float, Tensor)
    return {k: copied(v) for k, v in vars(optimizer).items() if isinstance(v, kinds)}


def _narrow(group: Group, members: list[Tensor]) -> Group:
    """A group's copy with some of its parameters, for a step to write to."""
    own = {k: members if k == "params" else copied(v) for k, v in group.items()}
    # A traced step's rate is the program's: no step writes to it.
    return {**own, "lr": group["lr"]} if traced() and "lr" in group else own


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the last bit."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple | deque) and isinstance(b, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    # Objects that can't be compared count as equal: what they do shows in the weights.
    return (getattr(type(a), "__eq__", None) is object.__eq__) or bool(a == b)


def copied(value: Any) -> Any:
    """A value that a step may change without changing the original; parameters are kept."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    return copy.deepcopy(value) if isinstance(value, list | dict | set) else value


def holds(values: Mapping[str, Any], key: str, value: Any) -> bool:
    """Whether a value is what it was."""
    return key in values and same(values[key], value)
