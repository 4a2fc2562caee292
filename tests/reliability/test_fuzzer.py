# SPDX-License-Identifier: MIT
"""The program that fuzzes by coverage: its seeds are read, and it sees what must not happen.

The full run is `python benchmarks/fuzz.py`, which needs atheris.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ddpnopt.experiments.loaders import idx


def program() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FUZZ = program()


@pytest.mark.parametrize("name", FUZZ.TARGETS)
def test_seeds_are_read_and_halves_are_refused(name: str, tmp_path: Path) -> None:
    target = FUZZ.TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        for part, size in (("whole", len(seed)), ("half", len(seed) // 2), ("empty", 0)):
            folder = tmp_path / f"{number}-{part}"
            folder.mkdir()
            read = FUZZ.outcome(target, seed[:size], folder)
            assert read or part != "whole"


@pytest.mark.parametrize("error", [KeyError("rows"), ValueError("no name of a file")])
def test_other_errors_are_seen(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(idx, "read_idx", fail)
    target = FUZZ.TARGETS["idx"]
    with pytest.raises((KeyError, AssertionError)):
        FUZZ.outcome(target, target.seeds()[0], tmp_path)
