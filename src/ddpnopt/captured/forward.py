# SPDX-License-Identifier: MIT
"""A call of the model in a plain loop that may be run from a record: what stands in its place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from ddpnopt.captured import calls
from ddpnopt.captured.early import Early
from ddpnopt.captured.phased import PhasedPlan
from ddpnopt.captured.phases import Found
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import probes
from ddpnopt.keeping import buffers_of
from ddpnopt.randomness import Randomness
from ddpnopt.typing import Tensor

Gradients = list[Tensor | None]


@dataclass(eq=False)
class Pass:
    """A call of the model, and all that it takes to run it again.

    Attributes:
        args, kwargs: What it was given.
        tensors: The tensors in it, in order, and their versions.
        kind: What a record depends on besides the numbers.
        autocast: Whether it is on, and to what.
        generator: State of torch's generator before it, where that is needed.
        randomness: The states of all of them, where it is to be recorded.
        buffers: What the model held before it, as far as the pass may change that.
        weights: The sum of the parameters' versions.
        training: The modules, and whether each was in training mode.
        number: Passes before it.
        G: The gradients at the tensors that it has returned, one list for each backward pass.
        plan: The record that it was run from; None: as it is written.
        found: What the step needs of what was computed.
        early: The step, where it was computed in the backward pass.
        odd: It is part of another loss, or of several: not to be recorded.
        outputs: The tensors that it has returned, where it is to be recorded.
        places: Where its parameters were, likewise.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int]
    kind: tuple[Any, ...]
    autocast: tuple[bool, torch.dtype | None]
    weights: int = 0
    training: list[tuple[nn.Module, bool]] = field(default_factory=list)
    number: int = 0
    generator: Tensor | None = None
    randomness: Randomness | None = None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    G: list[Gradients] = field(default_factory=list)
    plan: PhasedPlan | None = None
    found: Found = field(default_factory=dict)
    early: Early | None = None
    odd: bool = False
    outputs: list[Tensor] = field(default_factory=list)
    places: list[tuple[Tensor, int]] = field(default_factory=list)

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """A call with these arguments."""
        tree: Any = None
        leaves: Sequence[Any] = args
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            leaves, tree = tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        versions = [-1 if t.is_inference() else t._version for t in tensors]
        autocast = calls.autocast_of(tensors)
        kind = tree, autocast, tuple(map(calls.kind_of, leaves))
        return Pass(args, kwargs, tensors, versions, kind, autocast)

    def prepare(self, modules: Sequence[nn.Module]) -> None:
        """It is going to run as it is written, and may have to be run again."""
        self.randomness = Randomness.capture()
        self.buffers = [(b, b.detach().clone()) for _, _, b in buffers_of(modules)]
        own = [p for m in modules for p in m._parameters.values() if p is not None]
        self.places = [(p, p.data_ptr()) for p in own]

    def recordable(self) -> bool:
        """Whether it may be run again for a record: one backward pass, on the same parameters."""
        in_place = all(p.data_ptr() == at for p, at in self.places)
        return len(self.G) == 1 and not self.odd and in_place

    def rewind(self) -> None:
        """Generators as they were before it."""
        if self.randomness is not None:
            self.randomness.restore()
        elif self.generator is not None:
            torch.set_rng_state(self.generator)

    def put_back(self) -> None:
        """Buffers as they were before it."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                buffer.copy_(before)

    def copied(self) -> Pass:
        """The same with copies of its tensors: the model may know these by another way, too."""
        args, kwargs = tree_map(calls.copied, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs, tensors=Pass.of(args, kwargs).tensors)

    def check_inputs(self) -> None:
        """Its arguments must be those of the pass.

        Raises:
            UnsupportedModelError: One was overwritten.
        """
        for number, (t, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            if version != -1 and version != t._version:
                raise UnsupportedModelError(
                    f"input tensor {number} of the model was modified in place after the forward "
                    "pass, so the pass can't be run again with the new weights; modify a copy, or "
                    "use feedback='open_loop'"
                )


class Owner(Protocol):
    """Runs the model's passes."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward pass."""

    def backward(self, one: Pass, saved: Sequence[Tensor], G: Sequence[Tensor | None]) -> Any:
        """The parameters' gradients."""

    def give_up(self, why: str) -> None:
        """From now on everything runs as it is written."""


