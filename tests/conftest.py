# SPDX-License-Identifier: MIT
"""Settings shared by all tests."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from oracles.effort import FULL

# Tests run in parallel processes: one thread each is fastest, and sums keep their order.
torch.set_num_threads(1)

# With every call of torch.manual_seed torch keeps a seed, and the stack as text, for each kind of
# device that is not there: 2 ms, ten thousand times.
for _device in (torch.cuda, torch.mtia, torch.xpu):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None

# The same examples on every machine, and no failure because a machine was slow.
hypothesis.settings.register_profile(
    "ddpnopt", derandomize=True, deadline=None, max_examples=150 if FULL else 15
)
hypothesis.settings.load_profile("ddpnopt")


def pytest_collection_finish() -> None:
    """Take what the imports left, millions of objects, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same random state, whatever ran before it in the process."""
    torch.manual_seed(0)


#: What enables torch functions again disables them as it is collected.
_kept: list[Any] = []


@pytest.fixture(autouse=True)
def _torch_functions() -> Iterator[None]:
    """An injected interrupt may leave torch functions disabled: seen where it happens."""
    yield
    if not torch._C._is_torch_function_enabled():
        enabled = torch._C._EnableTorchFunction()  # for the tests that follow
        enabled.__enter__()
        _kept.append(enabled)
        pytest.fail("torch functions stay disabled in this thread")


def _stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """No test talks to another machine."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise RuntimeError(f"a test connects to {arguments[1]}: tests need no network")


sys.addaudithook(_stay_here)
