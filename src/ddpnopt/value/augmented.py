# SPDX-License-Identifier: MIT
"""The batch as one augmented state (x_1, .., x_B): V_xx couples the samples (vanilla DDP).

The samples share a layer's control, so its exact Q_uu is a sum over all of them, and what one
sample needs changes what is left for the others. Every other value function keeps them apart. Here
the same recursions run on the whole batch as a single sample: the maps of the states are
block-diagonal, and only the Gram matrices, through the control, join the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ddpnopt.typing import Tensor
from ddpnopt.value.base import (
    Blocks,
    Coupling,
    Maps,
    Matrices,
    Policy,
    Recursion,
    TerminalCost,
    ValueFunction,
)
from ddpnopt.value.dense import Dense
from ddpnopt.value.low_rank import LowRank


@dataclass(frozen=True)
class Augmented(ValueFunction):
    """A quadratic value function of the augmented state.

    Args:
        inner: `LowRank`: V_xx = Z C Z^T with one (B r, B r) matrix C in terminal coordinates, equal
            to the dense form for first-order dynamics without Tikhonov. `Dense`: V_xx itself,
            (B X, B X).

    Raises:
        ValueError: Another value function.
    """

    inner: Dense | LowRank = field(default_factory=lambda: LowRank(statistics="plain"))
    #: The inner form's.
    statistics: str = field(init=False)
    rank: int | None = field(init=False)

    name: ClassVar[str] = "augmented"

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.inner, Dense | LowRank):
            raise ValueError(f"Augmented(inner={self.inner!r}): give a Dense or a LowRank")
        object.__setattr__(self, "statistics", self.inner.statistics)
        object.__setattr__(self, "rank", self.inner.rank)

    @property
    def linearization(self) -> str:  # type: ignore[override]  # a class's own elsewhere
        """As the inner form's."""
        return self.inner.linearization

    @property
    def segments(self) -> bool:
        """As the inner form's."""
        return self.inner.segments

    def start(self, terminal: TerminalCost) -> Recursion:
        """The inner recursion at the output of the batch."""
        return _Augmented(self.inner.start(_Terminal(terminal)))


@dataclass(frozen=True)
class _Terminal:
    """The terminal cost of the augmented state: phi is a sum over samples."""

    terminal: TerminalCost

    @property
    def w(self) -> Tensor:
        """Not used by quadratic values."""
        return self.terminal.w

    @property
    def kappa(self) -> Tensor:
        """Likewise."""
        return self.terminal.kappa

    @property
    def excess(self) -> Tensor | None:
        """Likewise."""
        return self.terminal.excess

    def hessian_factor(self) -> Tensor:
        """(1, B Z, B r)."""
        return _blocks(self.terminal.hessian_factor())


class _Augmented(Recursion):
    """An inner recursion on `_Batch` in place of the layers."""

    def __init__(self, inner: Recursion) -> None:
        self.inner = inner
        self.batch: _Batch | None = None

    def _maps(self, maps: Maps) -> _Batch:
        if self.batch is None or self.batch.maps is not maps:
            self.batch = _Batch(maps)
        return self.batch

    def correction(self, maps: Maps) -> Blocks | None:
        """V_h - g."""
        return self.inner.correction(self._maps(maps))

    def back(self, maps: Maps, bottom: bool) -> Policy:
        """The inner policy."""
        batch = self._maps(maps)
        return _AugmentedPolicy(self.inner.back(batch, bottom), batch)

    def close(self) -> None:
        """The inner recursion's."""
        self.inner.close()


class _AugmentedPolicy(Policy):
    """du(dx_1, .., dx_B) with every sample's own feedback gain."""

    def __init__(self, inner: Policy, batch: _Batch) -> None:
        self.inner, self.batch = inner, batch

    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The inner policy's vectors."""
        return self.inner(self.batch, dx)

    def bend(self, maps: Maps, dx: Blocks) -> Blocks | None:
        """The inner policy's."""
        return self.inner.bend(self.batch, dx)


def _blocks(parts: Tensor) -> Tensor:
    """(B, n, k) to the block-diagonal (1, B n, B k)."""
    joined: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return joined[None]


