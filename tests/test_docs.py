# SPDX-License-Identifier: MIT
"""Every Python block of the README and of the documentation runs, and so does every example.

Blocks of one page share a namespace and run in order, as a reader would run them. Names that a page
may take for granted (`model`, `loader`, `criterion`, `x`, `y`) are small stand-ins.
"""

from __future__ import annotations

import pkgutil
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oracles.effort import FULL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPET = "--8<--"
PERMUTATION, FEW = torch.randperm, 64


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the number of their first line; snippets are left out."""
    text = page.read_text()
    found = [(text[: m.start(1)].count("\n"), m.group(1)) for m in BLOCK.finditer(text)]
    return [(line, code) for line, code in found if SNIPPET not in code]


def stand_ins() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    return {
        "__name__": "__docs__",
        "torch": torch,
        "nn": nn,
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(x, y), (torch.randn(16, 64), torch.randint(10, (16,)))],
        "x": x,
        "y": y,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = stand_ins()
    for line, code in blocks(page):
        # Leading blank lines make a traceback point at the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def few(n: int, **options: Any) -> torch.Tensor:
    """A permutation's beginning: two batches or more of every epoch of an example."""
    return PERMUTATION(n, **options)[:FEW]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of them; DDPNOPT_FULL=1: on all their samples."""
    monkeypatch.chdir(tmp_path)
    if not FULL:
        monkeypatch.setattr(torch, "randperm", few)
    runpy.run_path(str(example), run_name="__main__")


def test_the_gallery_shows_every_example() -> None:
    shown = re.findall(
        r"^\| `(\w+\.py)` \|", (ROOT / "docs" / "gallery.md").read_text(), re.MULTILINE
    )
    assert sorted(shown) == [example.name for example in EXAMPLES]


def test_the_readme_has_a_quickstart() -> None:
    assert any("DDPNOpt(" in code for _, code in blocks(ROOT / "README.md"))


def test_functions_named_by_the_mathematics_exist() -> None:
    table = (ROOT / "docs" / "mathematics.md").read_text().split("## Equation by equation")[1]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row.split(" | ")[-1])]
    assert len(names) >= len(rows) > 15
    for name in names:
        pkgutil.resolve_name(f"ddpnopt.{name}")


def test_local_links_lead_somewhere() -> None:
    link = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
    missing = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in link.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing, missing
