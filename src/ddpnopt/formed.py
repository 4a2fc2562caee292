# SPDX-License-Identifier: MIT
"""One tensor for each pass, formed only where it is looked at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload

from ddpnopt.typing import Tensor


class Formed(Sequence[Tensor]):
    """A sequence whose tensors are made when they are asked for."""

    @abstractmethod
    def form(self, index: int) -> Tensor:
        """The tensor of a pass."""

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """The tensors of some passes."""
        if isinstance(index, slice):
            return [self.form(i) for i in range(*index.indices(len(self)))]
        return self.form(index)
