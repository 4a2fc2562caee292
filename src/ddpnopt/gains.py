# SPDX-License-Identifier: MIT
"""The feedback made visible (Algorithm 4): a layer's gain matrix K_t as a linear operator.

K_t = -Q_uu^-1 Q_ux says how a layer's update answers to a change of its state. It has as many rows
as the layer has parameters and as many columns as its state has elements, and is never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ddpnopt.cuts import hook_replays
from ddpnopt.errors import UnsupportedModelError
from ddpnopt.inert import Probing
from ddpnopt.layer import Layer
from ddpnopt.optimizer import DDPNOpt
from ddpnopt.replay import Replay, preserve
from ddpnopt.rollout import recurse
from ddpnopt.stages import Trajectory
from ddpnopt.trajectory import Recorder
from ddpnopt.typing import Tensor
from ddpnopt.undoing import Undoing
from ddpnopt.value.augmented import Augmented
from ddpnopt.value.base import Blocks
from ddpnopt.value.quadratic import Quadratic


@dataclass(frozen=True, eq=False)
class Gain:
    """K of one layer and one sample: du = K dx, matrix-free.

    It is the sample's part of the layer's gain: in the loss's own units, which carry 1/B for a
    mean, so that the layer's feedback is the sum over samples. Parameters are flattened and joined
    in the order of `parameters`; the state is flattened.

    Attributes:
        name: Module path.
        layer: The layer, with its policy.
        sample: Index in the batch.
        recorder: What recorded the pass.
        trajectory: The pass.
    """

    name: str
    layer: Layer
    sample: int
    recorder: Recorder
    trajectory: Trajectory

    @property
    def shape(self) -> tuple[int, int]:
        """(U, X)."""
        return sum(p.numel() for p in self.layer.params.values()), self._x.numel()

    @property
    def parameters(self) -> dict[str, torch.Size]:
        """Names and shapes of the parameters, in the order of du."""
        return {name: p.shape for name, p in self.layer.params.items()}

    @property
    def state(self) -> torch.Size:
        """Shape of the sample's state."""
        return self._x.shape

    @property
    def _x(self) -> Tensor:
        x = self.layer.blocks[0].x
        folds = x.shape[0] // self.layer.counts[0]
        rows = x[self.sample * folds : (self.sample + 1) * folds]
        return rows[0] if folds == 1 else rows

    @torch.no_grad()
    def matvec(self, dx: Tensor) -> Tensor:
        """K dx for a flat dx (X); returns (U)."""
        return self._update(dx.reshape(-1))

    @torch.no_grad()
    def rmatvec(self, du: Tensor) -> Tensor:
        """K^T du for a flat du (U); returns (X)."""
        like = self._x.reshape(-1).to(self.layer.dtype)
        with torch.enable_grad():
            at = torch.zeros_like(like).requires_grad_()
            (found,) = torch.autograd.grad(self._update(at), at, du.reshape(-1).to(like.dtype))
        return found

    def dense(self) -> Tensor:
        """(U, X), column by column: for small layers."""
        unit = torch.eye(self.shape[1], dtype=self.layer.dtype, device=self._x.device)
        return torch.stack([self.matvec(column) for column in unit], 1)

    def _update(self, dx: Tensor) -> Tensor:
        layer, policy = self.layer, self.layer.policy
        if layer.blocks[0].G is None:
            raise RuntimeError(
                f"the pass of '{self.name}' has been used by a step: call feedback_gains anew "
                "between backward and step"
            )
        assert policy is not None
        changes = self._changes(dx.to(layer.dtype))
        both = zip(policy(layer, changes), self._forward, strict=True)
        d = layer.weighted([with_dx - without for with_dx, without in both])
        bend = policy.bend(layer, changes)
        if bend is not None:
            bent = layer.bent(bend, changes)
            d = {name: g + bent[name] if name in bent else g for name, g in d.items()}
        moved = layer.applied({name: d[name] for name in layer.params})
        return -torch.cat([moved[name].reshape(-1) for name in layer.params])

    @cached_property
    def _forward(self) -> Blocks:
        """The policy without feedback."""
        assert self.layer.policy is not None
        return self.layer.policy(self.layer, None)

    def _changes(self, dx: Tensor) -> Blocks:
        """dx for this sample, none for the others."""
        x = self.layer.blocks[0].x
        rows = torch.zeros(self.layer.counts[0], dx.numel(), dtype=dx.dtype, device=dx.device)
        index = torch.tensor([self.sample], device=dx.device)
        return [rows.index_add(0, index, dx[None]).reshape(x.shape)]

    def to_input(self, v: Tensor) -> Tensor:
        """A direction of the layer's state pulled back to the model's input, v^T dx_t/dx_0.

        Args:
            v: (X), for example a right-singular vector of K.

        Returns:
            Of the sample's input shape.

        Raises:
            UnsupportedModelError: The model has no floating-point input.
        """
        if self.layer.blocks[0].G is None:
            raise RuntimeError(
                f"the pass of '{self.name}' has been used by a step: its weights are gone; call "
                "feedback_gains anew between backward and step"
            )
        call = self.trajectory.again()
        found = [a for a in call.args if isinstance(a, Tensor) and a.is_floating_point()]
        if not found:
            raise UnsupportedModelError(
                "to_input: the model's call has no floating-point tensor among its positional "
                "arguments, so directions can't be mapped back to it"
            )
        original = found[0]
        leaf = original.detach().clone().requires_grad_()
        states: list[Tensor] = []
        modules = {self.name: self.recorder.anatomy.hooked[self.name]}
        args = call.args
        with Undoing() as undoing, Probing(), torch.enable_grad():
            preserve(undoing, list(self.recorder.model.modules()))
            undoing.add(lambda: setattr(call, "args", args))
            hook_replays(undoing, modules, lambda _, x: states.append(x))
            call.args = tuple(leaf if a is original else a for a in args)
            Replay(call, grad=True).run_in_place()
            state = states[0][None] if self.layer.blocks[0].unbatched else states[0]
            rows = state.reshape(self.layer.counts[0], -1)
            along = (rows[self.sample] * v.reshape(-1).to(rows.dtype)).sum()
            (g,) = torch.autograd.grad(along, leaf)
        return g if self.layer.blocks[0].unbatched else g[self.sample]


