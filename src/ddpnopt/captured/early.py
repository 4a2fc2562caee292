# SPDX-License-Identifier: MIT
"""Backward pass and step in one: a step that is known before it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ddpnopt.captured.program import Call, Value
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.typing import Tensor

#: Entries that are all looked at; and how many of a large tensor are, where there are more.
FEW, SAMPLED = 2**15, 64
#: Stands for a sample's memory, which nothing else shares.
SAMPLE = -(2**62)
#: By what stands for a tensor that a program changes: what stands for the room beside it.
Rooms = Mapping[Value, Value]


@dataclass(eq=False)
class Early:
    """A step whose outcome lies in the room beside the weights.

    It is the step that is asked for if nothing that it was computed from has changed since.

    Attributes:
        found: What the backward pass and the step have made.
        grads: The gradients, in other tensors: the memory stays theirs for as long as this lives.
        versions: Of these, as autograd got them.
        sample: Of their values, then of those of what the step changes and of the state: not all
            writes are counted by versions (``p.grad.data``, fused kernels).
        weights: The sum of the parameters' versions.
        rates: The groups' learning rates.
        state: The optimizer's tensors, and their versions.
    """

    found: dict[Value, Tensor]
    grads: Sequence[Tensor]
    versions: Sequence[int]
    sample: Tensor
    weights: int
    rates: Sequence[float]
    state: Sequence[tuple[Tensor, int]]

    def stands(
        self,
        grads: Sequence[Tensor | None],
        weights: int,
        rates: Sequence[float],
        state: Sequence[Any],
    ) -> bool:
        """Whether the step now would have the same outcome.

        Args:
            grads: p.grad of the parameters that the pass has given gradients to.
            weights: The sum of the parameters' versions.
            rates: The groups' learning rates.
            state: What there is of the optimizer's state.
        """
        return (
            weights == self.weights
            and rates == self.rates
            and all(a is b and a._version == v for a, (b, v) in zip(state, self.state, strict=True))
            and all(map(_untouched, grads, self.grads, self.versions))
        )

    def check_values(self, tensors: list[Tensor]) -> bool:
        """Whether p.grad has the same values.

        Args:
            tensors: p.grad, what the step changes, and the state.

        Raises:
            UnsupportedModelError: It has, and the rest has not.
        """
        now = sample_of(tensors)
        if torch.equal(now, self.sample):
            return True
        number = len(sample_of(tensors, len(self.grads)))
        if not torch.equal(now[:number], self.sample[:number]):
            return False
        if torch.allclose(now, self.sample, rtol=0, atol=0, equal_nan=True):
            return False  # the step as it is written says what is not finite
        raise UnsupportedModelError(
            "weights, or the optimizer's state, were written to between the backward pass and the "
            "step (through .data, or by another optimizer), so the pass can't be compared with a "
            "second one; use feedback='open_loop', or run the pass again"
        )


def sample_of(tensors: list[Tensor], first: int | None = None) -> Tensor:
    """Values of tensors: all, where they are few; else every n-th of each large one.

    Args:
        tensors: They.
        first: How many of them are asked for; all if None.
    """
    steps, asked = steps_through(tensors), tensors[:first]
    if all([step == 1 for step in steps]):
        every: Tensor = torch._C._nn.flatten_dense_tensors(asked)
        return every
    return torch.cat([_every(t, step) for t, step in zip(asked, steps[:first], strict=True)])


def _every(t: Tensor, step: int) -> Tensor:
    """Every n-th value in the order of the indices; only these are read of any layout."""
    if step == 1 or t.is_contiguous():
        return t.detach().reshape(-1)[::step]
    return t.detach().take(torch.arange(0, t.numel(), step, device=t.device))


def steps_through(tensors: Iterable[Tensor]) -> list[int]:
    """n of each tensor of a sample: odd, or its values may be one column of a matrix."""
    sizes = [t.numel() for t in tensors]
    steps = [1 if size < 2 * SAMPLED else size // SAMPLED | 1 for size in sizes]
    return [1] * len(sizes) if sum(sizes) <= FEW else steps


def sampling(values: Sequence[Value], tensors: Sequence[Tensor]) -> tuple[list[Call], Value]:
    """The same as operators of a program.

    Args:
        values: What stands for the tensors.
        tensors: They, in some run: their sizes are those of every run.

    Returns:
        The operators, and what stands for the sample.
    """
    aten = torch.ops.aten
    calls, parts = list[Call](), list[Value]()
    for v, t, step in zip(values, tensors, steps_through(tensors), strict=True):
        flat, part = Value(-1, v.storage, 1), Value(-1, v.storage, 1)
        calls.append(Call(aten.reshape.default, (v, [-1]), {}, flat))
        if step > 1:
            calls.append(Call(aten.slice.Tensor, (flat, 0, 0, t.numel(), step), {}, part))
        parts.append(flat if step == 1 else part)
    sample = Value(-1, SAMPLE, 1)
    return [*calls, Call(aten.cat.default, (parts,), {}, sample)], sample


def noted(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Tensors and their versions."""
    return [(t, t._version) for t in tensors]


