# SPDX-License-Identifier: MIT
"""Trainings with checkpoints: in processes of their own, for tests that kill them; comparisons."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpnopt.experiments import checkpoints as files
from ddpnopt.experiments.checkpoints import Checkpoints, read_checkpoint
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.training import train

TIMES = ("seconds", "cpu_seconds")
SMALL = RunConfig(dataset="wine", architecture="mlp-8x2-tanh", lr=0.05, epochs=2, batch=36)


def _slow(self: Any, content: bytes, write: Any = files._Sealing.write) -> int:
    """Write a few hundred bytes at a time, each to the disk before the next."""
    for place in range(0, len(content), 400):
        write(self, content[place : place + 400])
        self._file.flush()
        time.sleep(0.0005)
    return len(content)


def main(config: str, folder: str, every: int, slow: bool) -> None:
    """Train with checkpoints, going on from those that are there."""
    sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    if slow:
        files._Sealing.write = _slow  # type: ignore[method-assign]
    made = RunConfig.model_validate_json(config)
    train(made, None, Checkpoints(Path(folder), every=every, resume=True))


class Stop(Exception):
    """In place of a kill, in this process."""


class Stopping(Checkpoints):
    """Checkpoints whose training ends behind the one at step `at`."""

    at = 6

    def save(self, step: int, state: Any) -> Path:
        path = super().save(step, state)
        if step == self.at:
            raise Stop
        return path


def without_times(result: RunResult) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(result.model_dump_json())
    for part in (plain, *plain["epochs"]):
        for name in TIMES:
            part.pop(name, None)
    return plain


def final(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, without times."""
    state = read_checkpoint(Checkpoints(folder).files()[0])
    for part in (state["progress"], *state["progress"]["epochs"]):
        for name in TIMES:
            del part[name]
    return state


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Where two states differ, to the bit; NaNs are the same where their bits are."""
    if isinstance(one, Tensor):
        same = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return [] if same and _bits(one) == _bits(other) else [where]
    if isinstance(one, dict):
        if not isinstance(other, dict) or list(one) != list(other):
            return [f"{where}: keys"]
        return [d for k in one for d in differences(one[k], other[k], f"{where}.{k}")]
    if isinstance(one, (list, tuple)):
        if type(one) is not type(other) or len(one) != len(other):
            return [f"{where}: length"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for k, (a, b) in pairs for d in differences(a, b, f"{where}[{k}]")]
    return [] if type(one) is type(other) and repr(one) == repr(other) else [where]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def check_resume(config: RunConfig, folder: Path, every: int | None = 3, at: int = 6) -> RunResult:
    """Straight, and stopped behind step `at`: all that is saved at the end is the same."""
    straight = train(config, None, Checkpoints(folder / "straight", every=every))
    stopping = Stopping(folder / "resumed", every=every)
    object.__setattr__(stopping, "at", at)
    with pytest.raises(Stop):
        train(config, None, stopping)
    # Nothing of the process that ended may matter.
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    resumed = train(config, None, Checkpoints(folder / "resumed", every=every, resume=True))
    assert differences(final(folder / "straight"), final(folder / "resumed")) == []
    assert without_times(straight) == without_times(resumed)
    return straight
