# SPDX-License-Identifier: MIT
"""Which optimizers can be wrapped, found by trying them on toy parameters."""

from __future__ import annotations

import copy
import random
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inner import own_step
from ddpnopt.narrowed import Counted, Inner, attributes, same
from ddpnopt.randomness import Randomness
from ddpnopt.rows import HALF
from ddpnopt.shell import Shell
from ddpnopt.spoilt import check_finite
from ddpnopt.typing import Tensor

#: Steps of a trial: counters and warm-ups of optimizers must have moved.
STEPS = 6
#: No toy parameter is larger than this in any dimension.
TOY = 4

#: Optimizers whose gradients `open_loop` re-weights.
WEIGHTED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
MAXIMIZED = (
    "a parameter group has maximize=True, but feedback damps the steps down a loss: all steps are "
    "the optimizer's own, without feedback. Minimise -loss for feedback"
)


def maximizing(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether any group climbs."""
    return any(g.get("maximize", False) for one in optimizers for g in one.param_groups)


def check_unweighted(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimizers whose gradients `open_loop` re-weights already.

    Raises:
        UnsupportedModelError: The optimizer is named.
    """
    for one in optimizers:
        if one in WEIGHTED:
            raise UnsupportedModelError(
                f"the gradients of this {type(one).__name__} are re-weighted by open_loop "
                "already; call remove() of that handle first"
            )


def check_optimizer(optimizers: Sequence[Any], model: nn.Module) -> None:
    """Refuse what is no optimizer of this model.

    Raises:
        TypeError: Not an optimizer.
        ValueError: No optimizer, a parameter that is not the model's, or one that two optimizers
            have.
        UnsupportedModelError: An optimizer that evaluates the loss itself, or has feedback.
    """
    if not optimizers:
        raise ValueError("optimizer: give a torch.optim.Optimizer, or several; got none")
    names = {p: name for name, p in model.named_parameters()}
    owners: dict[Tensor, str] = {}
    for one in optimizers:
        kind = type(one).__name__
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {kind}")
        if isinstance(one, Shell):
            raise UnsupportedModelError(
                f"optimizer: {kind} has feedback of its own; wrap an optimizer that has none"
            )
        if isinstance(one, torch.optim.LBFGS):
            raise UnsupportedModelError(
                "optimizer: LBFGS evaluates the loss several times in a step, so there is no "
                "single pass to feed back on; wrap a first-order optimizer"
            )
        for place, p in enumerate(p for group in one.param_groups for p in group["params"]):
            if p not in names:
                raise ValueError(
                    f"optimizer: parameter {place} of {kind} (shape {tuple(p.shape)}) does not "
                    "belong to the model; give the module that owns all of them"
                )
            if p in owners:
                raise ValueError(f"optimizer: '{names[p]}' is in {owners[p]} and in {kind}")
            owners[p] = kind
        _check_closure(one)


def _check_closure(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that evaluate the loss at weights of their own, found on a toy twin.

    Raises:
        UnsupportedModelError: The optimizer is named.
    """
    kind = type(optimizer).__name__
    try:
        twin, toys = _twin(optimizer, state=False)
    except Exception:  # it can't be copied: nothing is known
        return
    before = [p.detach().clone() for p in toys]
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(all(map(torch.equal, toys, before)))
        for p in toys:
            p.grad = torch.full_like(p, 0.1)
        return torch.ones((), requires_grad=True)

    with _seeded():
        closure()
        calls.clear()
        try:
            own_step(type(twin))(twin, closure)
        except Exception:
            if not calls:  # it is no question of closures
                return
    if len(calls) > 1 or not all(calls):
        raise UnsupportedModelError(
            f"optimizer: {kind} evaluates the loss again at weights of its own within a step "
            "(sharpness-aware, line searches), so there is no single pass to feed back on; wrap "
            "the optimizer that it is built on"
        )


def check_separable(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse optimizers whose step for some parameters depends on the others.

    They are tried on toy parameters, all at once and one by one, last first: weights, states,
    groups and counters must be equal to the last bit.

    Raises:
        UnsupportedModelError: The optimizer is named, with the way out.
        NonFiniteError: No step can be compared, since a parameter's state is not finite.
    """
    kind = type(optimizer).__name__
    way_out = "use feedback='open_loop', or ddpnopt.open_loop"
    if any(map(_half_written, optimizer.param_groups if kind == "SGD" else ())):
        raise UnsupportedModelError(
            f"{kind}(momentum=.., fused=True) in half precision reads memory on CPUs that nobody "
            "has written: its steps are not known; take foreach=True"
        )
    try:
        whole, parts = _trials(optimizer)
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind} can't step for some of its parameters alone ({type(error).__name__}: "
            f"{error}); {way_out}"
        ) from error
    if not same(whole, parts):
        if not same(whole, _trials(optimizer)[0]):
            named: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
            check_finite((named[p], state) for p, state in optimizer.state.items() if p in named)
            raise UnsupportedModelError(
                f"{kind} makes different steps of the same weights, gradients and random numbers, "
                f"so what it would do in one layer is not known; {way_out}"
            )
        raise UnsupportedModelError(
            f"{kind} takes its parameters together: its step for one of them depends on the "
            f"others, on how often it is called, or on random numbers, so it can't step layer by "
            f"layer; {way_out}"
        )


