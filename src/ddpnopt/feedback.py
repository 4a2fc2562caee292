# SPDX-License-Identifier: MIT
"""Layer-wise feedback around any optimizer of torch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ddpnopt.borrowed import Borrowed
from ddpnopt.checks import check_model, refuse_distributed
from ddpnopt.engine import Engine
from ddpnopt.host import Host
from ddpnopt.options import Options, value_from
from ddpnopt.recognition import Terminal
from ddpnopt.separable import check_optimizer, check_separable
from ddpnopt.shell import Shell
from ddpnopt.terminal import MMC, MSE
from ddpnopt.typing import Tensor
from ddpnopt.value import ValueFunction
from ddpnopt.wrapped import Inner, Wrapped

FORMAT_VERSION = 1


class Feedback(Shell):
    """Differential dynamic programming around an optimizer: AdamW, momentum, Muon, ...

    The wrapped optimizer makes every update itself, layer by layer, in one extra forward pass; what
    changes is the gradient that it sees. Where no sample needs damping its steps are its own, to
    the last bit. The loop is unchanged; schedulers take the wrapper or the optimizer.

    Args:
        model: The network that the optimizer trains.
        optimizer: Any `torch.optim.Optimizer`, or several of them that share the parameters out.
        value: "moreau", "gauss_newton", "low_rank", "dense", or an object with its options.
        terminal: The loss, as for `DDPNOpt`.
        feedback: True: closed loop; "open_loop": coefficients without a second forward pass,
            written to ``p.grad`` by ``backward``; False: exactly the wrapped optimizer.
        weight_gradients: False: the layers' plain weight gradients are never computed.
        gram: Gram products of convolutions: "exact", "sketch", "auto" (exact).
        nonfinite: "raise" or "skip" a step whose numbers are not finite; nothing is changed.

    Raises:
        TypeError: Not an optimizer.
        ValueError: A parameter is not the model's, or belongs to two optimizers.
        UnsupportedModelError: The model can't be handled, or the optimizer can't step layer by
            layer (named, with the way out).

    Examples:
        >>> opt = Feedback(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> opt.zero_grad(); criterion(model(x), y).backward(); opt.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        value: str | ValueFunction = "moreau",
        terminal: Terminal | MSE | MMC = "auto",
        feedback: bool | str = True,
        weight_gradients: bool = True,
        gram: str = "auto",
        nonfinite: str = "raise",
    ) -> None:
        check_model(model)
        refuse_distributed()
        given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        check_optimizer(given, model)
        self.model = model
        self.options = Options(
            value_from(value), terminal, feedback, weight_gradients, gram, nonfinite
        )
        if self.options.closed_loop:
            for one in given:
                check_separable(one)
        self._inners = tuple(Inner.of(one) for one in given)
        # The groups are the optimizers' own; what the base class makes of its own is not used.
        super().__init__([p for one in given for p in one.param_groups[0]["params"]], {})
        self._engine = Engine(model, self.options, Guest(self))

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The wrapped optimizers."""
        return tuple(inner.optimizer for inner in self._inners)

    @property
    def inners(self) -> tuple[Inner, ...]:
        """The wrapped optimizers with what is known about them."""
        return self._inners

    # Groups and state: the wrapped optimizers' own ----------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups of the wrapped optimizers, the objects themselves."""
        if len(self._inners) == 1:
            return self._inners[0].optimizer.param_groups
        return [group for one in self.optimizers for group in one.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._engine is not None and len(self._inners) == 1:
            self._inners[0].optimizer.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> Mapping[Tensor, Any]:
        """State by parameter, of all wrapped optimizers."""
        if len(self._inners) == 1:
            return self._inners[0].optimizer.state
        return {p: state for one in self.optimizers for p, state in one.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        if self._engine is not None and len(self._inners) == 1:
            self._inners[0].optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the first wrapped optimizer."""
        return self._inners[0].optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        """Ignored: the base class sets its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to the wrapped optimizer.

        Raises:
            ValueError: Several optimizers are wrapped (add to one of them), or a parameter is not
                the model's.
        """
        if self._engine is None:
            return  # the base class adds what the wrapped optimizers have already
        if len(self._inners) > 1:
            raise ValueError(
                "add_param_group: several optimizers are wrapped; add the group to one of "
                "Feedback.optimizers"
            )
        inner = self._inners[0].optimizer
        before = list(inner.param_groups)
        inner.add_param_group(param_group)
        try:
            check_optimizer([inner], self.model)
        except ValueError:
            inner.param_groups[:] = before
            raise

    # State ----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the recorded passes whose gradients they were."""
        for one in self.optimizers:
            one.zero_grad(set_to_none)
        self.engine.forget()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizers' own under "inner", and what feedback needs to resume."""
        return {
            "inner": [one.state_dict() for one in self.optimizers],
            "ddpnopt": {
                "version": FORMAT_VERSION,
                "options": self.options.plain_values(),
                "gains": [gains_of(inner) for inner in self._inners],
                **self.engine.state_dict(),
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state, or that of the wrapped optimizer from before it was wrapped.

        Raises:
            ValueError: The state is of other optimizers, or of a newer format.
        """
        own, states = state_dict.get("ddpnopt"), state_dict.get("inner")
        if own is None and states is None and {"state", "param_groups"} <= state_dict.keys():
            states = [state_dict]
        elif own is None or states is None or own.get("version") != FORMAT_VERSION:
            found = "no 'inner' entry" if states is None else "no 'ddpnopt' entry"
            if own is not None and own.get("version") != FORMAT_VERSION:
                found = f"format {own.get('version')}"
            raise ValueError(
                f"load_state_dict: {found}; expected the state_dict of a Feedback, format "
                f"{FORMAT_VERSION}, or of the wrapped optimizer"
            )
        if len(states) != len(self._inners):
            raise ValueError(
                f"load_state_dict: the state is of {len(states)} optimizers, {len(self._inners)} "
                "are wrapped"
            )
        if own is not None:
            missing = self.engine.state_dict().keys() - own.keys()
            if missing:
                raise ValueError(f"load_state_dict: the state lacks {', '.join(sorted(missing))}")
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)
        if own is not None:
            for inner, gains in zip(self._inners, own["gains"], strict=True):
                set_gains(inner, gains)
            self.engine.load_state_dict(own)
        self.engine.refresh()


def gains_of(inner: Inner) -> list[float | None]:
    """The gains that were seen, in the order of the parameters."""
    found = [inner.gains.get(p) for p in _parameters(inner)]
    return [None if gain is None else float(gain) for gain in found]


def set_gains(inner: Inner, gains: Sequence[float | None]) -> None:
    """Take them back."""
    inner.gains.clear()
    for p, gain in zip(_parameters(inner), gains, strict=True):
        if gain is not None:
            inner.gains[p] = p.new_tensor(gain, dtype=torch.float32)


def _parameters(inner: Inner) -> list[Tensor]:
    return [p for group in inner.optimizer.param_groups for p in group["params"]]


class Wrapper(Protocol):
    """What has inner optimizers."""

    @property
    def inners(self) -> tuple[Inner, ...]:
        """The optimizers with what is known about them."""


class Guest(Host):
    """A `Feedback` or an open loop, held weakly, seen from its engine."""

    def __init__(self, owner: Wrapper) -> None:
        self._owner = weakref.ref(owner)

    def _inners(self) -> Sequence[Inner]:
        owner = self._owner()
        return owner.inners if owner is not None else ()

    def parameters(self) -> list[Tensor]:
        """Of all wrapped optimizers."""
        return [p for inner in self._inners() for p in _parameters(inner)]

    def borrow(self, copies: dict[int, Tensor]) -> Borrowed:
        """The wrapped optimizers' own updates."""
        return Wrapped(self._inners(), copies)

    def commit(self, borrowed: Borrowed) -> None:
        """Counters and gains."""
        borrowed.commit({})
