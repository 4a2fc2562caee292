# SPDX-License-Identifier: MIT
"""DDPNOpt as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ddpnopt.binding import Binding, Unbound, model_and_parameters
from ddpnopt.checks import check_group, check_model
from ddpnopt.company import Company
from ddpnopt.curvature import Curvature
from ddpnopt.engine import Engine
from ddpnopt.formats import FORMAT_VERSION, upgraded
from ddpnopt.host import OwnGroups
from ddpnopt.hyperparameters import curvature_options
from ddpnopt.inert import weakly
from ddpnopt.options import Options, value_from
from ddpnopt.recognition import Terminal
from ddpnopt.shell import Shell
from ddpnopt.terminal import MMC, MSE
from ddpnopt.typing import Tensor
from ddpnopt.value import ValueFunction

#: What every parameter group has; torch adds names of its own to the defaults as it loads a state.
GROUP_OPTIONS = ("lr", "momentum", "weight_decay", "curvature")


class DDPNOpt(Shell):
    """Differential Dynamic Programming Neural Optimizer.

    Borrows the curvature M of a known optimizer, runs Bellman's recursion backwards through the
    layers, and updates the weights in one extra forward pass with layer-wise feedback policies
    (Liu, Chen and Theodorou, ICLR 2021). Used as any optimizer of torch: the loop is unchanged.

    Args:
        model: The network. Behind the last branch and the last mixing of samples its layers get
            their own feedback; all that lies in front is re-weighted once a sample. Frameworks that
            construct ``cls(params, lr=...)`` give parameters or groups instead: the model is then
            the first module called that owns them all.
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
        process_group: The ranks that take each step together; None for the default group. Several
            ranks are one process on all their samples, with or without `DistributedDataParallel`.
        distributed: False: this process trains by itself, whatever torch.distributed runs.
        communication: Several ranks in closed loop: "layerwise" reduces each layer's d in the
            rollout, exact; "two_bucket" all at once before and after it, an approximation.

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
        model: nn.Module | Iterable[Any] | None = None,
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
        process_group: Any = None,
        distributed: bool = True,
        communication: str = "layerwise",
    ) -> None:
        self.model, members = model_and_parameters(model, params)
        self.options = Options(
            value_from(value), terminal, feedback, weight_gradients, gram, nonfinite
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "curvature": curvature_options(curvature),
        }
        super().__init__(members, defaults)
        self._company = Company(
            process_group, distributed, held=not weight_gradients, communication=communication
        )
        self._engine = self._make_engine()

    def _make_engine(self) -> Engine:
        if isinstance(self.model, Unbound):
            self._binding = Binding(weakly(self._parameters), weakly(self._bind))
        return self._engine_type(self.model, self.options, OwnGroups(self), self._company)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _bind(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model is called for the first time."""
        if self.engine.waiting:
            check_model(model)
            self.model = model
            self.engine.bind(model, args)

    # Groups ---------------------------------------------------------------------------------

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
        unbound = isinstance(self.model, Unbound)
        check_group(group, set(group["params"] if unbound else self.model.parameters()))
        super().add_param_group(group)
        if self._engine is not None:
            self._engine.attach()

    @property
    def fallbacks(self) -> int:
        """How often a factorisation of KFAC or EKFAC failed and was done another way."""
        return sum(state.get("fallbacks", 0) for state in self.state.values())

    # State ----------------------------------------------------------------------------------

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
        if "ddpnopt" not in state_dict:
            raise ValueError(
                "load_state_dict: no 'ddpnopt' entry; expected the state_dict of a DDPNOpt"
            )
        own = upgraded(state_dict["ddpnopt"], self.engine.state_dict(), type(self).__name__)
        for number, group in enumerate(state_dict.get("param_groups", [])):
            lost = [option for option in GROUP_OPTIONS if option not in group]
            if lost:
                raise ValueError(
                    f"load_state_dict: parameter group {number} lacks {', '.join(lost)}"
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
