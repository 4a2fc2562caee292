# SPDX-License-Identifier: MIT
"""The way in: `ddpnopt.capture`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from ddpnopt.captured.step import CapturedStep
from ddpnopt.captured.update import CapturedUpdate
from ddpnopt.shell import Shell


@overload
def capture(optimizer: Shell, loss: None = None, *, compile: bool = False) -> CapturedUpdate: ...


@overload
def capture(
    optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False
) -> CapturedStep: ...


def capture(
    optimizer: Shell, loss: Callable[..., Any] | None = None, *, compile: bool = False
) -> CapturedStep | CapturedUpdate:
    """Training run without the library's Python code: the step alone, or a whole iteration.

    Without a loss function the loop stays as it is, and ``optimizer.step()`` is run from a record
    from then on; every 100th is compared with the code again, since what the model does between its
    layers is known from the recording alone. With one, a whole iteration becomes a function of the
    batch.

    The first calls run as they are written. One is recorded: every operator of the step, or of the
    forward pass, the backward pass and the step. The next one is run both ways and compared. From
    then on the operators are run by themselves: on a GPU as one CUDA graph, on the CPU one after
    another, or compiled by torch's compiler into few kernels.

    What the step decides by numbers on the way (is the loss still the one that was recognised, are
    all numbers finite, has the scalar equation converged) is decided as in the recording and
    checked at the end of each run; where it would be decided otherwise, everything is put back and
    the call runs as it is written.

    Args:
        optimizer: A `DDPNOpt` or a `Feedback`.
        loss: The batch's tensors to its loss, or to a tuple or dict whose first tensor is the loss.
            As under a CUDA graph its Python code runs in the recording alone. None: the step alone
            is recorded.
        compile: Compile the record; takes from ten seconds to a minute and a half, and a C++
            compiler on the CPU.

    Returns:
        With a loss function, a function of a batch that takes a training step, and returns what
        ``loss`` returns; gradients are not kept. Without, a handle that says how many steps were
        run from the record, and whose ``remove()`` ends it.

    Raises:
        TypeError: The optimizer is none of this package.

    Examples:
        >>> step = capture(opt, lambda x, y: criterion(model(x), y))
        >>> for x, y in loader:
        ...     loss = step(x, y)
    """
    if loss is None:
        return CapturedUpdate(optimizer, compile=compile)
    return CapturedStep(optimizer, loss, compile=compile)
