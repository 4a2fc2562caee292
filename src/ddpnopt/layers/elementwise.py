# SPDX-License-Identifier: MIT
"""Layers h = a(x) + weight * m(x) + bias, the weight shared over positions: norms and PReLU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.registry import register
from ddpnopt.typing import Tensor


class ElementwiseRule(LayerRule, ABC):
    """g_u^T v = (sum of v * m, sum of v) over the positions that share a weight."""

    holds_weight = True

    @abstractmethod
    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """m(x), of h's shape."""

    @abstractmethod
    def weight_axes(self, module: nn.Module, dims: int) -> tuple[int, ...]:
        """Axes of h that the weight has, in its order; empty if one number serves all."""

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """Sums of v * m and of v within each sample."""
        m = self.multiplier(module, x)
        found = {}
        for name, p in module.named_parameters():
            terms = V * m if name == "weight" else V
            found[name] = self._shared(module, terms, samples).reshape(
                V.shape[0], samples, *p.shape
            )
        return found

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """The same summed over samples."""
        m = self.multiplier(module, x)
        return {
            name: self._shared(module, (V * m if name == "weight" else V)[None], 1).reshape(p.shape)
            for name, p in module.named_parameters()
        }

    def bias_gradient(self, module: nn.Module, V: Tensor) -> Tensor:
        """The sum over the positions that share a bias."""
        assert isinstance(module.bias, Tensor)
        return self._shared(module, V[None], 1).reshape(module.bias.shape)

    def _shared(self, module: nn.Module, terms: Tensor, samples: int) -> Tensor:
        """(r, n, ...) to sums (r, B, weights) over all axes that the weight has not."""
        kept = self.weight_axes(module, terms.dim() - 1)
        terms = terms.reshape(terms.shape[0], samples, -1, *terms.shape[2:])
        summed = [2, *(d + 2 for d in range(1, terms.dim() - 2) if d not in kept)]
        return terms.sum(summed).reshape(*terms.shape[:2], -1)


@register(nn.LayerNorm, nn.RMSNorm)
class LayerNormRule(ElementwiseRule):
    """m is the normalised input; the weight has the normalised axes."""

    positionwise = True

    def batched_dim(self, module: nn.Module) -> int:
        """One axis more than are normalised."""
        return len(cast(nn.LayerNorm, module).normalized_shape) + 1

    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input normalised."""
        norm = cast(nn.LayerNorm, module)
        shape = list(norm.normalized_shape)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, shape, None, module.eps)
        return F.layer_norm(x, shape, None, None, norm.eps)

    def weight_axes(self, module: nn.Module, dims: int) -> tuple[int, ...]:
        """The last ones."""
        own = len(cast(nn.LayerNorm, module).normalized_shape)
        return tuple(range(dims - own, dims))


class ChannelRule(ElementwiseRule):
    """One weight a channel; channels are axis 1."""

    feature_axis = 1

    def weight_axes(self, module: nn.Module, dims: int) -> tuple[int, ...]:
        """The channels."""
        return (1,)


@register(nn.GroupNorm)
class GroupNormRule(ChannelRule):
    """m is the input normalised within groups of channels."""

    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input normalised."""
        norm = cast(nn.GroupNorm, module)
        return F.group_norm(x, norm.num_groups, None, None, norm.eps)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormRule(ChannelRule):
    """m is the input normalised by channel and sample."""

    def refusal(self, module: nn.Module) -> str:
        """Running statistics are of the batch."""
        running = bool(cast(nn.InstanceNorm1d, module).track_running_stats)
        return "InstanceNorm with track_running_stats depends on other samples" if running else ""

    def batched_dim(self, module: nn.Module) -> int:
        """(B, channels, ...)."""
        spatial = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
        return 2 + next(d for kind, d in spatial.items() if isinstance(module, kind))

    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input normalised."""
        return F.instance_norm(x, eps=cast(nn.InstanceNorm1d, module).eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(ChannelRule):
    """Serves it where it uses its running statistics: m is the input normalised by them."""

    def refusal(self, module: nn.Module) -> str:
        """In training mode a sample's output depends on the others."""
        if module.training or getattr(module, "running_mean", None) is None:
            return "it mixes the samples of a batch (BatchNorm in training mode)"
        return ""

    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input normalised by the running statistics."""
        norm = cast(nn.BatchNorm1d, module)
        assert norm.running_mean is not None and norm.running_var is not None
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, variance = norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype)
        return (x - mean.reshape(shape)) * (variance + norm.eps).rsqrt().reshape(shape)


@register(nn.PReLU)
class PReLURule(ElementwiseRule):
    """m = min(x, 0); one weight for all, or one a channel."""

    parameters = ("weight",)
    feature_axis = 1

    def multiplier(self, module: nn.Module, x: Tensor) -> Tensor:
        """min(x, 0)."""
        return torch.clamp(x, max=0)

    def weight_axes(self, module: nn.Module, dims: int) -> tuple[int, ...]:
        """The channels, if they have weights of their own."""
        return (1,) if cast(nn.PReLU, module).num_parameters > 1 else ()

    def mixed(self, module: nn.Module, x: Tensor, dx: Tensor, V: Tensor) -> dict[str, Tensor]:
        """V dx where x < 0."""
        return self.gradient(module, -(x < 0).to(x.dtype), -V * dx)

    def state_curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> Tensor | None:
        """None: piecewise linear."""
        return None
