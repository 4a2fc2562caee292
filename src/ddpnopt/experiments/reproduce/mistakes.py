# SPDX-License-Identifier: MIT
"""Pydantic's findings in the words of somebody who edits a settings file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        path: Keys and indices that lead to it.
        message: The key, what was given and what is allowed.
    """

    path: tuple[str | int, ...]
    message: str


class Misplaced(ValueError):
    """A value that is possible by itself, but not beside the others of its table.

    Args:
        message: What is wrong and what is allowed.
        path: Keys and indices that lead to it from the model whose validator raises this.
    """

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


def describe(model: type[BaseModel], errors: Sequence[ErrorDetails]) -> list[Mistake]:
    """Put validation errors into words.

    Args:
        model: What was validated.
        errors: Pydantic's list.

    Returns:
        A mistake for each place (where a value fits no member of a union, one for them all).
    """
    found: dict[tuple[str | int, ...], Mistake] = {}
    for error in errors:
        if error["type"] == "too_short" and any(_beneath(error, other) for other in errors):
            # Pydantic counts the elements that are right: it is said of each what is wrong.
            continue
        path = _in_file(model, error["loc"])
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, Misplaced):
            path = (*path, *cause.path)
        found.setdefault(path, Mistake(path, _message(model, path, error)))
    return list(found.values())


def _beneath(error: ErrorDetails, other: ErrorDetails) -> bool:
    """Whether the other error's place is inside the first one's."""
    above, inside = error["loc"], other["loc"]
    return len(inside) > len(above) and inside[: len(above)] == above


def _in_file(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Drop what pydantic appends for members of unions: the file knows no such keys."""
    path: tuple[str | int, ...] = ()
    for part in loc:
        kind = _type_at(model, path)
        if kind is None or not _can_contain(kind, part):
            known = isinstance(kind, type) and issubclass(kind, BaseModel)
            return (*path, part) if known else path
        path = (*path, part)
    return path


def _given(kind: Any) -> Any:
    """A type without the None of `X | None`, its metadata kept."""
    if get_origin(kind) in (Union, UnionType):
        members = [m for m in get_args(kind) if m is not type(None)]
        return members[0] if len(members) == 1 else kind
    return kind


def _bare(kind: Any) -> Any:
    kind = _given(kind)
    while get_origin(kind) is Annotated:
        kind = _given(get_args(kind)[0])
    return kind


def _can_contain(kind: Any, part: str | int) -> bool:
    origin = get_origin(kind)
    if origin in (tuple, list):
        return isinstance(part, int)
    if origin is dict:
        return isinstance(part, str)
    return isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields


def _inner(kind: Any, part: str | int) -> Any:
    """Type of an element or field, metadata included."""
    origin = get_origin(kind)
    if origin in (tuple, list):
        return get_args(kind)[0]
    if origin is dict:
        return get_args(kind)[1]
    field: FieldInfo = kind.model_fields[part]
    if not field.metadata:
        return field.annotation
    # Made of values: type checkers know Annotated in annotations alone.
    return Annotated.__class_getitem__((field.annotation, *field.metadata))  # type: ignore[attr-defined]


def _annotated_at(model: type[BaseModel], path: tuple[str | int, ...]) -> Any:
    kind: Any = model
    for part in path:
        kind = _bare(kind)
        if not _can_contain(kind, part):
            return None
        kind = _inner(kind, part)
    return kind


def _type_at(model: type[BaseModel], path: tuple[str | int, ...]) -> Any:
    return _bare(_annotated_at(model, path))


def _bounds(kind: Any) -> str:
    """The range that the metadata of a type state."""
    low = high = ""
    while get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        for item in metadata:
            for known in item.metadata if isinstance(item, FieldInfo) else [item]:
                if isinstance(known, Ge):
                    low = f"at least {known.ge}"
                elif isinstance(known, Gt):
                    low = f"more than {known.gt}"
                elif isinstance(known, Le):
                    high = f"at most {known.le}"
                elif isinstance(known, Lt):
                    high = f"less than {known.lt}"
                elif isinstance(known, MinLen):
                    is_text = _bare(inner) is str
                    low = "not empty" if is_text else f"a list of {known.min_length} or more"
        kind = inner
    return " and ".join(part for part in (low, high) if part)


def _allowed(kind: Any) -> str:
    """What may stand at a place: type and range, or the list of choices."""
    if kind is None:
        return ""
    bare = _bare(kind)
    if get_origin(bare) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(bare))
    if get_origin(bare) in (Union, UnionType):
        return " or ".join(_TYPES[t] for t in get_args(bare) if t in _TYPES)
    if get_origin(bare) in (tuple, list):
        members = get_args(bare)
        fixed = get_origin(bare) is tuple and Ellipsis not in members
        return f"a list of {len(members)}" if fixed else _bounds(kind) or "a list"
    if get_origin(bare) is dict or (isinstance(bare, type) and issubclass(bare, BaseModel)):
        return "a table of keys"
    name = _TYPES.get(bare, "")
    return ", ".join(part for part in (name, _bounds(kind)) if part)


def _name(path: tuple[str | int, ...]) -> str:
    """`block[1].lr[0]`, indices counted from 1 as readers do."""
    text = ""
    for part in path:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _message(model: type[BaseModel], path: tuple[str | int, ...], error: ErrorDetails) -> str:
    kind, name = error["type"], _name(path)
    owner = _type_at(model, path[:-1])
    if kind == "missing" and get_origin(owner) is tuple:
        return f"{_name(path[:-1])} is too short: allowed is {_allowed(owner)}"
    if kind in ("extra_forbidden", "missing"):
        known = list(owner.model_fields) if owner is not None else []
        where = f" in {_name(path[:-1])}" if path[:-1] else ""
        if kind == "missing":
            return f"key {path[-1]!r} is missing{where}"
        close = get_close_matches(str(path[-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"unknown key {path[-1]!r}{where}; known: {', '.join(known)}.{hint}"
    if kind == "value_error":
        said = str(error["ctx"]["error"]) if "ctx" in error else error["msg"]
        return f"{name}: {said}" if name else said
    allowed = _allowed(_annotated_at(model, path)) or error["msg"]
    return f"{name} = {error['input']!r}: allowed is {allowed}"