@torch.no_grad()
def feedback_gains(opt: DDPNOpt, sample: int = 0) -> dict[str, Gain]:
    """The gain matrices of all layers for one sample of the pass that has just been differentiated.

    Call it between ``loss.backward()`` and ``opt.step()``; nothing is changed, and the step may
    follow. The value function must be quadratic (``"low_rank"``, ``"dense"``, ``"gauss_newton"``,
    `ddpnopt.PAPER`), since only then the policy is linear.

    Args:
        opt: The optimizer, in closed loop.
        sample: Index in the batch.

    Returns:
        By module path, in execution order; the first layer, whose state can't change, left out.

    Raises:
        ValueError: The value function's policy is not linear, or there is no such sample.
        RuntimeError: No backward pass since the last step, or several.
        UnsupportedModelError: The recorded pass can't be handled (named), or several ranks train.

    Examples:
        >>> criterion(model(x), y).backward()
        >>> K = feedback_gains(opt)["2"]
        >>> K.matvec(torch.randn(K.shape[1]))
    """
    engine, passes = opt.engine, _passes(opt, sample)
    assert engine.recorder is not None
    if not engine.usable(passes):
        return {}
    step = engine.new_step(passes, engine.rescale, 1.0)
    step.running = dict(step.running)
    step.build()
    for layer in step.layers.values():
        layer.keep_gain = True
    sketch = engine.sketch.get_state()
    recurse(engine.recorder, step, passes)
    engine.sketch.set_state(sketch)
    first = next(iter(step.layers), "")
    return {
        name: Gain(name, layer, sample, engine.recorder, passes[0])
        for name, layer in step.layers.items()
        if name != first
    }


def _passes(opt: DDPNOpt, sample: int) -> list[Trajectory]:
    """The one pass whose gains can be had."""
    engine, value = opt.engine, opt.options.value
    inner = value.inner if isinstance(value, Augmented) else value
    if not isinstance(inner, Quadratic) or inner.clip is not None:
        raise ValueError(
            f"value={value.name!r}: K is the gain of a quadratic value function without a clip; "
            "use value='low_rank', 'dense', 'gauss_newton' or PAPER"
        )
    if not opt.options.closed_loop:
        raise ValueError("feedback: gains are those of the closed loop; use feedback=True")
    if engine.company.ranks.several:
        raise UnsupportedModelError(
            "feedback_gains is for one process: a rank of several knows its own samples alone; use "
            "distributed=False"
        )
    passes = list(engine.recorder.arrivals.completed) if engine.recorder is not None else []
    if len(passes) != 1 or engine.recorder is None:
        raise RuntimeError(
            f"{len(passes)} passes are waiting for a step: call feedback_gains after one "
            "loss.backward() and before opt.step()"
        )
    trajectory = passes[0]
    if trajectory.path is not None:
        raise UnsupportedModelError(
            "feedback_gains: gains belong to the state of a chain of layers, and this model has "
            "branches, or layers that are used more than once"
        )
    if not 0 <= sample < trajectory.samples:
        raise ValueError(f"sample={sample}: the batch has {trajectory.samples} samples")
    return passes