@dataclass(eq=False)
class _Batch:
    """A layer's maps with all samples as one; satisfies `Maps` and `Matrices`."""

    maps: Maps

    @property
    def strength(self) -> float:
        """The layer's."""
        return self.maps.strength

    @property
    def matrices(self) -> Matrices:
        """These, too."""
        return self

    def gram(self) -> Tensor:
        """(1, 1 + B r, 1 + B r) of g, summed over the batch, and every sample's columns."""
        samples = len(self.maps.gradient())
        full = self.maps.matrices.joint_gram()
        columns = len(full) // samples
        full = full.reshape(columns, samples, columns, samples)
        gg, Zg = full[0, :, 0].sum().reshape(1, 1), full[1:, :, 0].sum(-1).T.reshape(-1, 1)
        ZZ = full[1:, :, 1:].permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
        return torch.cat([torch.cat([gg, Zg.T], 1), torch.cat([Zg, ZZ], 1)])[None]

    def lengths(self) -> Tensor:
        """(1,) of g, summed over the batch."""
        return self.gram()[:, 0, 0]

    def h_gram(self) -> Tensor:
        """The same in h-space, where samples are orthogonal."""
        N = self.maps.h_gram()
        first = torch.cat([N[:, 0, 0].sum().reshape(1), N[:, 0, 1:].flatten()])
        below = torch.cat([N[:, 1:, 0].reshape(1, -1, 1), _blocks(N[:, 1:, 1:])], -1)
        return torch.cat([first[None, None], below], 1)

    def project(self, dx: Blocks) -> Tensor:
        """(1, B r)."""
        return self.maps.project(dx).reshape(1, -1)

    def combine(self, a: Tensor | None, b: Tensor | None) -> Blocks:
        """a g + Z b; a is shared."""
        samples = len(self.maps.gradient())
        a = None if a is None else a.expand(samples)
        return self.maps.combine(a, None if b is None else b.reshape(samples, -1))

    def coupling(self, weight: Tensor) -> Coupling:
        """1: the coupling is exact."""
        return Coupling(rho=1.0)

    def gradient(self) -> Tensor:
        """(1, B H)."""
        return self.maps.gradient().reshape(1, -1)

    def curvature(self) -> Tensor:
        """(1, B H, B H), samples joined by the control."""
        F = self.control()
        return F.mT @ self.precondition(F)

    def push(self, dx: Blocks) -> Tensor:
        """(1, B H)."""
        return self.maps.push(dx).reshape(1, -1)

    def pull(self, V: Tensor) -> Tensor:
        """(1, B H, k) to (1, B X, k)."""
        return self._each(V, self.maps.pull)

    def through(self, V: Tensor) -> Tensor:
        """(1, B X', k) to (1, B H, k)."""
        return self._each(V, self.maps.through)

    def _each(self, V: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
        rows = V.reshape(len(self.maps.gradient()), -1, V.shape[-1])
        return apply(rows).reshape(1, -1, V.shape[-1])

    def split(self, v: Tensor) -> Blocks:
        """(1, B H) to one tensor for each pass."""
        return self.maps.split(self._rows(v))

    def _rows(self, V: Tensor) -> Tensor:
        return V.reshape(len(self.maps.gradient()), -1)

    # Explicit matrices

    def control(self) -> Tensor:
        """(1, U, B H)."""
        return self.maps.matrices.control().transpose(0, 1).flatten(1)[None]

    def control_columns(self) -> Tensor:
        """(1 + r, B, U), as the layer's."""
        return self.maps.matrices.control_columns()

    def joint_gram(self) -> Tensor:
        """As the layer's."""
        return self.maps.matrices.joint_gram()

    def precondition(self, columns: Tensor) -> Tensor:
        """P times (1, U, k)."""
        return self.maps.matrices.precondition(columns)

    def state_map(self) -> Tensor:
        """(1, B H, B X)."""
        return _blocks(self.maps.matrices.state_map())

    def state(self, dx: Blocks) -> Tensor:
        """(1, B X)."""
        return self.maps.matrices.state(dx).reshape(1, -1)

    def mixed(self, V: Tensor) -> Tensor:
        """(1, U, B X)."""
        return self.maps.matrices.mixed(self._rows(V)).transpose(0, 1).flatten(1)[None]

    def state_curvature(self, V: Tensor) -> Tensor | None:
        """(1, B X, B X)."""
        bent = self.maps.matrices.state_curvature(self._rows(V))
        return None if bent is None else _blocks(bent)

    def segment_curvature(self, V: Tensor) -> Tensor:
        """(1, B H, B H)."""
        return _blocks(self.maps.matrices.segment_curvature(self._rows(V)))
