# SPDX-License-Identifier: MIT
"""The messages that the page on troubleshooting explains are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def words() -> list[str]:
    """Every text in the library's source, parts that are computed left out."""
    found = []
    for file in (ROOT / "src" / "ddpnopt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


WORDS = words()


def test_the_page_quotes_messages() -> None:
    assert len(QUOTED) >= 20


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_messages_are_in_the_code(quoted: str) -> None:
    assert any(quoted in text for text in WORDS), quoted
