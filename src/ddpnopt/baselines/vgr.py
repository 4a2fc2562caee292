# SPDX-License-Identifier: MIT
"""SGD with the vanishing-gradient regulariser of Pascanu, Mikolov and Bengio (2013).

With G_t the gradient of the loss at the output h_t of layer t, per sample,

    Omega = 1/B sum_i sum_t (|G_t| / |G_{t+1}| - 1)^2,   G_t = J_t^T g_x^T G_{t+1},

J_t the Jacobian of layer t+1's state by h_t and g_x the layer's own map. As in the source only the
immediate partial derivative is taken: states and G_{t+1} are constants, so that no gradient of a
gradient runs through the network. With u = G_t / |G_t| the derivative by layer t+1's weights is
that of V . g_x y, y = J_t u, V = 2/B (|G_t| / |G_{t+1}| - 1) G_{t+1} / |G_{t+1}|.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpnopt.cuts import Cut, cut
from ddpnopt.engine import Engine
from ddpnopt.hyperparameters import curvature_options
from ddpnopt.inert import Probing
from ddpnopt.linearise import cast_state
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.ranges import check_number, finite
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor
from ddpnopt.updates import Update


class _ChainOnly(Engine):
    """The regulariser compares each layer with the next: it is for chains."""

    graphs, alone = False, "SGDVGR"


class SGDVGR(DDPNOpt):
    """SGD with the vanishing-gradient regulariser (Pascanu, Mikolov and Bengio 2013).

    Adds the gradient of Omega, which asks of every layer to keep the norm of the loss's gradient
    as it passes backwards through it. Omega does not depend on the loss's scale; the loss may be
    any. The layers are those that have feedback in `ddpnopt.DDPNOpt`: in front of BatchNorm in
    training mode or of a branch, and for frozen layers, the step is that of plain SGD.

    Args:
        model: The network, a chain of layers.
        lr: Learning rate.
        strength: Factor on Omega; 0 is `torch.optim.SGD`, to the bit.
        momentum: Heavy ball.
        weight_decay: Coupled, as in `torch.optim.SGD`.
        nonfinite: "raise" or "skip" a step whose numbers are not finite.
        params: Parameter groups, as in `ddpnopt.DDPNOpt`, without a curvature of their own.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: The model can't be handled (named).

    Examples:
        >>> opt = SGDVGR(model, lr=0.1, strength=0.1)
        >>> opt.zero_grad(); criterion(model(x), y).backward(); opt.step()
    """

    _engine_type = _ChainOnly

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        strength: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nonfinite: str = "raise",
        *,
        params: Iterable[Any] | None = None,
    ) -> None:
        check_number("", "strength", strength, finite, "must not be negative, and finite")
        super().__init__(
            model,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nonfinite=nonfinite,
            params=params,
        )
        self.engine.method = _Regularised(strength)
        self.engine.needs_cost = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, with their own options.

        Raises:
            ValueError: A parameter is not the model's, or an option is out of range.
        """
        if isinstance(param_group, dict) and "curvature" in param_group:
            name = curvature_options(param_group["curvature"])["name"]
            if name != "identity":
                raise ValueError(f"curvature={name!r}: SGDVGR is SGD; leave the option out")
        super().add_param_group(param_group)


@dataclass(frozen=True)
class _Regularised:
    """The step's method; holds no optimizer, since the engine holds it."""

    strength: float

    def __call__(self, recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
        """SGD's step on p.grad + strength dOmega/du."""
        added: dict[Tensor, Tensor] = {}
        if self.strength:
            with step.borrowed.undone():
                added = omega_gradient(recorder.model, step, trajectories)
        for layer in step.layers.values():
            for p in layer.params.values():
                assert p.grad is not None
                d = p.grad.add(added[p], alpha=self.strength) if p in added else p.grad
                step.borrowed.step(Update(p, d))


def omega_gradient(
    model: nn.Module, step: Step, trajectories: Sequence[Trajectory]
) -> dict[Tensor, Tensor]:
    """The immediate derivative of Omega by the weights.

    Args:
        model: The recorded model, its weights those of the passes.
        step: The step, its layers built.
        trajectories: Its passes; Omega is the mean over all their samples.

    Returns:
        By parameter; those of the first layer are left out.

    Raises:
        UnsupportedModelError: A pass can't be repeated.
    """
    layers = list(step.layers.values())
    samples = sum(t.samples for t in trajectories)
    found: dict[Tensor, Tensor] = {}
    for number, trajectory in enumerate(trajectories):
        if len(layers) < 2:
            break
        cuts = cut(trajectory, model, outputs=True, until=len(layers) - 1)
        for segment, above in zip(cuts, layers[1:], strict=True):
            stage = above.blocks[number]
            assert segment.stage.G is not None and stage.G is not None
            u, below = _directions(segment.stage.G.to(above.dtype), trajectory.samples)
            V, size = _directions(stage.G.to(above.dtype), trajectory.samples)
            change = torch.where(size > 0, below / torch.where(size > 0, size, 1.0) - 1, 0.0)
            V = (V.reshape(trajectory.samples, -1) * change[:, None]).reshape(V.shape)
            y = _pushed(segment, u).to(above.dtype).reshape(stage.x.shape)
            x = cast_state(stage.x, above.dtype)
            mixed = above.rule.mixed(above.module, x, y, V * (2 / samples))
            for name, p in above.params.items():
                part = mixed[name].to(p.dtype)
                found[p] = found[p] + part if p in found else part
    return found


def _directions(G: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """G / |G| of every sample, 0 where G = 0, and |G|.

    Divided by the largest entry first: the square of a vanishing gradient would underflow.
    """
    rows = G.reshape(samples, -1)
    largest = rows.abs().amax(1)
    rows = rows / torch.where(largest > 0, largest, 1.0)[:, None]
    norm = torch.linalg.vector_norm(rows, dim=1)
    return (rows / torch.where(norm > 0, norm, 1.0)[:, None]).reshape(G.shape), norm * largest


def _pushed(segment: Cut, u: Tensor) -> Tensor:
    """J u: the product with the Jacobian's transpose is linear, and its own transpose is J."""
    with Probing(), torch.enable_grad():
        v = torch.zeros_like(segment.end, requires_grad=True)
        (back,) = torch.autograd.grad(segment.end, segment.h, v, create_graph=True)
        (pushed,) = torch.autograd.grad(back, v, u.to(back.dtype).reshape(back.shape))
    return pushed