def _half_written(group: dict[str, Any]) -> bool:
    """A group of torch's fused SGD whose momentum has such entries (found with torch 2.13)."""
    momentum = group.get("fused") and group.get("momentum", 0) != 0
    return bool(momentum) and any(p.dtype in HALF and p.is_cpu for p in group["params"])


def _trials(optimizer: torch.optim.Optimizer) -> tuple[list[Any], ...]:
    """What is left after steps for all toy parameters at once, and for one after another."""
    failures = []
    # A state with more in it than one number a coordinate can't be made small: begin anew. Some
    # take sparse gradients alone.
    for state, sparse in ((True, False), (False, False), (True, True)):
        try:
            return tuple(_trial(optimizer, alone, state, sparse) for alone in (False, True))
        except Exception as error:
            failures.append(error)
    raise failures[1]


def _trial(optimizer: torch.optim.Optimizer, alone: bool, state: bool, sparse: bool) -> list[Any]:
    """A few steps of a twin on toy parameters: these, its state, groups and counters."""
    twin, toys = _twin(optimizer, state)
    generator = torch.Generator().manual_seed(0)
    inner, counted = Inner.of(twin), Counted()
    with _seeded():
        for _ in range(STEPS):
            for p in toys:
                noise = torch.randn(p.shape, generator=generator)
                dense = noise.to(p.device, p.dtype)
                p.grad = dense.to_sparse(1) if sparse else dense
            if not alone:
                own_step(type(twin))(twin)
                continue
            for p in reversed(toys):
                counted.add(inner.step([p]))
            counted.commit()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in twin.param_groups]
    states = [dict(twin.state.get(p, {})) for p in toys]
    return [[p.detach() for p in toys], states, groups, attributes(twin)]


@contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers of a trial: always the same, and the user's generators stay as they are."""
    before = Randomness.capture()
    torch.manual_seed(0)
    random.seed(0)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        before.restore()


def _twin(
    optimizer: torch.optim.Optimizer, state: bool
) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The same optimizer with small parameters, and with what of its state belongs to them."""
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, Any] = {}
    toys = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        shape = [min(n, TOY) for n in p.shape]
        toy = torch.randn(shape, generator=generator).to(p.device, p.dtype).requires_grad_()
        memo[id(p)] = nn.Parameter(toy.detach())
        toys.append(memo[id(p)])
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name == "step":  # a scheduler's wrapper around the original's own
            continue
        if name == "state":
            twin.state = defaultdict(dict)
            for p, known in value.items() if state else ():
                twin.state[memo[id(p)]] = {key: _small(one, p) for key, one in known.items()}
        elif "_hooks" in name:
            setattr(twin, name, OrderedDict())
        else:
            setattr(twin, name, copy.deepcopy(value, memo))
    return twin, toys


def _small(value: Any, p: Tensor) -> Any:
    if isinstance(value, Tensor) and value.shape == p.shape:
        return value.detach()[tuple(slice(0, TOY) for _ in p.shape)].clone()
    return copy.deepcopy(value)
