# SPDX-License-Identifier: MIT
"""What a layer's call looks like as a stage: its state, its output, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ddpnopt.arguments import tensors_of
from ddpnopt.layers import LayerRule, rule_of_call
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor
from ddpnopt.watch import Watch


class Executed(NamedTuple):
    """A module that has run.

    Attributes:
        module: The module.
        inputs: The tensors it was given, nested ones included, in the order of its signature.
        outputs: Those it returned.
        rule: Its rule, or None.
        against: Why it has none.
    """

    module: nn.Module
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    rule: LayerRule | None
    against: str

    @staticmethod
    def of(module: nn.Module, given: tuple[Any, ...], outputs: Sequence[Tensor]) -> Executed:
        """A call with these arguments, and the tensors that it returned."""
        inputs = tensors_of(given)
        rule, against = rule_of_call(module, given, len(outputs), len(inputs))
        return Executed(module, inputs, outputs, rule, against)

    def joined(self, watch: Watch | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All outputs as one tensor, which has their gradient, and the parts that take their place.

        Args:
            watch: Learns the parts' names.
        """
        assert self.rule is not None
        h = self.rule.pack_output(self.module, self.outputs)
        parts = self.rule.unpack_output(self.module, h)
        if watch is not None:
            for before, after in zip(self.outputs, parts, strict=True):
                watch.renamed(before.grad_fn, before.output_nr, after)
                watch.path.same(before, after)
        return h, parts

    def stage(self, name: str, own: Sequence[Tensor], out: Tensor, time: int) -> Stage:
        """The call as a stage.

        Args:
            name: Module path.
            own: The module's parameters.
            out: Its output, all in one.
            time: How many layers have begun.
        """
        rule, module = self.rule, self.module
        aliases = tuple([t.detach() for t in self.inputs])
        state = rule.pack(module, aliases) if rule is not None else (*aliases, out.detach())[0]
        unbatched = rule is not None and state.dim() < rule.batched_dim(module)
        return Stage(
            name,
            module,
            rule,
            state[None] if unbatched else state,
            aliases,
            tuple([-1 if t.is_inference() else t._version for t in self.inputs]),
            out.shape[0] if out.dim() and not unbatched else 1,
            unbatched,
            sum([p._version for p in own]),
            plain=self.against,
            time=time,
        )
