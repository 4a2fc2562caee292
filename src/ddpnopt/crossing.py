# SPDX-License-Identifier: MIT
"""The state at a cut of a network that is no chain: all tensors alive there.

Layers in execution order are the time steps. A tensor that is made in one of them and used in a
later one crosses the cuts between; the state before a layer is everything that crosses its cut
(Liu et al., DGNOpt, ICML 2021: skip connections are extra players). What the recursion wants to
know of a change of the state is one number a column, q = sum over the cut of g . dx, with g the
gradient that arrives through the later uses alone.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.layout import LAYOUTS, ROWS, SHARED, arranged, fits
from ddpnopt.typing import Float, Tensor


@dataclass(frozen=True)
class Span:
    """Two time steps: what is made in one and used in the other crosses the cuts between."""

    born: int
    used: int

    def at(self, time: int) -> bool:
        """Whether it crosses the cut before the layer of this time step."""
        return self.born < time <= self.used


@dataclass(eq=False)
class Crossing:
    """A tensor made before one layer and used in the time step of another.

    Attributes:
        call: Number of the call that made it, and its place among that call's results.
        born: The time step in which it was made.
        used: The time step in which it is used: it is part of the state at every cut in between.
        y: Its value (an alias), with its version.
        g: Gradient that arrives by this use alone; None until a backward pass has brought it.
        Z: The terminal factor's columns, likewise.
        fresh_g, fresh_Z: The same, of a backward pass that has not ended.
        apart: It does not fall into samples (a table of positions, a temperature), or has been
            overwritten: it has no part in q.
        wanted: It is part of the state of some layer in feedback.
        beside: It is used between the layers of that step, not (only) by the layer itself.
        layout: How its samples lie.
        layouts: How they may lie, by all probes; None before the first.
    """

    call: tuple[int, int]
    born: int
    used: int
    y: Tensor
    version: int
    g: Tensor | None = None
    Z: Tensor | None = None
    fresh_g: Tensor | None = None
    fresh_Z: dict[str, Tensor] = field(default_factory=dict)
    apart: bool = False
    wanted: bool = False
    beside: bool = False
    layout: str = ROWS
    layouts: tuple[str, ...] | None = None

    def may_lie(self, layout: str) -> bool:
        """Any layout will do."""
        return True

    def lay(self, layout: str, samples: int) -> None:
        """How its samples have been found to lie; '' for not at all."""
        self.layout = layout
        self.apart = self.apart or self.shared

    @property
    def shared(self) -> bool:
        """All samples have a part in all of it."""
        return self.layout == SHARED

    def part(self, samples: int) -> None:
        """Find out whether its rows are samples."""
        self.layout = ROWS
        self.apart = not self.intact() or not any(
            fits(self.y, layout, samples) for layout in LAYOUTS
        )

    def at(self, time: int) -> bool:
        """Whether it crosses the cut before the layer of this time step."""
        return self.born < time <= self.used

    def intact(self) -> bool:
        """Whether the value is still what was used."""
        return self.y.is_inference() or self.y._version == self.version

    def project(self, y: Tensor, samples: int) -> Float[Tensor, "b r"] | None:
        """What a new value changes, g . dy of each sample (with a factor: Z . dy, r numbers).

        Raises:
            UnsupportedModelError: The new value has another shape.
        """
        if y.shape != self.y.shape:
            raise UnsupportedModelError(
                f"a tensor of shape {tuple(self.y.shape)} had shape {tuple(y.shape)} in the "
                "rollout: the model takes another path when run again; use feedback='open_loop'"
            )
        columns = self.g[None] if self.Z is None and self.g is not None else self.Z
        if columns is None:
            return None
        dtype = torch.promote_types(columns.dtype, torch.float32)
        dy = arranged((y - self.y).to(dtype), self.layout, samples).reshape(samples, -1)
        columns = arranged(columns, self.layout, samples, 1)
        columns = columns.to(dtype).reshape(len(columns), samples, -1).transpose(0, 1)
        return torch.bmm(columns, dy[:, :, None])[:, :, 0]

    def keep(self, adds_up: bool) -> None:
        """A backward pass has ended."""
        if self.fresh_g is not None:
            known = self.g if adds_up else None
            self.g = self.fresh_g if known is None else known + self.fresh_g
        self.Z = self.fresh_Z.get("Z", self.Z)
        self.drop()

    def forget(self) -> None:
        """Its gradients have been used or thrown away."""
        self.g = self.Z = None
        self.drop()

    def drop(self) -> None:
        """The backward pass that runs has failed, or ended."""
        self.fresh_g, self.fresh_Z = None, {}


class Predicted(Sequence[Tensor]):
    """A change of the state that is known by what it changes, q, alone.

    Args:
        q: (samples, r) of each pass.
    """

    def __init__(self, q: Sequence[Float[Tensor, "b r"]]) -> None:
        self.q = q

    def __len__(self) -> int:
        """Number of passes."""
        return len(self.q)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """Second-order dynamics ask for the change itself."""
        raise UnsupportedModelError(
            "this value function needs the state itself, which branches have none of: use "
            "value='moreau', 'gauss_newton' or 'low_rank', or dynamics='first_order'"
        )


class Moved:
    """What the state has been found to change, while a pass is run again.

    What is known of it is kept by its last use, one sum for each: a cut is looked at only once, in
    order, so that what has been used up is dropped.

    Args:
        crossings: Of the pass.
        samples: B.
        blind: Where something crosses that can't be followed.
    """

    def __init__(
        self, crossings: Iterable[Crossing], samples: int, blind: Sequence[Span] = ()
    ) -> None:
        self.samples, self.blind = samples, blind
        #: By the call that makes them.
        self.wanted: dict[int, list[Crossing]] = {}
        self._due: list[int] = []
        self._met = 0
        self._sums: dict[int, Tensor] = {}
        for one in crossings:
            if one.g is not None or one.Z is not None:
                self.wanted.setdefault(one.call[0], []).append(one)
                self._due.append(one.born)
        self._due.sort()

    def meet(self, number: int, results: Sequence[Tensor]) -> None:
        """A call has made a tensor that is waited for.

        Raises:
            UnsupportedModelError: It is another one.
        """
        for one in self.wanted.get(number, ()):
            if one.call[1] >= len(results):
                raise other_path()
            self._met += 1
            self._add(one.used, one.project(results[one.call[1]], self.samples))

    def q(self, time: int) -> Tensor | None:
        """(B, r) at the cut before a layer; None where nothing that can have moved crosses it.

        None, too, where something does that can't be followed: there the policy is the open loop's.

        Raises:
            UnsupportedModelError: A tensor that crosses it has not been made.
        """
        if bisect_left(self._due, time) != self._met:
            raise other_path()
        for used in [used for used in self._sums if used < time]:
            del self._sums[used]
        if any(span.at(time) for span in self.blind):
            return None
        return total(self._sums[used] for used in sorted(self._sums))

    def foresee(self, used: int, q: Float[Tensor, "b r"]) -> None:
        """Weights have changed that are used again, at a later time step."""
        self._add(used, q)

    def _add(self, used: int, q: Tensor | None) -> None:
        if q is not None:
            known = self._sums.get(used)
            self._sums[used] = q if known is None else known + q


def branches(crossings: Iterable[Crossing], states: Sequence[int]) -> bool:
    """Whether more than one tensor crosses some cut.

    Args:
        crossings: Of a pass.
        states: The time steps of its layers.
    """
    crossings = list(crossings)
    return any(sum(one.at(time) for one in crossings) > 1 for time in states)


def total(parts: Iterable[Tensor]) -> Tensor | None:
    """Their sum; None of none."""
    known = list(parts)
    if len(known) > 2:
        return torch.stack(known).sum(0)  # at once: many tensors may wait at a cut
    return sum(known[1:], known[0]) if known else None


def other_path() -> UnsupportedModelError:
    """The error where calls don't match."""
    return UnsupportedModelError(
        "the model took another path when run again: it makes other tensors than before; use "
        "feedback='open_loop'"
    )


