# SPDX-License-Identifier: MIT
"""Models whose parameters `fully_shard` spreads over the ranks, in open loop.

The optimizer has the parts (DTensors), and steps on theirs. While a layer runs it holds whole
parameters that stand for them. When a backward pass has ended, and its gradients are reduced and
spread out, everything is made whole once: weights, gradients and second moments. There the ranks
are what they are under DistributedDataParallel; then each keeps its part of the result.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ddpnopt.borrowed import Borrowed
from ddpnopt.dtensors import part_of, spread_out, whole
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.gradients import added
from ddpnopt.guest import Guest, Wrapper
from ddpnopt.parameters import STANDS_FOR
from ddpnopt.typing import Tensor
from ddpnopt.wrapped import Wrapped

if TYPE_CHECKING:
    from ddpnopt.engine import Engine

MIXED = (
    "the model mixes samples (BatchNorm in training mode) and is sharded: weighting them in front "
    "of it would run fully_shard's own hooks; use GroupNorm, or DistributedDataParallel"
)


def sharded(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called with."""
    if not any(map(spread_out, model.parameters())):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def guest_of(owner: Wrapper, model: nn.Module) -> Guest:
    """What an engine sees of an open loop."""
    return ShardedGuest(owner, model) if sharded(model) else Guest(owner)


class ShardedGuest(Guest):
    """An open loop whose parameters are spread over the ranks."""

    sharded = True

    def __init__(self, owner: Wrapper, model: nn.Module) -> None:
        super().__init__(owner)
        check_mesh(model)
        self._model = weakref.ref(model)
        self._whole: dict[Tensor, Tensor] | None = None
        self._unreduced = False
        with _gathered(model) as twins:
            for p, twin in twins.items():
                if spread_out(twin):
                    raise UnsupportedModelError(
                        f"{_path(model, p)} is a DTensor that fully_shard does not make whole "
                        "(tensor parallelism); use fully_shard alone, or DistributedDataParallel"
                    )
                STANDS_FOR[id(twin)] = cast(nn.Parameter, p)
                weakref.finalize(twin, STANDS_FOR.pop, id(twin), None)

    def parameters(self) -> list[Tensor]:
        """The optimizers' own; in `whole` those that stand for them."""
        own = super().parameters()
        return own if self._whole is None else [self._whole.get(p, p) for p in own]

    def borrow(self, copies: dict[int, Tensor]) -> Borrowed:
        """For what is whole.

        Raises:
            UnsupportedModelError: Nothing is: the backward pass still runs.
        """
        if self._whole is None:
            raise UnsupportedModelError(MIXED)
        borrowed = Wrapped(self._inners(), copies)
        borrowed.exchange(self._whole, whole)
        return borrowed

    def begin(self) -> None:
        """A pass that is not reduced leaves no trace in p.grad, so it has to be seen here."""
        model = self._model()
        self._unreduced |= model is not None and not all(map(_reduces, sharded(model)))

    def check_pass(self) -> None:
        """Refuse passes of which some were not reduced.

        Raises:
            UnsupportedModelError: So it is.
        """
        if self._unreduced:
            self._unreduced = False
            raise UnsupportedModelError(
                "set_requires_gradient_sync(False): each pass is re-weighted by itself, once its "
                "gradients are reduced; leave it True for accumulated passes, too"
            )

    @contextmanager
    def whole(self, engine: Engine) -> Iterator[None]:
        """All ranks come here when their backward passes have ended."""
        model = self._model()
        assert model is not None
        with _gathered(model) as twins:
            known = {id(twin): STANDS_FOR.pop(id(twin)) for twin in twins.values()}
            carried, engine.carried = engine.carried, {}
            try:
                self._whole = twins
                _swap(engine, twins)
                given = _show(twins, engine)
                engine.refresh()
                yield
                for p, twin in twins.items():
                    if p.grad is not None and twin.grad is not None:
                        _take_over(p.grad, twin.grad, given[twin])
                    correction, extra = engine.carried.pop(twin, (None, None))
                    if correction is not None:
                        before, other = carried.get(p, (None, None))
                        parts = [None if t is None else part_of(t, p) for t in (correction, extra)]
                        carried[p] = added(before, parts[0]), added(other, parts[1])
            finally:
                carried.update(engine.carried)  # of parameters that are not spread out
                self._whole, engine.carried = None, carried
                _swap(engine, {twin: p for p, twin in twins.items()})
                STANDS_FOR.update(known)
                for twin in twins.values():
                    twin.grad = None
                engine.refresh()


def _swap(engine: Engine, others: Mapping[Tensor, Tensor]) -> None:
    """Let layers that run as functions, which fully_shard does not know, hold other parameters."""
    layers = engine.recorder.anatomy.functions.values() if engine.recorder is not None else ()
    for _, module in layers:
        for name, p in module._parameters.items():
            if p is not None and p in others:
                module._parameters[name] = cast(nn.Parameter, others[p])


def _show(twins: Mapping[Tensor, Tensor], engine: Engine) -> dict[Tensor, Tensor]:
    """Make gradients whole, and those that were there before the backward pass; the former."""
    bases, given = engine.base, dict[Tensor, Tensor]()
    engine.base = {p: base for p, base in bases.items() if p not in twins}
    for p, twin in twins.items():
        if p.grad is None:
            continue
        twin.grad = whole(p.grad).to(twin.dtype)
        given[twin] = twin.grad.clone()
        if bases:
            base = bases.get(p)
            before = whole(torch.zeros_like(p) if base is None else base)
            engine.base[twin] = before.to(twin.dtype)
    return given


def _take_over(grad: Tensor, found: Tensor, given: Tensor) -> None:
    """A part of a gradient becomes that of the whole one, where that has been changed."""
    if grad.dtype == found.dtype:
        grad.copy_(part_of(found, grad))
    else:  # layers in half precision: what they add
        grad.add_(part_of((found - given).to(grad.dtype), grad))


@contextmanager
def _gathered(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Within the block the sharded modules hold whole parameters: by those they stand for."""
    modules: Sequence[Any] = sharded(model)
    before = _held(model)
    for module in modules:
        module.unshard()
    try:
        after = _held(model)
        yield {p: after[at] for at, p in before.items() if spread_out(p)}
    finally:
        for module in modules:
            module.reshard()


def _reduces(module: Any) -> bool:
    """Whether fully_shard reduces a module's gradients in the pass that runs; not public."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return all(getattr(group, "reduce_grads", True) for group in groups)


def check_mesh(model: nn.Module) -> None:
    """Refuse parameters that are not all spread over the same ranks.

    Raises:
        UnsupportedModelError: The parameter is named.
    """
    meshes = {p: cast(Any, p).device_mesh for p in model.parameters() if spread_out(p)}
    first = next(iter(meshes.values()))
    for p, mesh in meshes.items():
        if mesh != first:
            raise UnsupportedModelError(
                f"{_path(model, p)} is spread over other ranks than the other parameters: call "
                "fully_shard with one mesh for all modules"
            )
    if first.size() != torch.distributed.get_world_size():
        raise UnsupportedModelError(
            f"fully_shard's mesh has {first.size()} of {torch.distributed.get_world_size()} ranks: "
            "open_loop takes all ranks of the default group; use a mesh of all of them"
        )


def _path(model: nn.Module, p: Tensor) -> str:
    return next((f"'{name}'" for name, one in model.named_parameters() if one is p), "a parameter")


def _held(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    return {
        (id(module), name): p
        for module in model.modules()
        for name, p in module._parameters.items()
        if p is not None
    }
