# SPDX-License-Identifier: MIT
"""The borrowed optimizer's own update of a parameter, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ddpnopt.curvature import Joint
from ddpnopt.curvature.base import descend_all, momentum_step
from ddpnopt.decisions import same
from ddpnopt.dtensors import local
from ddpnopt.errors import NonFiniteError
from ddpnopt.factors import Factors
from ddpnopt.hyperparameters import Hyper
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.positions import Gain, Kronecker
from ddpnopt.ranks import Ranks
from ddpnopt.sizes import Sizes
from ddpnopt.typing import Tensor
from ddpnopt.updates import Update
from ddpnopt.value.base import Blocks

#: States that hold a running sum or mean of gradients.
MOMENTA = frozenset({"momentum_buffer", "exp_avg"})


class Borrowed:
    """Updates parameters in place and can take everything back.

    Attributes:
        judges_sparse: What makes the updates knows itself whether it takes sparse gradients.

    Args:
        hyper: Every parameter's hyperparameters in this step.
        state: The optimizer's state by parameter; written only by `commit`.
        copies: Memory for the weights before the step, kept from step to step: fresh pages cost
            more than the copy.
    """

    judges_sparse = False

    def __init__(
        self,
        hyper: dict[Tensor, Hyper],
        state: Mapping[Tensor, dict[str, Any]],
        copies: dict[int, Tensor] | None = None,
    ) -> None:
        self.hyper = hyper
        self._state = state
        self._copies = {} if copies is None else copies
        #: Some factorisation did not succeed at once.
        self.factorised_again = False
        self._saved: dict[Tensor, Tensor] = {}
        self._new: dict[Tensor, dict[str, Any]] = {}
        self.sizes = Sizes()
        self._joined: dict[Layer, tuple[str, ...]] = {}
        self._inverse: tuple[Mapping[str, Any], Kronecker] | None = None  # the last layer's M^-1

    def state(self, p: Tensor) -> dict[str, Any]:
        """The parameter's state before the step."""
        return self._state.get(p, {})

    def begun_with(self, p: Tensor) -> Mapping[str, Any]:
        """The same, whatever has been stepped since."""
        return self.state(p)

    def decayed(self, p: Tensor, g: Tensor) -> Tensor:
        """Coupled weight decay, as torch.optim adds it."""
        hyper = self.hyper[p]
        coupled = hyper.weight_decay and not hyper.curvature.decoupled
        return g.add(p, alpha=hyper.weight_decay) if coupled else g

    def moment(
        self, p: Tensor, g: Tensor, squares: tuple[Tensor, int] | None = None
    ) -> Tensor | None:
        """M's statistics after gradient g of the batch.

        Args:
            p: The parameter.
            g: Batch gradient, without weight decay.
            squares: Sum over samples of the squared gradients, and the number of samples.
        """
        hyper = self.hyper[p]
        mean = None
        if squares is not None and hyper.curvature.statistics == "squares":
            # E (G_i B + lambda u)^2 in the batch gradient's units, G_i carrying its own 1/B.
            mean = squares[0] * squares[1]
            if hyper.weight_decay and not isinstance(hyper.curvature, Joint):
                mean = mean + hyper.weight_decay * p * (2 * g + hyper.weight_decay * p)
        return hyper.curvature.moment(
            self.hyper[p].seen(p, self.state(p)), self.decayed(p, g), mean
        )

    def gain(self, p: Tensor, moment: Tensor | None, rescale: float) -> Gain:
        """P = r eta / (1 - momentum) M^-1."""
        inverse = self.hyper[p].curvature.inverse(self.hyper[p].seen(p, self.state(p)), moment)
        life = self._life(p, rescale)
        return life if inverse is None else inverse * life

    def strength(self, parameters: Iterable[Tensor]) -> float:
        """The factor on S that suits the curvatures; the smallest, where they differ."""
        return min((self.hyper[p].curvature.strength for p in parameters), default=1.0)

    def first_length(self, p: Tensor, g: Tensor, rescale: float) -> Tensor:
        """g^T P g before a parameter's layer is known: a bound for Kronecker curvatures."""
        curvature = self.hyper[p].curvature
        g = g * rescale
        if isinstance(curvature, Joint):
            P: Gain = rescale * self.hyper[p].life / curvature.damping
        else:
            P = self.gain(p, self.moment(p, g), rescale)
        assert not isinstance(P, Kronecker)
        return (g.square() * P).sum() / rescale**2

    def needs_plain(self, p: Tensor) -> bool:
        """Whether a re-weighted step of a parameter asks for the plain gradient, too."""
        return self.hyper[p].curvature.statistics != "none"

    def apply(self, updates: Sequence[Update]) -> None:
        """u <- u - eta M^-1 d for the parameters of a layer, or for all outside the feedback."""
        parameters = [update.p for update in updates]
        self.save(parameters)
        lr = self.rate(parameters)
        if lr is not None and len(updates) > 1 and not any(u.d.is_sparse for u in updates):
            descend_all(parameters, [update.d for update in updates], lr)
            self.moved(parameters)
            return
        for update in updates:
            self.step(update)
        self.look(parameters)

    def rate(self, parameters: Sequence[Tensor]) -> float | Tensor | None:
        """eta, where the step of all of them is u <- u - eta d and nothing else."""
        hypers = [self.hyper[p] for p in parameters]
        alike = all(hyper.gradient_step and same(hyper.lr, hypers[0].lr) for hyper in hypers)
        return hypers[0].lr if hypers and alike else None

    def moved(self, parameters: Sequence[Tensor]) -> None:
        """Parameters that have been saved have made such a step."""
        self._new.update({p: {} for p in parameters})
        self.look(parameters)

    def step(self, update: Update) -> None:
        """u <- u - eta M^-1 d."""
        p, moment = update.p, update.moment
        hyper = self.hyper[p]
        state = hyper.seen(p, self.state(p))
        if moment is None and update.fed is not None:
            moment = self.moment(p, update.fed, update.squares)
        d = self.decayed(p, update.d)
        if update.follows and update.plain is not None:
            moment = hyper.curvature.follow(state, self.decayed(p, update.plain), d, moment)
        self.save([p])
        if hyper.curvature.decoupled and hyper.weight_decay:
            p.mul_(1 - hyper.lr * hyper.weight_decay)
        self._new[p] = hyper.curvature.update(p, d, state, moment, hyper.lr, hyper.momentum)

    def put(self, p: Tensor, value: Tensor) -> None:
        """u <- value, found in another way than by a step on a gradient."""
        self.save([p])
        p.copy_(value)

    def before(self, p: Tensor) -> Tensor:
        """A parameter that has been updated, as it was before."""
        return self._saved[p]

    def shorten(self, p: Tensor, gamma: float) -> None:
        """Multiply what momentum has gathered of a parameter's gradients."""
        for name in MOMENTA & self._new[p].keys():
            self._new[p][name] = self._new[p][name] * gamma

    def save(self, parameters: Sequence[Tensor]) -> None:
        """Copy parameters that are to be updated, unless they have been."""
        new = [p for p in parameters if p not in self._saved]
        if not new:
            return
        copies = [self._room(p) for p in new]
        torch._foreach_copy_([local(t) for t in copies], [local(p) for p in new])
        self._saved.update(zip(new, copies, strict=True))

    def _room(self, p: Tensor) -> Tensor:
        """Memory for a parameter's copy."""
        copy = self._copies.get(id(p))
        if copy is None or (copy.shape, copy.dtype, copy.device) != (p.shape, p.dtype, p.device):
            copy = self._copies[id(p)] = torch.empty_like(p, requires_grad=False)
        return copy

    def fixed_gains(self, layer: Layer, rescale: float) -> dict[str, Gain] | None:
        """P of every parameter where no curvature has statistics; else None."""
        found: dict[str, Gain] = {}
        for name, p in layer.params.items():
            hyper = self.hyper[p]
            if hyper.curvature.statistics != "none" or isinstance(hyper.curvature, Joint):
                return None
            found[name] = self._life(p, rescale)
        return found

    def _life(self, p: Tensor, rescale: float) -> float | Tensor:
        """r eta / (1 - momentum)."""
        return self.hyper[p].life if rescale == 1.0 else rescale * self.hyper[p].life

    # A layer's matrix as a whole --------------------------------------------------------------

    def joined(self, layer: Layer) -> tuple[str, ...]:
        """Names of the parameters that a Kronecker curvature treats as one matrix; maybe none."""
        if layer not in self._joined:
            self._joined[layer] = self._together(layer)
        return self._joined[layer]

    def _together(self, layer: Layer) -> tuple[str, ...]:
        weight, bias = layer.params.get("weight"), layer.params.get("bias")
        if weight is None or not isinstance(layer.rule, MatrixRule):
            return ()
        hyper = self.hyper[weight]
        if not isinstance(hyper.curvature, Joint):
            return ()
        other = self.hyper[bias] if bias is not None and layer.rule.joins_bias else None
        same = other is not None and (other.lr, other.momentum, other.curvature) == (
            hyper.lr,
            hyper.momentum,
            hyper.curvature,
        )
        return ("weight", "bias") if same else ("weight",)

    def joint(
        self,
        layer: Layer,
        vectors: Blocks,
        scale: float,
        ranks: Ranks,
        lengths: bool = False,
    ) -> dict[str, Any]:
        """The layer's Kronecker statistics after h-space vectors, without storing them.

        Args:
            layer: The layer.
            vectors: V_h of each pass, as autograd's loss has it.
            scale: r; times the number of samples it makes them one sample's own.
            ranks: Those whose samples these statistics are of.
            lengths: The vectors' lengths will be asked for next.
        """
        weight, bias = layer.params["weight"], "bias" in self.joined(layer)
        curvature = self.hyper[weight].curvature
        assert isinstance(curvature, Joint) and isinstance(layer.rule, MatrixRule)
        before, factors, samples = self.state(weight), None, 0
        if curvature.measures(before, layer.rule.width(layer.module) + bias):
            _, (samples,) = ranks.counted([], [sum(layer.counts)])
            factors = Factors(layer, vectors, samples * scale, lengths)
        try:
            found = curvature.joint(before, factors, bias, samples, ranks.counted)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"'{layer.name}': {error}; nothing was changed. Lower lr, or use nonfinite='skip'"
            ) from error
        self.factorised_again |= found["fallbacks"] > before.get("fallbacks", 0)
        return found

    def joint_gain(self, layer: Layer, joint: Mapping[str, Any], eta: float | Tensor) -> Kronecker:
        """P = eta M^-1 of the layer's matrix."""
        if self._inverse is None or self._inverse[0] is not joint:
            curvature = self.hyper[layer.params["weight"]].curvature
            assert isinstance(curvature, Joint)
            self._inverse = joint, curvature.gain(joint, 1.0, "bias" in self.joined(layer))
        return self._inverse[1].times(eta)

    def joint_step(self, layer: Layer, d: Mapping[str, Tensor], joint: Mapping[str, Any]) -> None:
        """u <- u - eta M^-1 d for the joined parameters.

        Args:
            layer: The layer.
            d: Gradients to step on by name, without weight decay.
            joint: The layer's statistics.
        """
        assert isinstance(layer.rule, MatrixRule)
        names = self.joined(layer)
        decayed = {name: self.decayed(layer.params[name], d[name]) for name in names}
        D = layer.rule.joined(layer.module, decayed, "bias" in names)
        self._move(layer, self.joint_gain(layer, joint, 1.0)(D), joint)

    def joint_move(self, layer: Layer, direction: Tensor, joint: Mapping[str, Any]) -> None:
        """u <- u - eta M^-1 d, M^-1 (d - weight decay) given, as the layer's matrix."""
        assert isinstance(layer.rule, MatrixRule)
        names = self.joined(layer)
        if any(self.hyper[layer.params[name]].weight_decay for name in names):
            zero = {name: torch.zeros_like(layer.params[name]) for name in names}
            decay = {name: self.decayed(layer.params[name], zero[name]) for name in names}
            D = layer.rule.joined(layer.module, decay, "bias" in names)
            direction = direction + self.joint_gain(layer, joint, 1.0)(D)
        self._move(layer, direction, joint)

    def _move(self, layer: Layer, direction: Tensor, joint: Mapping[str, Any]) -> None:
        assert isinstance(layer.rule, MatrixRule)
        names = self.joined(layer)
        for name, step in layer.rule.parted(layer.module, direction, "bias" in names).items():
            p = layer.params[name]
            hyper = self.hyper[p]
            self.save([p])
            new = momentum_step(p, step.to(p.dtype), self.state(p), hyper.lr, hyper.momentum)
            self._new[p] = {**joint, **new} if name == "weight" else new
        self.look([layer.params[name] for name in names])

    def look(self, some: Sequence[Tensor]) -> None:
        """Take the norms of parameters that have just been updated, and of their states."""
        self.sizes.look([*some, *(t for p in some for t in self.numbers(p))])

    def numbers(self, p: Tensor) -> list[Tensor]:
        """The tensors of a parameter's new state, to be checked before they are kept."""
        new = self._new.get(p, {}).values()
        return [t for t in new if isinstance(t, Tensor) and t.is_floating_point()]

    def restart(self) -> None:
        """Take all updates back, to be made again another way."""
        self.rollback()
        self._new.clear()

    def retract(self, parameters: Iterable[Tensor]) -> None:
        """Take the updates of some parameters back, to be made again on another gradient."""
        for p in parameters:
            p.copy_(self._saved[p])
            self._new.pop(p, None)

    def rollback(self) -> None:
        """Restore every parameter; the state was never written."""
        for p, saved in self._saved.items():
            p.copy_(saved)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within the block the weights are those from before the step."""
        new = {p: p.detach().clone() for p in self._saved}
        self.rollback()
        try:
            yield
        finally:
            for p, value in new.items():
                p.copy_(value)

    def updated(self) -> list[Tensor]:
        """Parameters updated so far."""
        return list(self._saved)

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        """Write the new state."""
        for p, new in self._new.items():
            state[p].update(new)