class Forward:
    """Stands on a model in place of its method ``forward``; copies and pickles have the method.

    Args:
        owner: Runs the forward pass; once it is gone, the model's own method does.
        model: The model.
    """

    def __init__(self, owner: Owner, model: nn.Module) -> None:
        self._owner, self._model = weakref.ref(owner), weakref.ref(model)
        #: What stood there before, if anything did.
        self.before: Callable[..., Any] | None = vars(model).get("forward")
        update_wrapper(self, type(model).forward)

    @property
    def method(self) -> Callable[..., Any]:
        """The model's own."""
        model = self._model()
        assert model is not None
        return self.before or MethodType(type(model).forward, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass."""
        owner = self._owner()
        return self.method(*args, **kwargs) if owner is None else owner.forward(args, kwargs)

    def remove(self) -> None:
        """The model has its own method again."""
        model = self._model()
        if model is not None and vars(model).get("forward") is self:
            del model.forward
            if self.before is not None:
                model.forward = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """A copied model's own method."""
        copy: nn.Module = memo[id(self._model())]
        return MethodType(type(copy).forward, copy)

    def __reduce__(self) -> tuple[Any, ...]:
        """Likewise: where it is unpickled, the model has nothing but its class's methods yet."""
        return getattr, (self._model(), "forward")


class _Attached(torch.autograd.Function):
    """What a recorded forward pass returns, with the recorded backward pass behind it."""

    @staticmethod
    def forward(
        ctx: Any,
        owner: weakref.ref[Owner],
        one: Pass,
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        assert one.plan is not None
        ctx.owner, ctx.one = owner, one
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if not all(one.plan.differentiable):
            pairs = zip(outputs, one.plan.differentiable, strict=True)
            ctx.mark_non_differentiable(*[t for t, differentiable in pairs if not differentiable])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        owner = ctx.owner()
        if torch.is_grad_enabled():
            if owner is not None:
                owner.give_up("a backward pass is to build a graph (create_graph=True)")
            raise RuntimeError(
                "capture(opt, passes=True): a recorded pass can't be differentiated twice "
                "(create_graph=True); from now on passes run as they are written: run this one "
                "again, and use capture(opt), which records the step alone"
            )
        if owner is None:
            raise RuntimeError(
                "capture: the optimizer of this pass is gone, and the record of its backward pass "
                "with it; run the forward pass again"
            )
        found = owner.backward(ctx.one, ctx.saved_tensors, gradients)
        return None, None, None, None, None, *found


def attach(
    owner: Owner, one: Pass, outputs: Sequence[Tensor], saved: Sequence[Tensor], token: Tensor
) -> tuple[Tensor, ...]:
    """What a model returns, as if it had made it.

    Args:
        owner: Runs the backward pass.
        one: The pass.
        outputs: The tensors that it returns.
        saved: What the backward pass needs.
        token: Asks for a gradient, where no parameter does.
    """
    assert one.plan is not None
    found: tuple[Tensor, ...] = _Attached.apply(  # type: ignore[no-untyped-call]
        weakref.ref(owner), one, outputs, saved, token, *one.plan.receiving
    )
    return found


def watched(one: Pass, output: Any) -> Any:
    """Note the gradients at what the model returns in a pass that runs as it is written.

    Returns:
        Views that stand for the outputs: one may be made from another, as a loss from logits.
    """
    gradients: Gradients = []
    one.G.append(gradients)

    def view(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        gradients.append(None)
        one.outputs.append(leaf.detach())
        if not leaf.requires_grad:
            return leaf
        found = leaf.view_as(leaf)
        found.register_hook(partial(_arrived, one, len(gradients) - 1))  # type: ignore[no-untyped-call]
        return found

    return tree_map(view, output)


def _arrived(one: Pass, place: int, G: Tensor) -> None:
    if probes.running:  # the library's own
        return
    if torch.is_grad_enabled() or one.G[0][place] is not None:
        one.odd = True  # part of another loss, or the second one
    else:
        one.G[0][place] = G.detach()
