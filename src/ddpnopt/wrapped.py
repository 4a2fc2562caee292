# SPDX-License-Identifier: MIT
"""Updates made by somebody else's optimizer, for a few parameters at a time, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ddpnopt.borrowed import Borrowed, Update
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

    def step(self, parameters: Sequence[Tensor]) -> list[tuple[Group, Group]]:
        """Its own step for some of its parameters alone; hooks are not run.

        Returns:
            Each group with the copy of it that the step has seen, and may have counted in.
        """
        members: dict[int, list[Tensor]] = {}
        groups = self.group_of()
        for p in parameters:
            members.setdefault(id(groups[p]), []).append(p)
        whole = self.optimizer.param_groups
        used = [(g, {**g, "params": members[id(g)]}) for g in whole if id(g) in members]
        self.optimizer.param_groups = [narrow for _, narrow in used]
        try:
            with torch.no_grad():
                own_step(type(self.optimizer))(self.optimizer)
        finally:
            self.optimizer.param_groups = whole
        return used


class Wrapped(Borrowed):
    """The wrapped optimizers' updates.

    Args:
        inners: The optimizers.
        copies: Memory for the weights before the step, kept from step to step.
    """

    def __init__(self, inners: Sequence[Inner], copies: dict[int, Tensor]) -> None:
        self._group: dict[Tensor, Group] = {}
        self._inner: dict[Tensor, Inner] = {}
        hyper = {}
        for inner in inners:
            for p, group in inner.group_of().items():
                self._group[p], self._inner[p] = group, inner
                gain = inner.gains.get(p)
                hyper[p] = inner.reader.hyper(group, 0.0 if gain is None else float(gain))
        states = {p: s for i in inners for p, s in i.optimizer.state.items() if s}
        super().__init__(hyper, states, copies)
        self._before: dict[Tensor, _Saved] = {}
        self._counted: dict[int, tuple[Group, Group]] = {}
        self._gains: dict[Tensor, Tensor] = {}

    def needs_plain(self, p: Tensor) -> bool:
        """To feed the second moment, or to shorten the update from outside."""
        return super().needs_plain(p) or self._inner[p].reader.rescales

    def apply(self, updates: Sequence[Update]) -> None:
        """One step of each optimizer for these parameters alone."""
        by_inner: dict[int, list[Update]] = {}
        for update in updates:
            by_inner.setdefault(id(self._inner[update.p]), []).append(update)
        for some in by_inner.values():
            self._apply(self._inner[some[0].p], some)

    def step(self, update: Update) -> None:
        """One parameter alone."""
        self.apply([update])

    def _apply(self, inner: Inner, updates: Sequence[Update]) -> None:
        for update in updates:
            self._save(update.p)
            self._before[update.p] = _Saved.of(inner.optimizer.state, update.p)
        self.prepare(inner, updates)
        with stepping_on({u.p: u.d for u in updates}):
            self._count(inner.step([u.p for u in updates]))
        self.settle(inner, updates)

    def prepare(self, inner: Inner, updates: Sequence[Update]) -> None:
        """Before an optimizer's step on re-weighted gradients."""
        if inner.reader.rescales:
            for update in updates:
                self._save(update.p)
        self._make_ready(inner, updates)
        for update in updates:
            self._feed(inner, update)

    def settle(self, inner: Inner, updates: Sequence[Update]) -> None:
        """After it."""
        if inner.reader.rescales:
            for update in updates:
                self._watch(update)

    def _make_ready(self, inner: Inner, updates: Sequence[Update]) -> None:
        """Give parameters a state to feed before their first step: made by a step, and undone."""
        reader, state = inner.reader, inner.optimizer.state
        new = [u.p for u in updates if u.follows and reader.moment not in state.get(u.p, {})]
        if not reader.moment or not new:
            return
        before = {p: p.clone() for p in new}
        with stepping_on({p: torch.zeros_like(p) for p in new}):
            inner.step(new)
        for p in new:
            p.copy_(before[p])
            for name, value in state[p].items():
                start = reader.blank.get(name, 0.0)
                if isinstance(value, Tensor):
                    value.fill_(start)
                elif isinstance(value, int | float):
                    state[p][name] = type(value)(start)

    def _feed(self, inner: Inner, update: Update) -> None:
        """Let the second moment see the plain gradient where that is larger."""
        p = update.p
        state = inner.optimizer.state.get(p)
        if update.follows and update.plain is not None and state and inner.reader.moment in state:
            plain, d = self.decayed(p, update.plain), self.decayed(p, update.d)
            inner.reader.feed(self._group[p], state, plain, d)

    def _watch(self, update: Update) -> None:
        """Shorten the update of an optimizer of which nothing is known, and note its gain."""
        p = update.p
        d = update.d.flatten().float()
        length = d.dot(d)
        before = self._saved[p]
        moved = (before - p).flatten().float()
        gain = torch.where(length > 0, d.dot(moved) / length, length)
        # Uphill, or not at all: no curvature is met on the way.
        self._gains[p] = gain.clamp_(min=0.0)
        if update.plain is None or update.plain is update.d:
            return
        plain = update.plain.flatten().float()
        whole = plain.dot(plain)
        r = torch.where(whole > 0, d.dot(plain) / whole, torch.ones_like(whole)).clamp_(0.0, 1.0)
        shorter = torch.lerp(before, p, r.to(p.dtype))
        p.copy_(torch.where(r == 1.0, p, shorter))

    def _count(self, used: Sequence[tuple[Group, Group]]) -> None:
        """What a step has written to its groups must be the same for every layer."""
        for group, seen in used:
            changed = {k: v for k, v in seen.items() if k != "params" and not _same(v, group[k])}
            known = self._counted.get(id(group))
            if known is None:
                self._counted[id(group)] = group, changed
            elif known[1].keys() != changed.keys() or any(
                not _same(v, known[1][k]) for k, v in changed.items()
            ):
                raise UnsupportedModelError(
                    "the wrapped optimizer takes its parameters together (its groups' "
                    f"{', '.join({**known[1], **changed})} differ from layer to layer), so it "
                    "can't step layer by layer; use feedback='open_loop'"
                )

    def rollback(self) -> None:
        """Restore parameters and states."""
        super().rollback()
        for saved in self._before.values():
            saved.restore()

    def restart(self) -> None:
        """Take all updates back, to be made again another way."""
        self.rollback()
        self._counted.clear()

    def statistics(self) -> dict[Tensor, list[Tensor]]:
        """The states' tensors of the parameters that have been stepped, where they have grown."""
        return {
            p: [
                value
                for value in self._inner[p].optimizer.state.get(p, {}).values()
                if isinstance(value, Tensor)
                and value.is_floating_point()
                and value.shape == p.shape
            ]
            for p in self._before
        }

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Counters and gains; the states have been written by their optimizers."""
        for group, changed in self._counted.values():
            group.update(changed)
        for p, gain in self._gains.items():
            self._inner[p].gains[p] = gain


@dataclass(frozen=True, eq=False)
class _Saved:
    """One parameter's state before the step, to be put back."""

    states: dict[Tensor, Any]
    p: Tensor
    known: bool
    values: Mapping[str, Any]
    copies: Mapping[str, Any]

    @classmethod
    def of(cls, states: dict[Tensor, Any], p: Tensor) -> _Saved:
        known = p in states
        values = dict(states[p]) if known else {}
        copies = {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in values.items()
        }
        return cls(states, p, known, values, copies)

    def restore(self) -> None:
        """Put it back, into the tensors that it was in."""
        if not self.known:
            self.states.pop(self.p, None)
            return
        state = self.states[self.p]
        state.clear()
        for name, value in self.values.items():
            if isinstance(value, Tensor):
                state[name] = value.copy_(self.copies[name])
            else:
                state[name] = self.copies[name]


@contextmanager
def stepping_on(gradients: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within the block p.grad is the given gradient."""
    before = {p: p.grad for p in gradients}
    for p, d in gradients.items():
        p.grad = d
    try:
        yield
    finally:
        for p, grad in before.items():
            p.grad = grad


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return both and a.shape == b.shape and bool(torch.equal(a, b))
    return bool(a == b)
