# SPDX-License-Identifier: MIT
"""Errors and warnings of the library; each message names the place and the way out."""

import torch

#: What torch raises for singular matrices; documented, but left out of its type information.
LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

#: A step on gradients that were being re-weighted when something else failed.
INTERRUPTED = (
    "the backward pass did not end: some gradients may be re-weighted and others not; call "
    "zero_grad() and run the pass again"
)


class UnsupportedModelError(RuntimeError):
    """The model, or the way it is called, is outside what feedback can handle."""


class TerminalError(ValueError):
    """A terminal cost named by the user contradicts the output or its gradient."""


class NonFiniteError(FloatingPointError, RuntimeError):
    """A loss, gradient or new weight is infinite or not a number; nothing was changed."""


class RankError(RuntimeError):
    """Another rank has failed, or the ranks do not do the same; nothing was changed on any."""


class DDPNOptWarning(UserWarning):
    """Something runs differently from what was asked (said once)."""
