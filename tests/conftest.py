# SPDX-License-Identifier: MIT
"""Settings shared by all tests."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# Tests run in parallel processes: one thread each is fastest, and sums keep their order.
torch.set_num_threads(1)

# The same examples on every machine, and no failure because a machine was slow.
hypothesis.settings.register_profile("ddpnopt", derandomize=True, deadline=None, max_examples=15)
hypothesis.settings.load_profile("ddpnopt")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same random state, whatever ran before it in the process."""
    torch.manual_seed(0)
