# SPDX-License-Identifier: MIT
"""The optimizer's choices: checked, by name or as objects, and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddpnopt.ranges import check_choice, check_switch
from ddpnopt.recognition import SQUARED, TERMINALS, Terminal
from ddpnopt.terminal import MMC, MSE
from ddpnopt.value import VALUES, ValueFunction

GRAM = ("auto", "exact", "sketch")
NONFINITE = ("raise", "skip")


@dataclass(frozen=True)
class Options:
    """Choices that hold for the whole optimizer (those per parameter live in its groups)."""

    value: ValueFunction
    terminal: Terminal | MSE | MMC
    feedback: bool | str
    weight_gradients: bool
    gram: str
    nonfinite: str

    def __post_init__(self) -> None:
        """Check each choice.

        Raises:
            ValueError: A choice is unknown; the message lists what there is.
        """
        check_switch("", "weight_gradients", self.weight_gradients)
        if not (isinstance(self.feedback, bool) or self.feedback == "open_loop"):
            raise ValueError(f"feedback={self.feedback!r}: choose from True, 'open_loop', False")
        if self.feedback == "open_loop" and self.value.segments:
            raise ValueError(
                "feedback='open_loop': second-order dynamics need a second forward pass; use "
                "feedback=True, or dynamics='first_order'"
            )
        if isinstance(self.terminal, str) and self.terminal not in TERMINALS:
            raise ValueError(
                f"terminal={self.terminal!r}: choose from {', '.join(TERMINALS)}, or give a "
                "callable output -> factor of the loss's Hessian"
            )
        if not isinstance(self.terminal, str) and not callable(self.terminal):
            raise ValueError("terminal: give a name or a callable output -> factor")
        check_choice("", "gram", self.gram, GRAM)
        check_choice("", "nonfinite", self.nonfinite, NONFINITE)

    @property
    def closed_loop(self) -> bool:
        """A rollout is wanted."""
        return self.feedback is True

    @property
    def depth(self) -> str:
        """The name of the depth."""
        return {True: "closed_loop", "open_loop": "open_loop", False: "off"}[self.feedback]

    @property
    def logits(self) -> bool:
        """The loss is of logits, or of what is to be recognised as logits."""
        return isinstance(self.terminal, str) and self.terminal not in SQUARED

    def plain_values(self) -> dict[str, Any]:
        """For ``state_dict``: names and numbers only."""
        terminal = self.terminal if isinstance(self.terminal, str) else type(self.terminal).__name__
        return {
            "value": {"name": self.value.name, **asdict(self.value)},  # type: ignore[call-overload]
            "terminal": terminal,
            "feedback": self.feedback,
            "weight_gradients": self.weight_gradients,
            "gram": self.gram,
            "nonfinite": self.nonfinite,
        }


def value_from(value: str | Mapping[str, Any] | ValueFunction) -> ValueFunction:
    """A value function from its name or object.

    Raises:
        ValueError: Unknown name; the message lists the names.
    """
    if isinstance(value, ValueFunction):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f"value={value!r}: choose from {', '.join(VALUES)}, or give an object")
    options = {"name": value} if isinstance(value, str) else dict(value)
    name = options.pop("name", None)
    if name not in VALUES:
        raise ValueError(f"value={name!r}: choose from {', '.join(VALUES)}")
    return VALUES[name](**options)
