# SPDX-License-Identifier: MIT
"""Operators as formulas for torch's compiler: kernels that it does not know, or makes coarser.

torch's fused optimizers are in-place like their kernels, on lists of tensors. What a gradient
scaler gives is left to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ddpnopt.typing import Tensor

aten = torch.ops.aten


def _adam(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    largest: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Tensor | float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled: bool = False,
) -> None:
    """Adam of many tensors (Kingma and Ba 2015; decoupled: Loshchilov and Hutter 2019)."""
    for i, (p, g, m, v) in enumerate(zip(weights, gradients, means, squares, strict=True)):
        g = -g if maximize else g
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if amsgrad:
            torch.maximum(largest[i], v, out=largest[i])
            v = largest[i]
        k = steps[i].double()
        size, root = lr / (1 - beta1**k), (1 - beta2**k).sqrt()
        p.sub_(m / (v.sqrt() / root + eps) * size)


def _adamw(*tensors: Sequence[Tensor], **options: Any) -> None:
    _adam(*tensors, **options, decoupled=True)


def _sgd(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    weight_decay: float,
    momentum: float,
    lr: Tensor | float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
) -> None:
    """SGD of many tensors, maybe with momentum."""
    for i, (p, g) in enumerate(zip(weights, gradients, strict=True)):
        g = -g if maximize else g
        if weight_decay:
            g = g + weight_decay * p
        if momentum:
            b = buffers[i]
            if is_first_step:
                b.copy_(g)
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
            g = g + momentum * b if nesterov else b
        p.sub_(g * lr)


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1, for small x by Kahan's quotient: the error of e^x - 1 is that of log e^x over x.

    The compiler (2.13) makes e^x - 1 of it, of which nothing is left where x is below rounding:
    the coefficients of confident samples, whose x that is, would not be found any more.
    """
    above = torch.exp(x)
    rise = above - 1
    near = torch.where(rise == 0, x, rise * (x / torch.log(above)))
    return torch.where(x.abs() < 1, near, rise)


#: Of the fused optimizers, by operator.
FUSED: dict[Any, Callable[..., None]] = {
    aten._fused_adam_.default: _adam,
    aten._fused_adam_.tensor_lr: _adam,
    aten._fused_adamw_.default: _adamw,
    aten._fused_adamw_.tensor_lr: _adamw,
    aten._fused_sgd_.default: _sgd,
    aten._fused_sgd_.tensor_lr: _sgd,
}
#: Of other operators, where processors run them.
FORMULAS: dict[Any, Callable[..., Tensor]] = {
    aten.expm1.default: _expm1,
    aten.expm1_.default: lambda x: x.copy_(_expm1(x)),
}
