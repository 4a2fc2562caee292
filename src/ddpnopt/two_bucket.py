# SPDX-License-Identifier: MIT
"""Two reductions a step in place of one a layer: a named approximation of the closed loop.

The open-loop part of every layer's d is summed over the ranks before the rollout. In the rollout
each rank moves its weights by the feedback of its own samples, as if the others' were the same:
nobody waits for anybody, but the ranks' states are not quite those of the batch. Then all feedback
is summed, and the weights are moved anew by it, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from ddpnopt.diagnosis import diagnosed
from ddpnopt.layer import Layer
from ddpnopt.step import Step
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks

#: A layer and a parameter of it.
Key = tuple[str, str]


class TwoBuckets:
    """A step's sums over the samples, as two vectors.

    Args:
        step: Its gains and policies are known, and p.grad of all its layers' parameters.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self._alone: dict[Key, Tensor] = {}
        for layer in step.layers.values():
            assert layer.policy is not None
            self._alone.update(self._summed(layer, layer.policy(layer, None), None))
        self._forward = step.ranks.total(self._alone)
        self._feedback: dict[Key, Tensor] = {}

    def move(self, layer: Layer, dx: Blocks | None) -> None:
        """A layer's step as this rank's samples alone would have it, in the rollout."""
        assert layer.policy is not None
        vectors = layer.policy(layer, dx)
        self.step.reports.append(diagnosed(layer, vectors, self.step.settings.diagnose))
        if dx is not None:
            for key, one in self._summed(layer, vectors, dx).items():
                self._feedback[key] = one - self._alone[key]
        self._move(layer, self._feedback, self.step.ranks.size)

    def settle(self) -> None:
        """Every layer's step anew, with the feedback of all ranks."""
        feedback = self.step.ranks.total(self._feedback) if self._feedback else {}
        for layer in self.step.layers.values():
            self.step.borrowed.retract(layer.params.values())
            self._move(layer, feedback, 1)

    def _summed(self, layer: Layer, vectors: Blocks, dx: Blocks | None) -> dict[Key, Tensor]:
        """sum_i g_u^T v_i over this rank's samples."""
        assert layer.policy is not None
        total = layer.weighted(vectors)
        bend = layer.policy.bend(layer, dx) if dx is not None else None
        bent = layer.bent(bend, dx) if bend is not None and dx is not None else {}
        return {
            (layer.name, n): total[n] + bent[n] if n in bent else total[n] for n in layer.params
        }

    def _move(self, layer: Layer, feedback: Mapping[Key, Tensor], times: int) -> None:
        scale, d = self.step.settings.correction_scale, dict[str, Tensor]()
        for name, p in layer.params.items():
            assert p.grad is not None
            key = layer.name, name
            d[name] = p.grad.add(self._forward[key], alpha=scale)
            if key in feedback:
                d[name].add_(feedback[key], alpha=scale * times)
        self.step.move(layer, d)
