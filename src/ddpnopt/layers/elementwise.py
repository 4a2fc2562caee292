# SPDX-License-Identifier: MIT
"""Layers that scale and shift: normalisations."""

from __future__ import annotations

from torch import nn

from ddpnopt.layers.base import LayerRule, register


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormRule(LayerRule):
    """Serves it where it uses its running statistics."""

    def refusal(self, module: nn.Module) -> str:
        """In training mode a sample's output depends on the others."""
        if module.training or getattr(module, "running_mean", None) is None:
            return "it mixes the samples of a batch (BatchNorm in training mode)"
        return ""
