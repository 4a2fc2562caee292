# SPDX-License-Identifier: MIT
"""Which optimizers can be wrapped, found by trying them on toy parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inner import own_step
from ddpnopt.shell import Shell
from ddpnopt.typing import Tensor
from ddpnopt.wrapped import Inner

#: Steps of a trial: counters and warm-ups of optimizers must have moved.
STEPS = 6
#: No toy parameter is larger than this in any dimension.
TOY = 4


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


def check_separable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers whose step for some parameters depends on the others.

    They are tried on toy parameters, all at once and one by one: the results must be equal to the
    last bit.

    Raises:
        UnsupportedModelError: The optimizer is named, with the way out.
    """
    kind = type(optimizer).__name__
    way_out = "use feedback='open_loop', or ddpnopt.open_loop"
    try:
        whole, parts = _trials(optimizer)
    except Exception as error:
        raise UnsupportedModelError(
            f"{kind} can't step for some of its parameters alone ({type(error).__name__}: "
            f"{error}); {way_out}"
        ) from error
    if not all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True)):
        raise UnsupportedModelError(
            f"{kind} takes its parameters together: its step for one of them depends on the "
            f"others, so it can't step layer by layer; {way_out}"
        )


def _trials(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Toy parameters after steps for all at once, and after steps for one after another."""
    try:
        return _trial(optimizer, False, state=True), _trial(optimizer, True, state=True)
    except Exception:
        # A state with more in it than one number a coordinate can't be made small: begin anew.
        return _trial(optimizer, False, state=False), _trial(optimizer, True, state=False)


def _trial(optimizer: torch.optim.Optimizer, alone: bool, state: bool) -> list[Tensor]:
    """A few steps of a twin on toy parameters, which are returned."""
    twin, toys = _twin(optimizer, state)
    generator = torch.Generator().manual_seed(0)
    inner = Inner.of(twin)
    for _ in range(STEPS):
        for p in toys:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = noise.to(p.device, p.dtype)
        if not alone:
            own_step(type(twin))(twin)
            continue
        counted: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        for p in toys:
            counted.update({id(group): (group, seen) for group, seen in inner.step([p])})
        for group, seen in counted.values():
            group.update({k: v for k, v in seen.items() if k != "params"})
    return [p.detach() for p in toys]


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
