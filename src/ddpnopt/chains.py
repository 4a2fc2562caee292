# SPDX-License-Identifier: MIT
"""Whether the gradient at each state has come from its layer alone: compared with autograd's."""

from __future__ import annotations

import torch

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.linearise import cast_state
from ddpnopt.stages import Trajectory


def verify_chain(trajectory: Trajectory) -> None:
    """Once a structure: the gradient at each state must come from its layer alone.

    A state that reaches the loss on another way too (a returned feature, an auxiliary head) is
    no state of a chain, and its feedback would be wrong without a sign of it.

    Raises:
        UnsupportedModelError: The layer is named.
    """
    for stage in trajectory.active:
        if stage.g_x is None or stage.rule is None or stage.G is None:
            continue
        dtype = next(stage.module.parameters()).dtype
        g_x = stage.g_x.to(dtype)
        x = cast_state(stage.x, dtype)
        pulled = stage.rule.pull(stage.module, x, stage.G.to(dtype)[None])[0]
        tolerance = max(64 * torch.finfo(stage.G.dtype).eps, 1e-4)
        # What is not finite shows nothing, and has an error of its own.
        size = g_x.norm() + pulled.norm()
        apart = (pulled - g_x).norm()  # not in place: a rule may return G itself
        del pulled  # as large as the state: before the next one is made
        if bool(apart > tolerance * size):
            raise UnsupportedModelError(
                f"the input of '{stage.name}' reaches the loss on another way than through "
                f"'{stage.name}' (a feature that is returned and used, an auxiliary loss): "
                "feedback is for chains; use feedback=False"
            )


def verify_once(trajectory: Trajectory, keep_states: bool) -> None:
    """`verify_chain` if it is due; what is wrong is raised at the step, where it is expected.

    Args:
        trajectory: Its backward pass is over.
        keep_states: The gradients at the states are needed later, too.
    """
    if trajectory.unaccounted is not None:
        trajectory.error = trajectory.error or UnsupportedModelError(
            f"something that is made behind '{trajectory.unaccounted}' reaches the loss on a way "
            "that can't be seen (a feature that is kept on a module, or returned in an object of "
            "another kind than a tuple, a mapping or a dataclass, and has a loss of its own): "
            "return it from the model in a tuple or a dict, or use feedback='open_loop'"
        )
        return
    due, trajectory.to_verify = trajectory.to_verify, False
    if not due or trajectory.error is not None:
        return
    try:
        verify_chain(trajectory)
    except UnsupportedModelError as error:
        trajectory.error = error
    if not keep_states:
        for stage in trajectory.stages:
            stage.g_x = None
