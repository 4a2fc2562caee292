# SPDX-License-Identifier: MIT
"""The way in: `ddpnopt.capture`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from ddpnopt.captured.loop import CapturedLoop
from ddpnopt.captured.step import CapturedStep
from ddpnopt.captured.update import CapturedUpdate
from ddpnopt.shell import Shell


@overload
def capture(
    optimizer: Shell, loss: None = None, *, compile: bool = False, passes: Literal[False] = False
) -> CapturedUpdate: ...


@overload
def capture(
    optimizer: Shell, loss: None = None, *, compile: bool = False, passes: Literal[True]
) -> CapturedLoop: ...


@overload
def capture(
    optimizer: Shell, loss: Callable[..., Any], *, compile: bool = False
) -> CapturedStep: ...


def capture(
    optimizer: Shell,
    loss: Callable[..., Any] | None = None,
    *,
    compile: bool = False,
    passes: bool = False,
) -> CapturedStep | CapturedUpdate | CapturedLoop:
    """Training run without the library's Python code: the step alone, or a whole iteration.

    Without a loss function the loop stays as it is, and ``optimizer.step()`` is run from a record
    from then on; with ``passes`` the model's forward and backward passes are, too. Now and then one
    is compared with the code again, since what the model does between its layers is known from the
    recording alone. With a loss function, a whole iteration becomes a function of the batch.

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
        passes: Without a loss function: run the model's passes from the record, too. As under a
            CUDA graph the model's Python code then runs in the recording alone.
        compile: Compile the record; takes a C++ compiler on the CPU, and from ten seconds to a
            minute and a half: a few where torch has kept on disk what it compiled before.

    Returns:
        With a loss function, a function of a batch that takes a training step, and returns what
        ``loss`` returns; gradients are not kept. Without, a handle that says how many steps were
        run from the record, and whose ``remove()`` ends it.

    Raises:
        TypeError: The optimizer is none of this package, or ``passes`` beside a loss function.

    Examples:
        >>> step = capture(opt, lambda x, y: criterion(model(x), y))
        >>> for x, y in loader:
        ...     loss = step(x, y)
    """
    if loss is not None and passes:
        raise TypeError(
            "capture: with a loss function the passes are always run from the record; give a loss "
            "function or passes=True, not both"
        )
    if loss is None and isinstance(optimizer, Shell) and optimizer.engine.shortcut is not None:
        optimizer.engine.shortcut.remove()
    if passes:
        return CapturedLoop(optimizer, compile=compile)
    if loss is None:
        return CapturedUpdate(optimizer, compile=compile)
    return CapturedStep(optimizer, loss, compile=compile)
