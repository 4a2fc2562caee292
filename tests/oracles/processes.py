# SPDX-License-Identifier: MIT
"""Several ranks of torch.distributed for a test file; a hang is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def run_ranks(file: str, function: str, folder: Path, limit: float = 240.0) -> list[dict[Any, Any]]:
    """What ``function(rank, folder)`` of a test file returns, each rank in a process of its own.

    Args:
        file: The test file.
        function: A name in it.
        folder: An empty one.
        limit: Seconds after which the test fails.
    """
    code = (
        "import importlib.util, sys, torch;"
        f"spec = importlib.util.spec_from_file_location('ranks_file', {file!r});"
        "module = importlib.util.module_from_spec(spec); sys.modules['ranks_file'] = module;"
        "spec.loader.exec_module(module); rank = int(sys.argv[1]); folder = sys.argv[2];"
        f"torch.save(module.{function}(rank, folder), folder + f'/{{rank}}')"
    )
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], env=environment)
        for rank in range(RANKS)
    ]
    try:
        assert [one.wait(timeout=limit) for one in running] == [0] * RANKS
    finally:
        for one in running:
            one.kill()
    return [torch.load(folder / str(rank)) for rank in range(RANKS)]


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
