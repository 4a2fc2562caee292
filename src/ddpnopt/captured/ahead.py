# SPDX-License-Identifier: MIT
"""Steps that are computed in the backward pass, if they are those that the loop asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ddpnopt.captured.forward import Pass
from ddpnopt.captured.numbers import Rates
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.captured.phases import Found
from ddpnopt.errors import LinAlgError
from ddpnopt.typing import Tensor

#: Steps that turned out to be other ones before backward pass and step are kept apart, and how many
#: of them each one that did not makes up for.
LATE, FORGIVEN = 3, 1 / 8


class Ahead:
    """Runs recorded backward passes, with the step where that is one with them.

    Args:
        rates: The learning rates.
        weights: The sum of the parameters' versions.
        joins: Backward pass and step are to be one, to begin with. In open loop p.grad itself
            depends on rates and weights: with others the pass could not run again.

    Attributes:
        joins: Records are to have backward pass and step in one.
    """

    def __init__(self, rates: Rates, weights: Callable[[], int], joins: bool) -> None:
        self.joins, self._late = joins, 0.0
        self._rates, self._weights = rates, weights

    def backward(
        self, one: Pass, plan: PhasedPlan, saved: Sequence[Tensor], inputs: Found
    ) -> tuple[Sequence[Tensor], bool]:
        """Run a backward pass.

        Args:
            one: The pass; it gets what the step needs, or the step.
            plan: Its record.
            saved: What the forward pass has left.
            inputs: The arguments, and the gradients at what the model has returned.

        Returns:
            The parameters' gradients, none if the record does not know them; and whether all is as
            it was in the recording.
        """
        numbers, rates = self._rates.update(), self._rates.tensors
        if not plan.phases.joined:
            found, one.found, decided = plan.backward(saved, inputs, rates)
            return found, decided
        blank = all([p.grad is None for p in plan.receiving])
        try:
            found, early, decided = plan.early(saved, inputs, rates, self._weights(), numbers)
        except LinAlgError:  # as written, another factorisation is tried
            return [], False
        one.early = early if blank else None  # p.grad is going to be another one
        if not blank:
            self._miss()
        return found, decided

    def stands(self, one: Pass, plan: PhasedPlan) -> bool:
        """Whether the step of a pass can be run from the record, or has been and still holds."""
        early = one.early
        if early is None:
            return bool(one.found) and plan.current()
        grads, current = [p.grad for p in plan.receiving], plan.still_current()
        weights, rates, state = self._weights(), self._rates.numbers, plan.depends_on()
        if current and early.stands(grads, weights, rates, state):
            if plan.check_values(early, [g for g in grads if g is not None], state):
                self._late = max(0.0, self._late - FORGIVEN)
                return True
        self._miss()
        return False

    def _miss(self) -> None:
        self._late += 1
        if self._late >= LATE:
            self.joins = False
