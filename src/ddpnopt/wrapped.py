# SPDX-License-Identifier: MIT
"""Updates made by somebody else's optimizer, for a few parameters at a time, all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddpnopt.borrowed import MOMENTA, Borrowed
from ddpnopt.curvature.trust import Bounded, lengths
from ddpnopt.decisions import as_number
from ddpnopt.dtensors import local, summed
from ddpnopt.hyperparameters import Hyper
from ddpnopt.narrowed import Counted, Group, Inner, attributes, copied, holds
from ddpnopt.typing import Tensor
from ddpnopt.undoing import Undoing
from ddpnopt.updates import Update


class Wrapped(Borrowed):
    """The wrapped optimizers' updates.

    Args:
        inners: The optimizers.
        copies: Memory for the weights before the step, kept from step to step.
        trust: Bound each unit's update by the unit, as `ddpnopt.curvature.Trust` does; True, or
            tau.
    """

    judges_sparse = True

    def __init__(
        self, inners: Sequence[Inner], copies: dict[int, Tensor], trust: bool | float = False
    ) -> None:
        self._group: dict[Tensor, Group] = {}
        self._inner: dict[Tensor, Inner] = {}
        hyper = {}
        for inner in inners:
            for p, group in inner.group_of().items():
                self._group[p], self._inner[p] = group, inner
                gain = inner.gains.get(p)
                hyper[p] = inner.reader.hyper(group, 0.0 if gain is None else as_number(gain))
        if trust is not False:
            hyper = bounded(hyper, None if trust is True else trust)
        states = {p: s for i in inners for p, s in i.optimizer.state.items() if s}
        super().__init__(hyper, states, copies)
        self._undoing = Undoing()
        self._before: dict[Tensor, _Saved] = {}
        self._counted = Counted()
        self._attributes: dict[int, tuple[torch.optim.Optimizer, Group]] = {}
        self._gains: dict[Tensor, Tensor] = {}
        self._given: dict[Tensor, tuple[Tensor, Tensor | None]] = {}

    def exchange(self, twins: Mapping[Tensor, Tensor], of: Callable[[Tensor], Tensor]) -> None:
        """Stand for other parameters than the optimizers'; nothing can be stepped then.

        Args:
            twins: By the optimizers' parameter.
            of: Makes a state's tensor that of the twin.
        """

        def moved(state: Mapping[str, Any]) -> dict[str, Any]:
            kept = {name: value for name, value in state.items() if name not in MOMENTA}
            return {n: of(v) if isinstance(v, Tensor) else v for n, v in kept.items()}

        self.hyper = {twins.get(p, p): hyper for p, hyper in self.hyper.items()}
        self._state = {twins.get(p, p): moved(self.state(p)) for p in list(self._group)}
        self._inner = {twins.get(p, p): inner for p, inner in self._inner.items()}

    def begun_with(self, p: Tensor) -> Mapping[str, Any]:
        """The parameter's state before its optimizer has written to it."""
        saved = self._before.get(p)
        return self.state(p) if saved is None else {**saved.values, **saved.copies}

    def needs_plain(self, p: Tensor) -> bool:
        """To feed the second moment, or to shorten the update from outside."""
        return super().needs_plain(p) or self._inner[p].reader.rescales

    def rate(self, parameters: Sequence[Tensor]) -> None:
        """The optimizer takes its own steps."""
        return None

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
        optimizer = inner.optimizer
        if id(optimizer) not in self._attributes:
            self._attributes[id(optimizer)] = optimizer, attributes(optimizer)
        self.save([update.p for update in updates])
        for update in updates:
            self._before[update.p] = _Saved.of(optimizer.state, update.p)
        updates = [self._within(inner, update) for update in updates]
        self.prepare(inner, updates)
        with self._stepping_on({u.p: u.d for u in updates}):
            self._counted.add(inner.step([u.p for u in updates]))
        self.settle(inner, updates)
        self.look([u.p for u in updates])

    def _within(self, inner: Inner, update: Update) -> Update:
        """On a gradient whose step is no longer than the bound, where there is one.

        The second moment sees the whole gradient: the optimizer would undo the bound.
        """
        p, hyper = update.p, self.hyper[update.p]
        if not isinstance(hyper.curvature, Bounded) or inner.reader.rescales:
            return update  # or its update is shortened afterwards
        follows = update.follows and update.plain is not None
        plain = update.plain if follows else None
        d = self.decayed(p, update.d)
        moment = self.moment(p, update.d) if update.moment is None else update.moment
        if plain is not None:
            g = self.decayed(p, plain)
            moment = hyper.curvature.follow(hyper.seen(p, self.state(p)), g, d, moment)
            largest = torch.where(g.abs() > d.abs(), plain, update.d)
        else:
            largest = update.d
        assert moment is not None
        factor = hyper.curvature.factor(moment)
        # Coupled weight decay is added by the optimizer itself.
        given = torch.where(factor == 1, update.d, d / factor + (update.d - d))
        return replace(update, d=given, plain=largest, follows=True)

    def prepare(self, inner: Inner, updates: Sequence[Update]) -> None:
        """Before an optimizer's step on re-weighted gradients."""
        if inner.reader.rescales:
            self.save([update.p for update in updates])
            for update in updates:
                if not update.d.is_sparse:
                    # Copied: many optimizers change the gradient in place.
                    self._given[update.p] = update.d.clone(), shortening(update)
        self._make_ready(inner, updates)
        for update in updates:
            self._feed(inner, update)

    def settle(self, inner: Inner, updates: Sequence[Update]) -> None:
        """After it."""
        if inner.reader.rescales:
            for update in updates:
                if update.p in self._given:
                    self._watch(update)

    def _stepping_on(self, gradients: Mapping[Tensor, Tensor]) -> Undoing:
        """From here to the end of what is returned p.grad is the given gradient."""
        undoing = self._undoing = Undoing()
        before = {p: p.grad for p in gradients}

        def restore() -> None:
            for p, grad in before.items():
                p.grad = grad

        undoing.add(restore)
        for p, d in gradients.items():
            p.grad = d.to(p.dtype)  # a layer's rule gives half precision's wider
        return undoing

    def keep(self, inner: Inner, updates: Sequence[Update]) -> None:
        """Note what `prepare` may change, where nothing else does; `rollback` puts it back."""
        states, moment = inner.optimizer.state, inner.reader.moment
        for update in updates:
            if moment and update.follows:
                known = {moment} if moment in states.get(update.p, {}) else None
                self._before[update.p] = _Saved.of(states, update.p, known)

    def _make_ready(self, inner: Inner, updates: Sequence[Update]) -> None:
        """Give parameters a state to feed before their first step: made by a step, and undone."""
        reader, state = inner.reader, inner.optimizer.state
        new = [u.p for u in updates if u.follows and reader.moment not in state.get(u.p, {})]
        if not reader.moment or not new:
            return
        self.save(new)
        with self._stepping_on({p: torch.zeros_like(p) for p in new}):
            inner.step(new)
        for p in new:
            before, after = self._saved[p], p.detach().clone()
            p.copy_(before)
            for name, value in state[p].items():
                start = reader.blank.get(name, 0.0)
                if isinstance(value, Tensor):
                    weights = any(_same(value, w) for w in (before, after))
                    value.copy_(before) if weights else value.fill_(start)
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
        given, r = self._given.pop(p)
        d = local(given).flatten().float()
        before, after = local(self._saved[p]), local(p)
        made = (before - after).flatten().float()
        length, along = summed(torch.stack([d.dot(d), d.dot(made)]), p)
        gain = torch.where(length > 0, along / length, length)
        # Uphill, or not at all: no curvature is met on the way.
        self._gains[p] = gain.clamp_(min=0.0)
        if r is not None:
            after.copy_(torch.where(r == 1.0, after, torch.lerp(before, after, r.to(p.dtype))))
        hyper = self.hyper[p]
        if isinstance(hyper.curvature, Bounded):
            longest = hyper.curvature.longest(hyper.seen(before, {}))
            share = (longest / lengths(after - before)).clamp_(max=1.0).to(p.dtype)
            after.copy_(torch.where(share == 1.0, after, torch.lerp(before, after, share)))

    def shorten(self, p: Tensor, gamma: float) -> None:
        """Multiply what momentum has gathered of a parameter's gradients."""
        state = self._inner[p].optimizer.state.get(p, {})
        for name in MOMENTA & state.keys():
            if state[name] is not None:
                state[name].mul_(gamma)

    def rollback(self) -> None:
        """Restore parameters, their gradients, and states."""
        self._undoing.run()
        super().rollback()
        for saved in self._before.values():
            saved.restore()
        for optimizer, values in self._attributes.values():
            own = vars(optimizer)
            for new in attributes(optimizer).keys() - values.keys():
                del own[new]
            own.update({k: copied(v) for k, v in values.items() if not holds(own, k, v)})

    def retract(self, parameters: Iterable[Tensor]) -> None:
        """Take the updates of some parameters back, and their states."""
        some = list(parameters)
        super().retract(some)
        for p in some:
            self._before.pop(p).restore()
            self._gains.pop(p, None)

    def restart(self) -> None:
        """Take all updates back, to be made again another way."""
        self.rollback()
        self._counted.clear()

    def numbers(self, p: Tensor) -> list[Tensor]:
        """The tensors of its optimizer's state that are shaped as the parameter."""
        return [
            value.coalesce().values() if value.is_sparse else value
            for value in self._inner[p].optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == p.shape
        ]

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Counters and gains; the states have been written by their optimizers."""
        self._counted.commit()
        for p, gain in self._gains.items():
            self._inner[p].gains[p] = gain


def bounded(hyper: Mapping[Tensor, Hyper], tau: float | None) -> dict[Tensor, Hyper]:
    """Hyperparameters whose curvature keeps every unit's step below tau of the unit."""
    layers = sum(p.dim() > 1 and p.requires_grad for p in hyper)
    return {
        p: replace(one, curvature=Bounded(one.curvature, tau), layers=layers)
        for p, one in hyper.items()
    }