def _untouched(grad: Tensor | None, own: Tensor, version: int) -> bool:
    """Whether p.grad is what the backward pass has made, and nobody has written to it."""
    alike = grad is not None and grad.data_ptr() == own.data_ptr() and own._version == version
    return alike and grad is not None and grad.stride() == own.stride()


def beside(
    calls: Iterable[Call],
    results: Iterable[Value],
    rooms: Rooms,
    known: Mapping[Value, Value],
    makers: Mapping[Value, Call],
) -> tuple[list[Call], list[Value]]:
    """Operators that write to the room beside tensors, from the first time that they would write.

    Args:
        calls: Operators that write to the tensors.
        results: What is asked for afterwards.
        rooms: What is to be written to instead.
        known: Other stand-ins.
        makers: The operators that have made tensors, for views of what is written to.

    Returns:
        The operators, and what stands for the results.
    """
    moved = _Moved(rooms, known, makers)
    for call in calls:
        moved.add(call)
    return moved.calls, [moved.of(v) for v in results]


class _Moved:
    """Operators so far."""

    def __init__(
        self, rooms: Rooms, known: Mapping[Value, Value], makers: Mapping[Value, Call]
    ) -> None:
        self.calls: list[Call] = []
        self._now = dict(known)
        self._rooms = {v.storage: (v, room) for v, room in rooms.items()}
        self._makers, self._written, self._fresh = makers, set[int](), 0

    def add(self, call: Call) -> None:
        """The next one."""
        for storage in dict.fromkeys(v.storage for v in call.written):
            if storage in self._rooms and storage not in self._written:
                self._written.add(storage)
                v, room = self._rooms[storage]
                self._now[v] = room
                copy = torch.ops.aten.copy_.default
                self.calls.append(Call(copy, (room, v), {}, room))
        self._append(call)
        for v in call.outputs:
            if v.storage in self._written:
                self._now.setdefault(v, v)

    def of(self, v: Value) -> Value:
        """What stands for a tensor now: views from before are taken anew."""
        if v not in self._now and v.storage in self._written:
            self._append(self._makers[v], anew=True)
        return self._now.get(v, v)

    def _append(self, call: Call, anew: bool = False) -> None:
        args, kwargs = tree_map(self._moved, (call.args, call.kwargs))
        for v in call.outputs if anew else ():
            self._fresh -= 1
            self._now[v] = replace(v, index=self._fresh)
        made = tree_map(self._moved, call.made) if anew else call.made
        self.calls.append(Call(call.func, args, kwargs, made))

    def _moved(self, leaf: Any) -> Any:
        return self.of(leaf) if isinstance(leaf, Value) else leaf