#: Arguments of a call that are compared as they are. A float may have been read from the data
#: (``float(h.mean())``), and then it changes with them: a constant, not another path.
PLAIN = (int, str, slice, torch.dtype, torch.device, type(None), type(Ellipsis))


class Path:
    """The calls of a pass: which functions, given whose results, and with what options.

    A pass that is run again must take the same path, or its tensors are compared with others.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Any, tuple[Any, ...]]] = []
        #: How many belong to the call that is run again; None for all.
        self.end: int | None = None
        #: What the model has asked of gradients: answers, by the call that made the tensor.
        self.asked: dict[tuple[int, str], Any] = {}
        #: Gradients are taken on the way.
        self.differentiates = False
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    @property
    def asks(self) -> bool:
        """The model wants to know of gradients: none of that can be told without this path."""
        return self.differentiates or bool(self.asked)

    def step(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call as it can be told from others; before it runs, as it may overwrite its input."""
        return func, tuple(self._numbers([*args, *kwargs.values()] if kwargs else args))

    def _numbers(self, given: Iterable[Any]) -> Iterator[Any]:
        for one in given:
            if isinstance(one, Tensor):
                number = self.number(one)
                if number is not None:
                    yield number
            elif isinstance(one, tuple | list):
                yield from self._numbers(one)
            elif isinstance(one, PLAIN):
                yield one

    def number(self, tensor: Tensor) -> int | None:
        """Which call has made a tensor; None for what was there before."""
        known = self._made.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def same(self, before: Tensor, after: Tensor) -> None:
        """A tensor has taken another's place."""
        known = self._made.get(id(before))
        if known is not None and known[0]() is before:
            self._made[id(after)] = weakref.ref(after), known[1]

    def close(self) -> None:
        """The pass is over."""
        self._made.clear()

    def made(self, results: Sequence[Tensor], number: int) -> None:
        """A call has returned."""
        for tensor in results:
            self._made[id(tensor)] = weakref.ref(tensor), number
