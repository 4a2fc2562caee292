# SPDX-License-Identifier: MIT
"""Several processes that train one model together: what they tell each other.

Parts of tensors are put together in `dtensors.py`; all else that is communicated is here.

A step asks its `Ranks` for sums over all ranks' samples. One process is a `Ranks` that hands back
what it is given; `Together` communicates, and sees to it that a rank that fails lets none of the
others wait:

- In a *meeting* each rank gives a row of numbers, with a flag whether it has failed. All see all
  rows, so all raise, or none.
- A *total* that has been announced is a plain sum. A rank that has failed gives zeros for all that
  is announced, and its flag at the next meeting, before which nothing is kept.
- A total that has not been announced is preceded by a meeting.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ddpnopt.errors import NonFiniteError, RankError, UnsupportedModelError
from ddpnopt.typing import Tensor

#: Numbers in a rank's row, the two flags included.
ROW = 11
Key = TypeVar("Key", bound=Hashable)


class Ranks:
    """One process by itself: every sum over the ranks is its own.

    Attributes:
        size: W.
        rank: This one's number.
        several: There are others.
        two_bucket: d is reduced for all layers at once, before and after the rollout.
        pool: Sums a vector over the ranks; None where there is nothing to sum.
    """

    size = 1
    rank = 0
    several = two_bucket = False
    pool: Callable[[Tensor], Tensor] | None = None

    def announce(self, sizes: Sequence[int]) -> None:
        """Every rank is here, and the next totals will be of so many numbers each.

        Raises:
            RankError: Of other numbers than another rank's.
        """

    def total(self, parts: Mapping[Key, Tensor]) -> Mapping[Key, Tensor]:
        """Sums over the ranks, all in one call."""
        return parts

    def counted(
        self, parts: Sequence[Tensor], counts: Sequence[int]
    ) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Sums of tensors and of whole numbers over the ranks, all in one call."""
        return parts, counts

    def meet(self, *numbers: float) -> list[list[float]]:
        """Every rank's numbers, once all ranks are here.

        Raises:
            NonFiniteError: Some rank's numbers are not finite.
            RankError: Some rank has failed otherwise, or can't be reached.
        """
        return [list(numbers)]

    def gathered(self, one: Any) -> list[Any]:
        """Every rank's object."""
        return [one]

    @contextmanager
    def together(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """A block in which an error on one rank becomes an error on every rank.

        Args:
            parameters: The optimizer's.
        """
        yield


class Together(Ranks):
    """All ranks of a process group.

    Args:
        group: The process group; None for the default one.
        two_bucket: See `Ranks`.
    """

    several = True

    def __init__(self, group: Any = None, two_bucket: bool = False) -> None:
        self.two_bucket = two_bucket
        self.group, self._world = group, torch.distributed.group.WORLD
        if self._world is None:
            raise UnsupportedModelError(
                "torch.distributed reports several ranks, but there is no process group to reduce "
                "over: call init_process_group, or give distributed=False"
            )
        self.size: int = torch.distributed.get_world_size(group)
        self.rank: int = torch.distributed.get_rank(group)
        self.pool = self._pool
        self._device, self._wide = torch.device("cpu"), torch.float32
        self._announced: deque[int] = deque()
        self._told = False

    def alive(self) -> bool:
        """Whether the group is still the one that torch.distributed has."""
        return self._world is torch.distributed.group.WORLD

    def announce(self, sizes: Sequence[int]) -> None:
        """A meeting, and the next totals will be of so many numbers each."""
        mark = zlib.crc32(repr(list(sizes)).encode())
        if len({row[0] for row in self.meet(float(mark))}) > 1:
            raise self._shared(
                RankError(
                    "the ranks have other parameters in feedback; run the same layers, with the "
                    "same parameters frozen, on every rank"
                )
            )
        self._announced.extend(sizes)

    def _pool(self, vector: Tensor) -> Tensor:
        return self.total({None: vector})[None]

    def total(self, parts: Mapping[Key, Tensor]) -> Mapping[Key, Tensor]:
        """Sums over the ranks, in float32 or wider."""
        flat = torch.cat([one.reshape(-1).to(self._device, self._wide) for one in parts.values()])
        if self._announced:
            size = self._announced.popleft()
            assert flat.numel() == size, "a total of another size was announced"
        else:
            self.meet()
        self._sum(flat)
        pieces = torch.split(flat, [one.numel() for one in parts.values()])
        return {
            key: piece.view_as(one).to(one) if piece.dtype != one.dtype else piece.view_as(one)
            for (key, one), piece in zip(parts.items(), pieces, strict=True)
        }

    def counted(
        self, parts: Sequence[Tensor], counts: Sequence[int]
    ) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Sums of tensors and of whole numbers over the ranks."""
        every = self.meet(*map(float, counts))
        found = self._unasked(dict(enumerate(parts))) if parts else {}
        return list(found.values()), [int(sum(column)) for column in zip(*every, strict=True)]

    def _unasked(self, parts: Mapping[Key, Tensor]) -> Mapping[Key, Tensor]:
        """Totals right behind a meeting."""
        self._announced.append(sum(one.numel() for one in parts.values()))
        return self.total(parts)

    def meet(self, *numbers: float) -> list[list[float]]:
        """Every rank's numbers, if none has failed."""
        rows = self._gather([0.0, 0.0, *numbers])
        unfinite, otherwise = (sum(row[k] for row in rows) for k in (0, 1))
        if otherwise:
            raise self._shared(
                RankError(
                    "another rank has failed in this step (its own error says why), so no rank has "
                    "taken it; nothing was changed"
                )
            )
        if unfinite:
            raise self._shared(
                NonFiniteError(
                    "a loss, gradient or new weight of another rank is not finite (its own error "
                    "says which); nothing was changed on any rank. Lower lr, or use "
                    "nonfinite='skip'"
                )
            )
        return [row[2 : 2 + len(numbers)] for row in rows]

    @contextmanager
    def together(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """A block in which an error on one rank becomes an error on every rank."""
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._wide = torch.float32
        for p in parameters:
            self._wide = torch.promote_types(self._wide, p.dtype)
        self._announced.clear()
        self._told = False
        try:
            yield
        except Exception as error:
            self._fail(error)
            raise

    def gathered(self, one: Any) -> list[Any]:
        """Every rank's object; right behind a meeting."""
        found: list[Any] = [None] * self.size
        with self._reachable():
            torch.distributed.all_gather_object(found, one, group=self.group)
        return found

    def _fail(self, error: Exception) -> None:
        """Tell the others, unless it was they who said it, or nobody listens."""
        if self._told:
            return
        skips = isinstance(error, NonFiniteError)
        try:
            for size in self._announced:
                self._sum(torch.zeros(size, dtype=self._wide, device=self._device))
            rows = self._gather([float(skips), float(not skips)])
        except RankError:  # nobody is left to be told: this rank's own error says more
            return
        self._told = True
        if skips and any(row[1] for row in rows):
            raise RankError(
                "this step is not finite here, and has failed otherwise on another rank (its own "
                "error says why); nothing was changed"
            ) from error

    def _shared(self, error: Exception) -> Exception:
        """An error that all ranks raise."""
        self._told = True
        return error

    def _gather(self, row: Sequence[float]) -> list[list[float]]:
        numbers = [*row, *[0.0] * (ROW - len(row))]
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        with self._reachable():
            torch.distributed.all_gather(every, mine, group=self.group)
            found: list[list[float]] = torch.stack(every).tolist()
        return found

    def _sum(self, flat: Tensor) -> None:
        with self._reachable():
            torch.distributed.all_reduce(flat, group=self.group)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._shared(
                RankError(
                    f"the other ranks can't be reached ({error}). If one of them has run out of "
                    "batches, or has skipped a step: give every rank the same number of batches "
                    "(DistributedSampler, drop_last=True). If one has failed, its own error says "
                    "why. How long ranks wait for each other is init_process_group's timeout"
                )
            ) from error
