# SPDX-License-Identifier: MIT
"""Layer-wise feedback around any optimizer of torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from ddpnopt.brake import BrakeEngine
from ddpnopt.checks import check_model
from ddpnopt.company import Company
from ddpnopt.engine import Engine
from ddpnopt.errors import DDPNOptWarning, UnsupportedModelError
from ddpnopt.formats import FORMAT_VERSION, upgraded
from ddpnopt.guest import Guest
from ddpnopt.narrowed import Inner
from ddpnopt.options import Options, value_from
from ddpnopt.ranges import check_choice, check_number, positive
from ddpnopt.recognition import Terminal
from ddpnopt.separable import (
    MAXIMIZED,
    check_optimizer,
    check_separable,
    check_unweighted,
    maximizing,
)
from ddpnopt.shell import Shell
from ddpnopt.terminal import MMC, MSE
from ddpnopt.typing import Tensor
from ddpnopt.value import ValueFunction

#: How a layer's step is bounded, by name.
MODES: dict[str, type[Engine]] = {"samples": Engine, "brake": BrakeEngine}


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
        mode: "samples" re-weights the samples' gradients layer by layer. "brake" limits how
            far each layer follows the optimizer's own step instead (`ddpnopt.brake`).
        trust: No unit's gradient makes a step longer than log(2) / L of the unit, as with
            `ddpnopt.curvature.Trust`, at any rate; a number: than this share of it.
        process_group: The ranks that take each step together; None for the default group.
        distributed: False: this process trains by itself, whatever torch.distributed runs.
        communication: Several ranks in closed loop: "layerwise" reduces each layer's d in the
            rollout, exact; "two_bucket" all at once before and after it, an approximation.

    Raises:
        TypeError: Not an optimizer.
        ValueError: An option is unknown, a parameter is not the model's, or in two optimizers.
        UnsupportedModelError: The model can't be handled, or the optimizer can't step layer by
            layer (named, with the way out).
        NonFiniteError: The optimizer's state is not finite, so that its steps can't be compared.

    Examples:
        >>> opt = Feedback(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        >>> opt.zero_grad(); criterion(model(x), y).backward(); opt.step()
    """

    _kept = (*Shell._kept, "mode", "_trust", "_inners")

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
        mode: str = "samples",
        *,
        trust: bool | float = False,
        process_group: Any = None,
        distributed: bool = True,
        communication: str = "layerwise",
    ) -> None:
        check_model(model)
        given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        check_optimizer(given, model)
        self.model = model
        self.options = Options(
            value_from(value), terminal, feedback, weight_gradients, gram, nonfinite
        )
        _check_mode(mode, self.options)
        self.mode, self._trust = mode, _checked_trust(trust, mode)
        check_unweighted(given)
        if self.options.feedback is not False and maximizing(given):
            warnings.warn(MAXIMIZED, DDPNOptWarning, stacklevel=2)
            self.options = replace(self.options, feedback=False)
        if self.options.closed_loop:
            for one in given:
                check_separable(one, model)
        self._inners = tuple(Inner.of(one) for one in given)
        # The groups are the optimizers' own; what the base class makes of its own is not used.
        super().__init__([p for one in given for p in one.param_groups[0]["params"]], {})
        self._company = Company(
            process_group, distributed, held=not weight_gradients, communication=communication
        )
        self._engine = self._make_engine()

    def _make_engine(self) -> Engine:
        return MODES[self.mode](self.model, self.options, Guest(self), self._company)

    def _torch_state(self) -> dict[str, Any]:
        return {}  # all of it is the wrapped optimizers'

    def _opening(self, closure: Callable[[], float] | None) -> Callable[[], float] | None:
        """The wrapped optimizers' own pre-hooks, once a step."""
        if self.options.feedback is not False and maximizing(self.optimizers):
            raise UnsupportedModelError(
                "a parameter group has maximize=True since Feedback was made: wrap the optimizer "
                "anew, or minimise -loss"
            )
        for one in self.optimizers:
            closure = before_step(one, closure)
        return closure

    def _closing(self, closure: Callable[[], float] | None) -> None:
        """Their post-hooks."""
        for one in self.optimizers:
            after_step(one, closure)

    @property
    def trust(self) -> bool | float:
        """The bound on each unit's step, as given."""
        return self._trust

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
            if self.options.feedback is not False and maximizing([inner]):
                raise ValueError("add_param_group: maximize=True has no feedback; minimise -loss")
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
        elif own is None or states is None:
            found = "no 'inner' entry" if states is None else "no 'ddpnopt' entry"
            raise ValueError(
                f"load_state_dict: {found}; expected the state_dict of a Feedback, or of the "
                "wrapped optimizer"
            )
        if own is not None:
            own = upgraded(own, {"gains": None, **self.engine.state_dict()}, "Feedback")
        if len(states) != len(self._inners):
            raise ValueError(
                f"load_state_dict: the state is of {len(states)} optimizers, {len(self._inners)} "
                "are wrapped"
            )
        for one, state in zip(self.optimizers, states, strict=True):
            one.load_state_dict(state)
        if own is not None:
            for inner, gains in zip(self._inners, own["gains"], strict=True):
                set_gains(inner, gains)
            self.engine.load_state_dict(own)
        self.engine.refresh()


def before_step(
    optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None
) -> Callable[[], float] | None:
    """Run a wrapped optimizer's own pre-hooks; the closure as they leave it.

    Global hooks see the wrapper itself.
    """
    args: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
    kwargs: dict[str, Any] = {}
    for hook in list(optimizer._optimizer_step_pre_hooks.values()):
        result = hook(optimizer, args, kwargs)
        if result is not None:
            args, kwargs = result
    found: Callable[[], float] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return found


def after_step(optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None) -> None:
    """Run a wrapped optimizer's own post-hooks; its schedulers learn that it has stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
    args: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
    for hook in list(optimizer._optimizer_step_post_hooks.values()):
        hook(optimizer, args, {})


def _check_mode(mode: str, options: Options) -> None:
    check_choice("", "mode", mode, tuple(MODES))
    if mode == "brake" and not options.weight_gradients:
        raise ValueError("mode='brake' needs the optimizer's own step: use weight_gradients=True")
    if mode == "brake" and options.value.linearization != "gradient":
        raise ValueError(
            f"mode='brake' has a value function of its own, and value={options.value.name!r} needs "
            "more than it records: leave value out"
        )


def _checked_trust(trust: bool | float, mode: str) -> bool | float:
    if not isinstance(trust, bool):
        must = "must be True, False, or a positive, finite number"
        given: Any = trust  # a truth value of NumPy's is none of these
        check_number("", "trust", given if isinstance(given, Real) else None, positive, must)
        trust = float(trust)
    if trust is not False and mode == "brake":
        raise ValueError("mode='brake' has a bound of its own: leave trust out")
    return trust


def gains_of(inner: Inner) -> list[float | None]:
    """The gains that were seen, in the order of the parameters."""
    found = [inner.gains.get(p) for p in inner.parameters()]
    return [None if gain is None else float(gain) for gain in found]


def set_gains(inner: Inner, gains: Sequence[float | None]) -> None:
    """Take them back."""
    inner.gains.clear()
    for p, gain in zip(inner.parameters(), gains, strict=True):
        if gain is not None:
            inner.gains[p] = p.new_tensor(gain, dtype=torch.float32)
