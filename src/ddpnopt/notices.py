# SPDX-License-Identifier: MIT
"""What runs differently from what was asked, said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ddpnopt.errors import DDPNOptWarning
from ddpnopt.ledger import FROZEN, mixes
from ddpnopt.stages import Trajectory
from ddpnopt.typing import Tensor

NOT_RECOGNISED = (
    "the loss was not recognised from the output's gradient, so the steps are the borrowed "
    "optimizer's, without feedback. Name it: terminal='cross_entropy', 'mse', 'bce_with_logits', "
    "or a callable output -> factor of its Hessian"
)
NO_OUTPUT_GRADIENT = (
    "the last layer that ran gets no gradient from the loss, so there is no terminal cost and the "
    "steps are the borrowed optimizer's, without feedback; run only the layers that the loss needs"
)
OUTPUT_OVERWRITTEN = (
    "the last layer's output was modified in place after the layer, so the loss can't be told "
    "from it and the steps are the borrowed optimizer's, without feedback; modify a copy"
)
CLIPPED_BIASES = (
    "p.grad was rescaled with weight_gradients=False: the weights' steps get the same factor, but "
    "clip_grad_norm_ has seen the norm of the biases alone. To clip, use weight_gradients=True"
)
FACTORISED_AGAIN = (
    "the factorisation of a layer's curvature failed and was repeated with more damping, or in "
    "double precision; opt.fallbacks counts how often, opt.state[layer.weight]['fallbacks'] where. "
    "Raise damping if it goes on"
)
DEFAULT_GROUP = (
    "torch.distributed is initialised with several ranks: each step is taken on the samples of all "
    "ranks of the default process group. Another group: process_group=...; each by itself: "
    "distributed=False"
)
ANOTHER_NOT_RECOGNISED = (
    "another rank's loss was not recognised from the output's gradient, so the steps are the "
    "borrowed optimizer's on all ranks, without feedback; it says itself what to do"
)
UNEVEN = (
    "the ranks have batches of different sizes, and DistributedDataParallel averages the ranks' "
    "losses whatever their sizes: samples of small batches count for more. For the mean over all "
    "samples leave DistributedDataParallel away, or use drop_last=True"
)


#: Different warnings that one optimizer gives, and structures that it remembers to have spoken of.
MOST = 256
NO_MORE = (
    f"{MOST} different warnings have been given, as where each pass has other layers: this "
    "optimizer gives no more of them"
)


class Notices:
    """Warnings of one optimizer; each is given once, and not without end."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._told: set[tuple[Any, ...]] = set()

    def say(self, message: str) -> None:
        """Warn, unless it has been said, or too much has."""
        if message in self._said or len(self._said) > MOST:
            return
        message = message if len(self._said) < MOST else NO_MORE
        self._said.add(message)
        warnings.warn(message, DDPNOptWarning, stacklevel=5)

    def say_without_cost(self, trajectories: Sequence[Trajectory], decision: str) -> None:
        """Say why there is no terminal cost.

        Args:
            trajectories: The passes, of which some have none.
            decision: What the recogniser has decided.
        """
        if any(t.stages[-1].G is None for t in trajectories):
            self.say(NO_OUTPUT_GRADIENT)
        elif decision == "unrecognised":
            self.say(NOT_RECOGNISED)

    def say_plain(
        self,
        trajectory: Trajectory,
        names: Callable[[], dict[Tensor, str]],
        trainable: Callable[[Tensor], bool],
        weighted: bool = True,
    ) -> None:
        """Say which layers and parameters take the plain step, once for each structure.

        Args:
            trajectory: The pass.
            names: Paths of the model's parameters.
            trainable: Whether a parameter belongs to the optimizer.
            weighted: The samples are weighted in front of a mixing; else that is plain, too.
        """
        case = trajectory.key, tuple([stage.plain for stage in trajectory.stages])
        if case in self._told:
            return
        if len(self._told) > MOST:
            self._told.clear()
        self._told.add(case)
        reasons: dict[str, dict[str, None]] = {}
        at, stages = trajectory.boundary if weighted else 0, trajectory.stages
        if at:
            place = f"the input of '{stages[at].name}'" if at < len(stages) else "the output"
            reason = "the layers there don't run one after another"
            if any(mixes(stage) for stage in stages[:at]):
                reason = "samples are mixed there, as by BatchNorm in training mode, or change rows"
            self.say(
                f"each sample is weighted once, at {place}, for all that lies in front of it "
                f"({', '.join(dict.fromkeys(repr(s.name) for s in stages[:at]))}), without "
                f"layer-wise feedback: {reason}"
            )
        lost = [s.name for s in trajectory.active if any(b.at(s.time) for b in trajectory.blind)]
        if lost:
            self.say(
                f"{', '.join(map(repr, lost))} take their open-loop policy: a tensor that crosses "
                "in front of them is overwritten in place, or made by a function that can't be "
                "followed, so what earlier layers change there is not seen"
            )
        if trajectory.cut_short is not None:
            self.say(
                f"layers ran again, or first, behind the call of '{trajectory.cut_short}', which "
                "was taken for the whole pass: this step is the open loop's; from the next pass on "
                "what calls it is run again"
            )
        for stage in stages[at:]:
            if stage.plain and stage.plain != FROZEN:
                reasons.setdefault(stage.plain, {})[f"'{stage.name}'"] = None
        ran = {id(p) for s in stages for p in s.module.parameters()}
        ran |= {id(p) for p in (trajectory.front.corrections if trajectory.front else ())}
        for p, name in names().items():
            if id(p) not in ran and trainable(p) and p.grad is not None:
                reasons.setdefault("they belong to no layer that ran", {})[f"'{name}'"] = None
        for reason, found in reasons.items():
            self.say(
                f"{', '.join(found)} take the borrowed optimizer's plain step, without feedback: "
                f"{reason}"
            )
