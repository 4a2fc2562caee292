# SPDX-License-Identifier: MIT
"""What the recursion needs to know of a parametrised layer h = g(x, u), as linear maps.

`LayerRule` itself is a complete rule: it differentiates the module's own forward, sample by
sample, with torch.func. It is right for every module that treats samples independently, and slow.
A subclass says the same with the layer's own algebra. Rules are stateless; one serves every module
whose forward is its type's own. To add a layer: one file here, a subclass, a decorator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.func import jacrev, jvp, vjp, vmap

from ddpnopt.layers.forward import called, own_parameters
from ddpnopt.positions import Gain, diagonal
from ddpnopt.typing import Tensor


@runtime_checkable
class Kept(Protocol):
    """The samples' own gradients of one pass, to be summed with other weights."""

    def onto(self, gradients: Mapping[str, Tensor], a: Tensor, scale: float) -> dict[str, Tensor]:
        """gradients + scale sum_i a_i G_i."""


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
    #: Where autograd is not asked for the weight's gradient, the bias's is found apart: torch finds
    #: both at once, so that asking for one costs as much as asking for both.
    bias_apart: bool = False
    #: `add` needs no memory of the parameters' size.
    adds_in_place: bool = False
    #: The rule differentiates the module's own forward, whatever it is.
    general: bool = False
    #: All dimensions but the features' are alike: samples need not lie in the first.
    positionwise: bool = False
    #: How many tensors the module is called with, those in nested tuples included.
    arguments: tuple[int, ...] = (1,)
    #: How many tensors it returns, likewise.
    results: tuple[int, ...] = (1,)

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

    def pack_output(self, module: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
        """h: one tensor that holds all that the module returns. Linear in the outputs."""
        return outputs[0]

    def unpack_output(self, module: nn.Module, h: Tensor) -> tuple[Tensor, ...]:
        """The outputs (or columns of them, with leading axes) from h."""
        return (h,)

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """g(x, u) up to a constant, with the layer's present parameters."""
        return called(module, own_parameters(module, x), x)

    def output(self, module: nn.Module, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """h = g(x, u) itself, the module's forward; parameters that are not given are its own."""
        return called(module, {**own_parameters(module, x), **parameters}, x)

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
        params = own_parameters(module, x)
        back: Any = vjp(lambda p: called(module, p, x), params)[1]
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

    def add(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        parameters: Mapping[str, Tensor],
        scale: float,
    ) -> None:
        """Add scale `gradient` to the parameters; only rules with `adds_in_place` can."""
        raise NotImplementedError

    def mixed(self, module: nn.Module, x: Tensor, dx: Tensor, V: Tensor) -> dict[str, Tensor]:
        """(V . g_ux) dx, summed over the batch, by parameter name.

        How the pull-back of V to the control changes with the state: the second derivative of V . g
        by control and state, applied to dx.
        """

        def pushed(params: dict[str, Tensor]) -> Tensor:
            change: Tensor = jvp(lambda s: self.output(module, s, params), (x,), (dx,))[1]
            return change

        back: Any = vjp(pushed, own_parameters(module, x))[1]
        found: dict[str, Tensor] = back(V)[0]
        return found

    def state_curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> Tensor | None:
        """V . g_xx of each sample, (B, X, X); None where g is linear in the state."""
        rows = x.reshape(samples, -1, *x.shape[1:])
        columns = V.reshape(samples, -1, *V.shape[1:])
        params = own_parameters(module, x)

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
        params = own_parameters(module, x)

        def one(x: Tensor, V: Tensor) -> dict[str, Tensor]:
            back: Any = vjp(lambda p: called(module, p, x), params)[1]
            pulled: dict[str, Tensor] = vmap(lambda v: back(v)[0])(V)
            return pulled

        rows = x.reshape(samples, -1, *x.shape[1:])
        columns = V.reshape(V.shape[0], samples, -1, *V.shape[2:])
        found: dict[str, Tensor] = vmap(one, in_dims=(0, 1), out_dims=1)(rows, columns)
        return found

    def along(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        change: Mapping[str, Tensor],
        samples: int,
    ) -> Tensor:
        """V . g_u du of every sample and column: what a change of the control does to h, along V.

        Args:
            module: The layer.
            x: Its state.
            V: Columns in h-space, (r, *h.shape).
            change: du by parameter name; a parameter that is not named stays.
            samples: Number of samples B in dimension 0.

        Returns:
            (B, r).
        """
        found = self.sample_gradients(module, x, V, samples)
        total = V.new_zeros(samples, V.shape[0])
        for name, du in change.items():
            total = total + torch.einsum("rbu,u->br", _rows(found[name]), du.flatten())
        return total

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
                G = _rows(G)
                weighted = G * (P.flatten() if diagonal(P) else P)
                total = total + torch.einsum("rbi,sbi->brs", weighted, G)
        return total

    def lengths(
        self,
        module: nn.Module,
        x: Tensor,
        v: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """v_u^T P v_u per sample, (B,): `gram` of one vector (h's shape) in h-space."""
        return self.gram(module, x, v[None], gain, samples, sketch)[:, 0, 0]

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


def _rows(G: Tensor) -> Tensor:
    """Samples' gradients with one dimension for all of a parameter, which may have none itself."""
    return G.reshape(*G.shape[:2], -1)
