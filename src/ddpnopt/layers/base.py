# SPDX-License-Identifier: MIT
"""What the recursion needs to know of a parametrised layer h = g(x, u), as linear maps.

`LayerRule` itself is a complete rule: it differentiates the module's own forward, sample by
sample, with torch.func. It is right for every module that treats samples independently, and slow.
A subclass says the same with the layer's own algebra. Rules are stateless; one serves every module
whose forward is its type's own. To add a layer: one file here, a subclass, a decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from ddpnopt.positions import Gain
from ddpnopt.typing import Tensor


@runtime_checkable
class Kept(Protocol):
    """The samples' own gradients of one pass, to be summed with other weights."""

    def onto(self, gradients: Mapping[str, Tensor], a: Tensor, scale: float) -> dict[str, Tensor]:
        """gradients + scale sum_i a_i G_i."""


class _Bare(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module.forward(x)


class LayerRule:
    """Linear maps between a layer's state x, control u (its parameters) and pre-activation h.

    Vectors in h-space have h's own shape; a leading axis r holds columns. Dimension 0 of x and h
    is samples times a fold m (m consecutive rows belong to one sample). Nothing here may call the
    module itself, whose hooks are the user's and the recorder's.
    """

    #: The axis of h that holds the features (classes, at the last layer).
    feature_axis: int = -1
    #: Names of the parameters that the rule speaks of; a module with others is not served.
    parameters: tuple[str, ...] = ("weight", "bias")
    #: `gradient` makes autograd's own gradient of ``weight`` unnecessary.
    holds_weight: bool = False
    #: The rule differentiates the module's own forward, whatever it is.
    general: bool = False
    #: How many tensors the module is called with.
    arguments: tuple[int, ...] = (1,)

    def refusal(self, module: nn.Module) -> str:
        """Why this module, as it is now, can't be served; empty if it can."""
        return ""

    def call_refusal(self, module: nn.Module, given: Sequence[object]) -> str:
        """Why a call with these arguments, of a module that is served, is not; empty if it is."""
        return ""

    def batched_dim(self, module: nn.Module) -> int:
        """Dimensions of an input with a batch axis; one fewer means a single sample."""
        return 2

    def pack(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """The state: one tensor that holds all inputs. Linear in the inputs."""
        return inputs[0]

    def unpack(self, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The inputs (or columns of them, with leading axes) from the state."""
        return (x,)

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """g(x, u) up to a constant, with the layer's present parameters."""
        return _call(module, _parameters(module, x), x)

    def output(self, module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """h = g(x, u) itself, the module's forward; parameters that are not given are its own."""
        return _call(module, {**_parameters(module, x), **parameters}, x)

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """g_x dx."""
        pushed: Tensor = jvp(lambda s: self.function(module, s), (x,), (dx,))[1]
        return pushed

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """Pull-back to the state, g_x^T V for columns V (r, *h.shape); returns (r, *x.shape)."""
        columns = V.shape[0]
        tiled = x.expand(columns, *x.shape).reshape(-1, *x.shape[1:])
        back: Any = vjp(lambda s: self.function(module, s), tiled)[1]
        pulled: Tensor = back(V.reshape(-1, *V.shape[2:]))[0]
        return pulled.reshape(columns, *x.shape)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """Pull-back to the control, g_u^T V summed over the batch, by parameter name."""
        params = _parameters(module, x)
        back: Any = vjp(lambda p: _call(module, p, x), params)[1]
        pulled: dict[str, Tensor] = back(V)[0]
        return pulled

    def onto(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gradients: Mapping[str, Tensor],
        scale: float,
    ) -> dict[str, Tensor]:
        """gradients + scale `gradient`, by parameter; those not named are left out."""
        total = self.gradient(module, x, V)
        return {name: g.add(total[name], alpha=scale) for name, g in gradients.items()}

    def mixed(self, module: nn.Module, x: Tensor, dx: Tensor, V: Tensor) -> dict[str, Tensor]:
        """(V . g_ux) dx, summed over the batch, by parameter name.

        How the pull-back of V to the control changes with the state: the second derivative of V . g
        by control and state, applied to dx.
        """

        def pushed(params: dict[str, Tensor]) -> Tensor:
            change: Tensor = jvp(lambda s: self.output(module, s, params), (x,), (dx,))[1]
            return change

        back: Any = vjp(pushed, _parameters(module, x))[1]
        found: dict[str, Tensor] = back(V)[0]
        return found

    def state_curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> Tensor | None:
        """V . g_xx of each sample, (B, X, X); None where g is linear in the state."""
        rows = x.reshape(samples, -1, *x.shape[1:])
        columns = V.reshape(samples, -1, *V.shape[1:])
        params = _parameters(module, x)

        def along(state: Tensor, v: Tensor) -> Tensor:
            return (self.output(module, state, params) * v).sum()

        found: Tensor = vmap(jacrev(jacrev(along)))(rows, columns)
        size = rows[0].numel()
        return found.reshape(samples, size, size)

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """Pull-back of every sample and column, by parameter name.

        Args:
            module: The layer.
            x: Its state.
            V: Columns in h-space, (r, *h.shape).
            samples: Number of samples B in dimension 0.

        Returns:
            (r, B, *parameter's shape) for each parameter.
        """
        params = _parameters(module, x)

        def one(x: Tensor, V: Tensor) -> dict[str, Tensor]:
            back: Any = vjp(lambda p: _call(module, p, x), params)[1]
            pulled: dict[str, Tensor] = vmap(lambda v: back(v)[0])(V)
            return pulled

        rows = x.reshape(samples, -1, *x.shape[1:])
        columns = V.reshape(V.shape[0], samples, -1, *V.shape[2:])
        found: dict[str, Tensor] = vmap(one, in_dims=(0, 1), out_dims=1)(rows, columns)
        return found

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Gram matrices V_u^T P V_u per sample.

        Args:
            module: The layer.
            x: Its state.
            V: Columns in h-space, (r, *h.shape).
            gain: P = eta M^-1 by parameter name; a parameter that is not named is fixed.
            samples: Number of samples B in dimension 0.
            sketch: Generator for an unbiased estimate where the rule has one; None for exact.

        Returns:
            (B, r, r).
        """
        total = V.new_zeros(samples, V.shape[0], V.shape[0])
        for name, G in self.sample_gradients(module, x, V, samples).items():
            if name in gain:
                P = gain[name]
                assert isinstance(P, float | int | Tensor)
                G = G.flatten(2)
                weighted = G * (P.flatten() if isinstance(P, Tensor) else P)
                total = total + torch.einsum("rbi,sbi->brs", weighted, G)
        return total

    def curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> Tensor:
        """D = g_u^T P g_u per sample, the Gram matrix of all unit vectors of h-space.

        Args:
            module: The layer.
            x: Its state.
            V: A vector in h-space, for its shape.
            gain: As in `gram`.
            samples: Number of samples B in dimension 0.

        Returns:
            (B, H, H).
        """
        return self.gram(module, x, unit_columns(V, samples), gain, samples)

    def kept_gram(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> tuple[Tensor, Kept] | None:
        """`gram` of one column, with the samples' own gradients where the rule had to form them.

        What is kept makes the feedback gradient almost free; None where nothing should be kept.
        """
        return None

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """Sum over samples of the squared per-sample gradient, by parameter name."""
        found = self.sample_gradients(module, x, V[None], samples)
        return {name: G[0].square().sum(0) for name, G in found.items()}

    def bias_gradient(self, module: nn.Module, V: Tensor) -> Tensor:
        """The bias's part of `gradient`: the sum over all axes but the features'."""
        axis = self.feature_axis % V.dim()
        return V.sum([d for d in range(V.dim()) if d != axis])


def unit_columns(like: Tensor, samples: int) -> Tensor:
    """Unit vectors of a sample's elements, the same for all samples: (X, *shape)."""
    elements = like.numel() // samples
    unit = torch.eye(elements, dtype=like.dtype, device=like.device)
    return unit[:, None].expand(-1, samples, -1).reshape(elements, *like.shape)


def _parameters(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The module's parameters, in the dtype of the state: the gradients are to have it, too."""
    return {
        name: p.to(x.dtype) if x.is_floating_point() else p for name, p in module.named_parameters()
    }


def _call(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The module's forward at other parameters."""
    h: Tensor = functional_call(_Bare(module), {f"module.{n}": p for n, p in params.items()}, (x,))
    return h


RULES: dict[type[nn.Module], LayerRule] = {}
#: Serves every type that is not in RULES, after a check against autograd on its first pass.
FALLBACK = LayerRule()
FALLBACK.general = True
R = TypeVar("R", bound=type[LayerRule])


def register(*module_types: type[nn.Module]) -> Callable[[R], R]:
    """Class decorator: the rule serves modules of ``module_types``."""

    def add(rule: R) -> R:
        RULES.update({module_type: rule() for module_type in module_types})
        return rule

    return add


def registered(module: nn.Module) -> LayerRule | None:
    """The rule of a module's type, or None.

    A subclass counts as its base only if it neither changes ``forward`` nor computes its weights
    (parametrisations, weight norm): the rule would describe another function.
    """
    kind, own = type(module), vars(module)
    if "forward" in own or "parametrizations" in module._modules:
        return None
    for module_type in kind.__mro__:
        rule = RULES.get(module_type)
        if rule is None or kind.forward is not getattr(module_type, "forward", None):
            continue
        if any(name in own for name in rule.parameters):
            continue
        if any(p is not None and n not in rule.parameters for n, p in module._parameters.items()):
            continue
        return rule
    return None


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule that serves a module as it is now: its type's, or the fallback; None if refused."""
    rule = registered(module) or FALLBACK
    return None if rule.refusal(module) else rule


def reason_against(module: nn.Module, given: Sequence[object], outputs: int = 1) -> str:
    """Why a module called with these arguments has no rule; empty if it has one."""
    return rule_of_call(module, given, outputs)[1]


def rule_of_call(
    module: nn.Module, given: Sequence[object], outputs: int = 1
) -> tuple[LayerRule | None, str]:
    """The rule of a module called with these arguments; or None, and why it has none."""
    rule = registered(module) or FALLBACK
    reason = _refusal(rule, module, given, outputs)
    return (None, reason) if reason else (rule, "")


def _refusal(rule: LayerRule, module: nn.Module, given: Sequence[object], outputs: int) -> str:
    kind = type(module).__name__
    if reason := rule.refusal(module):
        return reason
    inputs = sum(isinstance(one, Tensor) for one in given)
    if inputs not in rule.arguments:
        known = " or ".join(map(str, rule.arguments))
        return f"{kind} was called with {inputs} tensors, and its rule takes {known}"
    if outputs != 1:
        return f"{kind} returned {outputs} tensors, and a rule describes one"
    return rule.call_refusal(module, given)
