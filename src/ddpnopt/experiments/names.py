# SPDX-License-Identifier: MIT
"""Registry names and options of the command line: what they stand for, and helpful errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

Entry = TypeVar("Entry")


def lookup(registry: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """Return `registry[name]`.

    Args:
        registry: Names and what they stand for.
        name: The name asked for.
        kind: What the registry holds, for the message ("data set").

    Returns:
        The entry.

    Raises:
        ValueError: The name is unknown; the message lists all names and the closest one.
    """
    if name in registry:
        return registry[name]
    close = get_close_matches(name, registry, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted(registry))}.{hint}")


def call(target: Callable[..., Any], *args: Any, options: Mapping[str, Any]) -> Any:
    """Call `target`, turning an unknown option into an error that lists the known ones.

    Raises:
        ValueError: An option is unknown, or its value of another kind than `target` takes.
    """
    known = [
        p.name
        for p in inspect.signature(target).parameters.values()
        if p.name not in ("self", "params", "model", "lr", "args", "kwargs")
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        name = getattr(target, "__name__", str(target))
        raise ValueError(f"{name} has no option {', '.join(unknown)}; known: {', '.join(known)}.")
    try:
        return target(*args, **options)
    # How constructors that compare first and check nothing take a text for a number.
    except (TypeError, AttributeError, OverflowError, RuntimeError) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        name = getattr(target, "__name__", str(target))
        raise ValueError(f"{name} does not take {given}: {error}") from error


def split(options: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split off the options `prefix.name`; return them without the prefix, and the rest."""
    own = {
        k.removeprefix(prefix + "."): v for k, v in options.items() if k.startswith(prefix + ".")
    }
    return own, {k: v for k, v in options.items() if not k.startswith(prefix + ".")}
