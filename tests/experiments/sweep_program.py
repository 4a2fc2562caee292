# SPDX-License-Identifier: MIT
"""A sweep in a process of its own, for tests that kill it."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from ddpnopt.experiments import sweep as sweeps
from ddpnopt.experiments.records import RunConfig, RunResult
from ddpnopt.experiments.store import SqliteStore, StoreError
from ddpnopt.experiments.training import train

BASE = RunConfig(dataset="wine", architecture="mlp-4x1-tanh", optimizer="sgd", epochs=1, batch=64)


def configs(seeds: int) -> list[RunConfig]:
    """Two rates for every seed."""
    return sweeps.grid(BASE, [sweeps.Contender("sgd", (0.1, 0.3))], range(seeds))


def main(store: str, log: str, seeds: int) -> None:
    """Run the sweep in this process; every training begun is a line of the log."""
    sys.stderr = open(os.devnull, "w")  # the progress display

    def logged(config: RunConfig) -> RunResult:
        with open(log, "a") as file:
            file.write(f"{config.key}\n")
        return train(config)

    torch.set_num_threads(2)
    sweeps.train = logged  # type: ignore[assignment]
    sweeps.sweep(configs(seeds), SqliteStore(Path(store)), jobs=1)


def limited(store: str, said: str, size: int) -> None:
    """Sweep in this process, no file of which may grow beyond that; its error is written down."""
    import resource  # not on Windows

    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        screen = Console(file=io.StringIO())
        sweeps.sweep(configs(40), SqliteStore(Path(store)), jobs=1, console=screen)
    except StoreError as error:
        Path(said).write_text(str(error))
