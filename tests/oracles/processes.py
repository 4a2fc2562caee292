# SPDX-License-Identifier: MIT
"""Several ranks of torch.distributed for a test file; a hang is a failure."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


#: Processes of their own that share one start of the interpreter and its imports; those of tests/
#: are not named, since Python before 3.12 does not search pytest's path here, and says nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "ddpnopt.experiments.sweep",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.nn.parallel.distributed",
    ]
)


def run_ranks(file: str, function: str, folder: Path, limit: float = 240.0) -> list[dict[Any, Any]]:
    """What ``function(rank, folder)`` of a test file returns, each rank in a process of its own.

    Args:
        file: The test file.
        function: A name in it.
        folder: An empty one.
        limit: Seconds after which the test fails.
    """
    ends = time.monotonic() + limit
    running = [
        FORKS.Process(target=_rank, args=(file, function, rank, str(folder)))
        for rank in range(RANKS)
    ]
    for one in running:
        one.start()
    try:
        for one in running:
            one.join(max(0.0, ends - time.monotonic()))
        assert [one.exitcode for one in running] == [0] * RANKS
    finally:
        for one in running:
            one.kill()
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


def _rank(file: str, function: str, rank: int, folder: str) -> None:
    spec = importlib.util.spec_from_file_location("ranks_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_file"] = module
    spec.loader.exec_module(module)
    torch.save(getattr(module, function)(rank, folder), f"{folder}/{rank}")


def join(rank: int, folder: str, seconds: float = 60.0) -> None:
    """Begin a process group over files, with which no test waits longer than so."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=seconds),
    )


def message(call: Callable[[], Any]) -> str:
    """The error that a call raises; '' for none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
