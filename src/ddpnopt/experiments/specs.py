# SPDX-License-Identifier: MIT
"""Reading optimizers, options and rates from the command line."""

from __future__ import annotations

from collections.abc import Iterable

from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.optimizers import OPTIMIZERS, Options, OptionValue

_WORDS: dict[str, OptionValue] = {"true": True, "false": False, "none": None}


def parse_value(text: str) -> OptionValue:
    """Read true, false, none, an integer, a number, or else keep the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_option(text: str) -> tuple[str, OptionValue]:
    """Read `key=value`.

    Args:
        text: What the user wrote.

    Returns:
        The key and its value.

    Raises:
        ValueError: There is no equals sign, or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"option {text!r} must be written key=value, such as momentum=0.9")
    return key.strip(), parse_value(value.strip())


def parse_optimizer(text: str) -> tuple[str, Options]:
    """Read `name` or `name:key=value,key=value`.

    Args:
        text: What the user wrote.

    Returns:
        The name and its options.

    Raises:
        ValueError: Unknown name (the message lists the names), or a malformed option.
    """
    name, _, options = text.partition(":")
    lookup(OPTIMIZERS, name, "optimizer")
    return name, dict(parse_option(part) for part in options.split(",") if part)


def parse_rates(texts: Iterable[str]) -> tuple[float, ...]:
    """Read learning rates, each text one rate or several separated by commas.

    Args:
        texts: What the user wrote.

    Returns:
        The rates in the order given, repeats dropped.

    Raises:
        ValueError: Not a non-negative finite number.
    """
    rates: list[float] = []
    for part in ",".join(texts).split(","):
        try:
            rate = float(part)
        except ValueError as error:
            raise ValueError(f"learning rate {part!r} is not a number") from error
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"learning rate must be finite and not negative, got {part}")
        rates.append(rate)
    return tuple(dict.fromkeys(rates))
