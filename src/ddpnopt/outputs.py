# SPDX-License-Identifier: MIT
"""The outputs of a pass as their gradients arrive: which losses were they, and their joint cost."""

from __future__ import annotations

from typing import Any

from ddpnopt.checks import output_intact
from ddpnopt.errors import TerminalError
from ddpnopt.notices import OUTPUT_OVERWRITTEN, Notices
from ddpnopt.recognition import Recogniser, Terminal
from ddpnopt.stages import Stage, Trajectory
from ddpnopt.terminal import Cost, joint
from ddpnopt.typing import Tensor


class Outputs:
    """Recognises the loss at every output.

    Args:
        terminal: The optimizer's option.
        notices: Where to say what is wrong.

    Attributes:
        main: Recogniser of the last output.
        others: Those of heads beside it, by module path.
    """

    def __init__(self, terminal: Terminal, notices: Notices) -> None:
        self.terminal, self.notices = terminal, notices
        self.main = Recogniser(terminal)
        self.others: dict[str, Recogniser] = {}
        #: The memories before the backward pass that runs, or has never ended.
        self._before: dict[str, Any] | None = None

    def begin(self) -> None:
        """A backward pass begins: what one that never ended has shown is forgotten."""
        if self._before is not None:
            self._remember(self._before)
        self._before = self._memories()

    def settle(self) -> None:
        """It has ended."""
        self._before = None

    def cost(
        self, trajectory: Trajectory, stage: Stage, G: Tensor
    ) -> tuple[Cost | None, Cost | None]:
        """An output's own cost, and that of all whose gradient has arrived; None if unrecognised.

        An output beside the last whose loss is not recognised (a penalty on a latent code) counts
        with its gradient, and without curvature.

        Args:
            trajectory: The pass.
            stage: Whose output it is.
            G: The output's gradient.

        Raises:
            TerminalError: The cost that the user has named contradicts the last output.
        """
        axis = stage.rule.feature_axis if stage.rule is not None else -1
        found: Cost | None = None
        if stage is trajectory.stages[-1]:
            assert trajectory.z is not None
            if output_intact(trajectory, self.terminal):
                found = self.main(trajectory.z, G, axis, trajectory.samples)
            else:
                self.notices.say(OUTPUT_OVERWRITTEN)
        else:
            recogniser = self.others.setdefault(stage.name, Recogniser(self.terminal))
            try:
                found = recogniser(trajectory.heads[stage].z, G, axis, trajectory.samples)
            except TerminalError:
                found = None
        trajectory.arrived[stage] = found, G
        return found, joint(list(trajectory.arrived.values()), trajectory.samples)

    def state_dict(self) -> dict[str, Any]:
        """The recognisers' memories."""
        return self._memories() if self._before is None else self._before

    def _memories(self) -> dict[str, Any]:
        others = {name: one.state_dict() for name, one in self.others.items()}
        return {**self.main.state_dict(), "others": others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._before = None
        self._remember(state)

    def _remember(self, state: dict[str, Any]) -> None:
        self.main.load_state_dict(state)
        for name, memory in state.get("others", {}).items():
            self.others.setdefault(name, Recogniser(self.terminal)).load_state_dict(memory)