@dataclass(frozen=True, eq=False)
class _Saved:
    """One parameter's state before the step, or some of it, to be put back."""

    states: dict[Tensor, Any]
    p: Tensor
    known: bool
    values: Mapping[str, Any]
    copies: Mapping[str, Any]

    @classmethod
    def of(cls, states: dict[Tensor, Any], p: Tensor, names: set[str] | None = None) -> _Saved:
        known = p in states
        values = dict(states[p]) if known else {}
        copies = {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in values.items()
            if names is None or name in names
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
            if name not in self.copies:
                state[name] = value
            elif isinstance(value, Tensor):
                state[name] = value.copy_(self.copies[name])
            else:
                state[name] = self.copies[name]


def _same(value: Tensor, weights: Tensor) -> bool:
    """Whether a state is a copy of the weights, as of optimizers that average them."""
    return value.shape == weights.shape and bool((value == weights).all() & weights.any())


def shortening(update: Update) -> Tensor | None:
    """r = <d, gbar> / |gbar|^2 between 0 and 1, exactly 1 where d is gbar; None if it must be."""
    if update.plain is None or update.plain is update.d:
        return None
    d, plain = local(update.d).flatten().float(), local(update.plain).flatten().float()
    parts = torch.stack([plain.dot(plain), d.dot(plain), (d != plain).any().float()])
    whole, along, differ = summed(parts, update.d)
    # Equal vectors may have unequal products: sums depend on where in memory they begin.
    full = (differ == 0) | (whole == 0)
    return torch.where(full, torch.ones_like(whole), along / whole).clamp_(0.0, 1.0)
