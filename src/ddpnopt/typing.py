# SPDX-License-Identifier: MIT
"""Shape annotations, checked under pytest and free at run time.

The core depends on torch alone: where jaxtyping is not installed, ``Float[Tensor, "b o"]`` is
simply ``Tensor``. Index alphabet: b sample, r/s column, t position, g group, i/o in/out feature,
h pre-activation, x state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Stand-in: the annotation of a floating-point tensor without its shape."""

            def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
                """Drop the shape."""
                return item[0]


__all__ = ["Float", "Tensor"]
