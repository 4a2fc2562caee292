# SPDX-License-Identifier: MIT
"""The line of every key and element of a TOML text: `tomllib` keeps none.

The text is one that `tomllib` has accepted, so the scanner only has to know where things begin
and end.
"""

from __future__ import annotations

import re

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^\s,\]\}#][^,\]\}#\n]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")


def lines_of(text: str) -> dict[Path, int]:
    """Find where everything stands.

    Args:
        text: A valid TOML text.

    Returns:
        Line, counted from 1, of every table, key and array element by its path, such as
        `("block", 1, "lr", 0)`.
    """
    scanner = _Scanner(text.replace("\r\n", "\n"))
    scanner.document()
    return scanner.lines


def line_of(lines: dict[Path, int], path: Path) -> int:
    """Return the line of `path`, or of the innermost table or key around it; 1 for the whole."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


class _Scanner:
    """Walks the text once, noting the line of each path."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        #: Number of tables seen under each array of tables.
        self.counts: dict[Path, int] = {}

    def document(self) -> None:
        table: Path = ()
        while self._blank():
            if self.text.startswith("[[", self.at):
                table = self._header(2)
            elif self.text[self.at] == "[":
                table = self._header(1)
            else:
                self._pair(table)

    def _blank(self) -> bool:
        """Skip spaces, line ends and comments; say whether anything is left."""
        found = _BLANK.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at < len(self.text)

    def _note(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def _resolve(self, parts: list[str]) -> Path:
        """Names of a header as a path: inside an array of tables, its last table is meant."""
        path: Path = ()
        for part in parts:
            path = (*path, part)
            if path in self.counts:
                path = (*path, self.counts[path] - 1)
        return path

    def _header(self, brackets: int) -> Path:
        start = self.at
        self.at += brackets
        parts = self._key()
        end, self.at = self.at + brackets, start
        path = self._resolve(parts)
        if brackets == 2:
            array = (*self._resolve(parts[:-1]), parts[-1])
            number = self.counts.get(array, 0)
            self.counts[array] = number + 1
            self._note(array)
            path = (*array, number)
        self._note(path)
        self.at = end
        return path

    def _key(self) -> list[str]:
        """A dotted key; stops at what follows it."""
        parts: list[str] = []
        while True:
            self._blank()
            quoted = _STRING.match(self.text, self.at)
            found = quoted or _BARE.match(self.text, self.at)
            if found is None:
                return parts
            parts.append(found[0][1:-1] if quoted else found[0])
            self.at = found.end()
            self._blank()
            if not self.text.startswith(".", self.at):
                return parts
            self.at += 1

    def _pair(self, table: Path) -> None:
        start = self.at
        path = table
        parts = self._key()
        end, self.at = self.at, start
        for part in parts:
            path = (*path, part)
            self._note(path)
        self.at = end + 1  # the equals sign
        self._value(path)

    def _value(self, path: Path) -> None:
        self._blank()
        opening = self.text[self.at : self.at + 1]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline(path)
        else:
            found = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            self.at = found.end() if found else self.at + 1

    def _array(self, path: Path) -> None:
        self.at += 1
        number = 0
        while self._blank() and self.text[self.at] != "]":
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self._note((*path, number))
            self._value((*path, number))
            number += 1
        self.at += 1

    def _inline(self, path: Path) -> None:
        self.at += 1
        while self._blank() and self.text[self.at] != "}":
            if self.text[self.at] == ",":
                self.at += 1
                continue
            self._pair(path)
        self.at += 1
