# SPDX-License-Identifier: MIT
"""Where torch.compile meets a recorder's hooks: it does not follow them.

Imported while something is compiled, and not before: the compiler is slow to load.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpnopt.inert import Hook


@torch.compiler.disable  # type: ignore[untyped-decorator]
def outside(hook: Hook, *args: Any) -> Any:
    """Call a hook; the compiler is kept from going on with the pass that it records."""
    recorder: Any = hook.recorder() if hook.recorder is not None else None
    if recorder is not None:
        recorder.watching.traced = True
    return hook(*args)
