# SPDX-License-Identifier: MIT
"""Models compiled by torch.compile: passes that are recorded or run again run as written.

The layers of a compiled pass can't be told apart. Passes without gradients stay compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

AS_WRITTEN = (
    "the model is compiled by torch.compile: its training passes run uncompiled, since their "
    "layers have to be told apart; passes without gradients stay compiled"
)


def compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules is compiled, in place or by a wrapper."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None:  # nothing has been compiled in this process
        return False
    wrapper = frames.OptimizedModule
    for module in modules:
        if module._compiled_call_impl is not None or isinstance(module, wrapper):
            return True
    return False


@contextmanager
def as_written(traced: bool = False) -> Iterator[None]:
    """Within the block compiled modules run their own code.

    Args:
        traced: The block is inside what a compiler runs, which can only be kept from going on.
    """
    from torch._dynamo import config  # slow to import, and loaded where anything is compiled

    with config.patch(disable=True) if traced else torch.compiler.set_stance("force_eager"):
        yield
