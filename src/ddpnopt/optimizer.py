# SPDX-License-Identifier: MIT
"""DDPNOpt as a `torch.optim.Optimizer`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, Self, overload

import torch
from torch import nn

from ddpnopt.borrowed import curvature_options
from ddpnopt.checks import check_group, check_model, refuse_distributed
from ddpnopt.curvature import Curvature
from ddpnopt.engine import Engine
from ddpnopt.errors import NonFiniteError
from ddpnopt.options import Options, value_from
from ddpnopt.recognition import Terminal
from ddpnopt.report import StepReport
from ddpnopt.terminal import MMC, MSE
from ddpnopt.typing import Tensor
from ddpnopt.value import ValueFunction

FORMAT_VERSION = 1
COPIED = (
    "a DDPNOpt can't be copied or pickled, since it belongs to its model's hooks: copy the model, "
    "make a new DDPNOpt for it, and carry the state over with state_dict"
)


class DDPNOpt(torch.optim.Optimizer):
    """Differential Dynamic Programming Neural Optimizer.

    Borrows the curvature M of a known optimizer, runs Bellman's recursion backwards through the
    layers, and updates the weights in one extra forward pass with layer-wise feedback policies
    (Liu, Chen and Theodorou, ICLR 2021). Used as any optimizer of torch: the loop is unchanged.

    Args:
        model: The network. Behind the last branch and the last mixing of samples its layers get
            their own feedback; all that lies in front is re-weighted once a sample.
        lr: Learning rate eta.
        curvature: "identity" (SGD), "rmsprop", "adamw", "kfac", "ekfac", or an object with its
            options.
        value: "moreau", "gauss_newton", "low_rank", "dense", or an object with its options.
        terminal: The loss: "auto" recognises cross-entropy and logistic losses from the output
            and its gradient; else "cross_entropy", "nll", "mse", "mmc", "bce_with_logits", an `MSE`
            or `MMC`, or a callable output z (B, C) -> factor S (B, C, r) of the loss's Hessian by
            z, S S^T, per sample.
        feedback: True: closed loop; "open_loop": coefficients without a second forward pass,
            written to ``p.grad`` by ``backward``; False: exactly the borrowed optimizer.
        momentum: As in the borrowed optimizer; AdamW has its own.
        weight_decay: As in the borrowed optimizer: coupled, but decoupled for AdamW (default 0).
        weight_gradients: False: the layers' plain weight gradients are never computed; the step
            is cheaper, and ``clip_grad_norm_`` sees only biases.
        gram: Gram products of convolutions: "exact", "sketch" (unbiased estimate by random
            filters), "auto" (exact).
        nonfinite: "raise" or "skip" a step whose numbers are not finite; nothing is changed.
        params: Parameters or parameter groups of the model, where not all are to be optimised or
            their options differ; a group may name its own ``curvature``.

    Raises:
        ValueError: An option is out of range or unknown, or a parameter is not the model's.
        UnsupportedModelError: The model can't be handled (named).

    Examples:
        >>> opt = DDPNOpt(model, lr=0.1)
        >>> opt.zero_grad(); criterion(model(x), y).backward(); opt.step()
    """

    _engine_type: type[Engine] = Engine

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        curvature: str | Curvature = "identity",
        value: str | ValueFunction = "moreau",
        terminal: Terminal | MSE | MMC = "auto",
        feedback: bool | str = True,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        weight_gradients: bool = True,
        gram: str = "auto",
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
    ) -> None:
        check_model(model)
        refuse_distributed()
        self.model = model
        self.options = Options(
            value_from(value), terminal, feedback, weight_gradients, gram, nonfinite
        )
        self.last_step: StepReport | None = None
        self._engine: Engine | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "curvature": curvature_options(curvature),
        }
        super().__init__(model.parameters() if params is None else params, defaults)
        owner = weakref.ref(self)  # the engine must not keep a dropped optimizer recording
        self._engine = self._engine_type(
            model,
            self.options,
            lambda: alive.param_groups if (alive := owner()) is not None else [],
            lambda: alive.state if (alive := owner()) is not None else {},
        )

    # Groups and hooks -----------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with their own options.

        Raises:
            ValueError: A parameter is not the model's, or an option is out of range.
        """
        if not isinstance(param_group, dict):
            raise TypeError("a parameter group must be a dict")
        group = {**self.defaults, **param_group}
        given = param_group["params"]
        members = [given] if isinstance(given, Tensor) else list(given)
        group["params"] = [p[1] if isinstance(p, tuple) else p for p in members]
        group["curvature"] = curvature_options(group["curvature"])
        check_group(group, {p: name for name, p in self.model.named_parameters()})
        super().add_param_group(group)
        if self._engine is not None:
            self._engine.attach()

    def detach(self) -> None:
        """Remove every hook from the model; the optimizer takes plain steps from then on."""
        self.engine.detach()

    def __enter__(self) -> Self:
        """As a context manager: detaches at the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self.detach()

    @property
    def engine(self) -> Engine:
        """The machinery behind the step."""
        assert self._engine is not None
        return self._engine

    @property
    def diagnose(self) -> bool:
        """Report |k| and |K dx| of every layer, at the cost of two weight gradients each."""
        return self.engine.diagnose

    @diagnose.setter
    def diagnose(self, on: bool) -> None:
        self.engine.diagnose = on

    @property
    def skipped(self) -> int:
        """Steps skipped because a number was not finite (``nonfinite="skip"``)."""
        return self.engine.skipped

    @property
    def fallbacks(self) -> int:
        """How often a factorisation of KFAC or EKFAC failed and was done another way."""
        return sum(state.get("fallbacks", 0) for state in self.state.values())

    # Step -----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on the recorded passes.

        Args:
            closure: Standard closure that computes the loss and calls ``backward``.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: No backward pass since the last step.
            NonFiniteError: A gradient or a new weight is not finite (``nonfinite="raise"``).
            UnsupportedModelError: The recorded passes can't be handled (named).
            TerminalError: The terminal cost given contradicts the output.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_distributed()
        engine = self.engine
        engine.refresh()
        device = next(iter(engine.parameters())).device.type
        try:
            with torch.autocast(device, enabled=False):
                self.last_step = engine.step(closure)
        except NonFiniteError:
            if self.options.nonfinite == "raise":
                raise
            engine.skipped += 1
            self.last_step = StepReport(self.options.depth, "none", skipped=engine.skipped)
        engine.finish()
        return loss

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refused: the copy's parameters would be no model's."""
        raise TypeError(COPIED)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused likewise."""
        raise TypeError(COPIED)

    # State ----------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and the recorded passes whose gradients they were."""
        super().zero_grad(set_to_none)
        self.engine.forget()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: loads with ``weights_only=True``, resumes to the bit."""
        state = super().state_dict()
        state["ddpnopt"] = {
            "version": FORMAT_VERSION,
            "options": self.options.plain_values(),
            **self.engine.state_dict(),
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state; value function and depth stay those of the constructor.

        Raises:
            ValueError: The state is another optimizer's, or of a newer format.
        """
        own = state_dict.get("ddpnopt")
        if own is None or own.get("version") != FORMAT_VERSION:
            found = "no 'ddpnopt' entry" if own is None else f"format {own.get('version')}"
            raise ValueError(
                f"load_state_dict: {found}; expected the state_dict of a DDPNOpt, "
                f"format {FORMAT_VERSION}"
            )
        missing = self.engine.state_dict().keys() - own.keys()
        if missing:
            raise ValueError(f"load_state_dict: the state lacks {', '.join(sorted(missing))}")
        for number, group in enumerate(state_dict.get("param_groups", [])):
            lost = self.defaults.keys() - group.keys()
            if lost:
                raise ValueError(
                    f"load_state_dict: parameter group {number} lacks {', '.join(sorted(lost))}"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "ddpnopt"})
        self._keep_width(state_dict["state"])
        self.engine.load_state_dict(own)
        self.engine.attach()

    def _keep_width(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Statistics of half-precision layers are wider than their weights; torch narrows them."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in saved.items():
            p = parameters[index]
            for name, value in state.items():
                narrowed = self.state[p].get(name)
                if isinstance(narrowed, Tensor) and narrowed.dtype in (
                    torch.float16,
                    torch.bfloat16,
                ):
                    self.state[p][name] = value.to(p.device, copy=True)
