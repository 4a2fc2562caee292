# SPDX-License-Identifier: MIT
"""Checks for people who write layers, and a counter of operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ddpnopt.arguments import tensors_of
from ddpnopt.layers import LayerRule, MatrixRule, registered
from ddpnopt.positions import Diagonal, Product
from ddpnopt.typing import Tensor

COLUMNS = 3


def check_layer(
    layer: nn.Module,
    x: Tensor | Sequence[Any],
    *,
    rule: LayerRule | None = None,
    samples: int | None = None,
    tolerance: float = 1e-8,
) -> None:
    """Compare a layer's rule with autograd, in float64, on random vectors.

    Args:
        layer: The module; a copy of it is used.
        x: Its input with a batch axis, or the arguments of a call, as in ``(x, (h, c))``.
        rule: The rule to check; by default the one that is registered for the layer's type.
        samples: Number of samples in dimension 0 (several rows may belong to one).
        tolerance: Largest relative difference.

    Raises:
        ValueError: No rule is registered for the layer, or it refuses this one.
        AssertionError: A method differs; it is named, with the difference.

    Examples:
        >>> check_layer(nn.Linear(4, 3), torch.randn(5, 4))
    """
    found = rule or registered(layer)
    if found is None:
        raise ValueError(
            f"no rule is registered for {type(layer).__name__}; give one, or register it"
        )
    if reason := found.refusal(layer):
        raise ValueError(f"{type(found).__name__} refuses this layer: {reason}")
    module = copy.deepcopy(layer).double()
    given = (x,) if isinstance(x, Tensor) else tuple(x)
    arguments = _mapped(given, lambda t: t.double() if t.is_floating_point() else t)
    state = found.pack(module, tensors_of(arguments))
    B = state.shape[0] if samples is None else samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _Check(found, module, arguments, state, B, tolerance).run()


class _Check:
    """One layer against its autograd twin."""

    def __init__(
        self,
        rule: LayerRule,
        module: nn.Module,
        arguments: tuple[Any, ...],
        x: Tensor,
        samples: int,
        tolerance: float,
    ) -> None:
        self.rule, self.module, self.x, self.samples = rule, module, x, samples
        self.tolerance = tolerance
        leaves = _mapped(arguments, lambda t: t.detach().requires_grad_(t.is_floating_point()))
        self.moving = [t for t in tensors_of(leaves) if t.requires_grad]
        self.h = rule.pack_output(module, tensors_of(module(*leaves)))
        self.params = {n: p for n, p in module.named_parameters()}
        self.V = torch.randn(COLUMNS, *self.h.shape, dtype=torch.float64)

    def run(self) -> None:
        """Every method that a step may use."""
        self._function()
        self._maps()
        G = self._sample_gradients()
        rule, module, x, V = self.rule, self.module, self.x, self.V
        total = {n: g[0].sum(0) for n, g in G.items()}
        if "bias" in self.params:
            self._same("bias_gradient", rule.bias_gradient(module, V[0]), total["bias"])
        for name, ours in rule.gradient(module, x, V[0]).items():
            self._same(f"gradient[{name!r}]", ours, total[name])
        for name, ours in rule.sample_gradients(module, x, V, self.samples).items():
            self._same(f"sample_gradients[{name!r}]", ours, G[name])
        for name, ours in rule.squares(module, x, V[0], self.samples).items():
            self._same(f"squares[{name!r}]", ours, G[name][0].square().sum(0))
        scalar = dict.fromkeys(G, 0.7)
        diagonal = {n: torch.rand_like(p.detach()) for n, p in self.params.items()}
        gains: dict[str, Mapping[str, float | Tensor]] = {"scalar": scalar, "diagonal": diagonal}
        for kind, gain in gains.items():
            self._gram(f"gram, {kind} gain", gain, G)
        if isinstance(rule, MatrixRule):
            self._kronecker(rule, G)

    def _function(self) -> None:
        """h, up to the bias, which no linear map depends on and a rule may leave out."""
        h, ours = self.h.detach(), self.rule.function(self.module, self.x).detach()
        bias = self.params.get("bias")
        if bias is not None and ours.shape == h.shape:
            shape = [1] * h.dim()
            shape[self.rule.feature_axis] = -1
            without = h - bias.detach().reshape(shape) if bias.dim() == 1 else h
            near = (ours - without).abs().max() < (ours - h).abs().max() if h.numel() else False
            h = without if near else h
        self._same("function", ours, h)

    def _maps(self) -> None:
        """push and pull; a state of indices does not move."""
        if not self.moving:
            return
        unit = torch.autograd.grad(
            self.h, self.moving, self.V, is_grads_batched=True, retain_graph=True
        )
        ours = self.rule.unpack(self.module, self.rule.pull(self.module, self.x, self.V))
        for part, theirs in zip(ours, unit, strict=False):  # a call may leave out the last ones
            self._same("pull", part, theirs)
        moves = [torch.randn_like(t) for t in self.moving]
        pushed = self.rule.push(self.module, self.x, self.rule.pack(self.module, moves))
        along = (self.V * pushed).flatten(1).sum(1)
        pulled = [(g * dx).flatten(1).sum(1) for g, dx in zip(unit, moves, strict=True)]
        self._same("push", along, torch.stack(pulled).sum(0))

    def _sample_gradients(self) -> dict[str, Tensor]:
        """(r, B, *shape) by autograd, one sample after another: slow, and independent."""
        rows = self.h.shape[0] // self.samples
        found: dict[str, list[Tensor]] = {name: [] for name in self.params}
        for sample in range(self.samples):
            seed = torch.zeros_like(self.V)
            at = slice(sample * rows, (sample + 1) * rows)
            seed[:, at] = self.V[:, at]
            gradients = torch.autograd.grad(
                self.h, list(self.params.values()), seed, is_grads_batched=True, retain_graph=True
            )
            for name, g in zip(self.params, gradients, strict=True):
                found[name].append(g)
        return {name: torch.stack(parts, 1) for name, parts in found.items()}

    def _gram(
        self, place: str, gain: Mapping[str, float | Tensor], G: Mapping[str, Tensor]
    ) -> None:
        expected = self.V.new_zeros(self.samples, COLUMNS, COLUMNS)
        for name, g in G.items():
            weighted = (g * gain[name]).flatten(2)
            expected += torch.einsum("rbi,sbi->brs", weighted, g.flatten(2))
        ours = self.rule.gram(self.module, self.x, self.V, dict(gain), self.samples)
        self._same(place, ours, expected)

    def _kronecker(self, rule: MatrixRule, G: Mapping[str, Tensor]) -> None:
        bias = rule.joins_bias and "bias" in G
        W = rule.joined(self.module, {n: p.detach() for n, p in self.params.items()}, bias)
        groups, outputs, width = W.shape
        T_A = torch.randn(groups, width, width, dtype=W.dtype)
        T_G = torch.randn(groups, outputs, outputs, dtype=W.dtype)
        scale = torch.rand(groups, outputs, width, dtype=W.dtype)
        joined = "bias, weight" if bias else "weight"
        flat = [
            {n: g[r, b] for n, g in G.items()} for r in range(COLUMNS) for b in range(self.samples)
        ]
        D = torch.stack([T_G @ rule.joined(self.module, one, bias) @ T_A.mT for one in flat])
        product = Product(T_A.mT @ T_A, T_G.mT @ T_G, 0.7, bias)
        for P, weight in ((Diagonal(T_A, T_G, scale, bias), scale), (product, 0.7)):
            rows = (
                D.reshape(COLUMNS, self.samples, -1),
                (D * weight).reshape(COLUMNS, self.samples, -1),
            )
            expected = torch.einsum("rbi,sbi->brs", *rows)
            ours = rule.gram(self.module, self.x, self.V, {"weight": P}, self.samples)
            self._same(f"gram, Kronecker gain of {joined}", ours, expected)

        self._statistics(rule, bias, (T_A, T_G), D.reshape(COLUMNS, self.samples, *W.shape)[0])

    def _statistics(
        self, rule: MatrixRule, bias: bool, basis: tuple[Tensor, Tensor], rotated: Tensor
    ) -> None:
        """A, G and s, whichever way the rule takes, from inputs and outputs at all positions."""
        U = rule.inputs(self.module, self.x, self.samples)
        U = torch.cat([U, torch.ones_like(U[..., :1])], -1) if bias else U
        V = rule.outputs(self.module, self.V, self.samples)[0]
        A = rule.input_products(self.module, self.x, self.samples, bias)
        self._same("input_products", A, torch.einsum("bgti,bgtj->gij", U, U))
        G, rows = rule.output_products(self.module, self.V[0], self.samples)
        self._same("output_products", G, torch.einsum("bgto,bgtp->gop", V, V))
        assert rows == V.shape[0] * V.shape[2]
        s = rule.rotated_squares(self.module, self.x, self.V[0], self.samples, basis, bias)
        self._same("rotated_squares", s, rotated.square().sum(0))

    def _same(self, place: str, ours: Tensor, theirs: Tensor) -> None:
        name = f"{type(self.rule).__name__}.{place}"
        if ours.shape != theirs.shape:
            raise AssertionError(
                f"{name}: shape {tuple(ours.shape)}, autograd has {tuple(theirs.shape)}"
            )
        difference = float((ours - theirs).detach().abs().max()) if ours.numel() else 0.0
        scale = max(1.0, float(theirs.detach().abs().max()) if theirs.numel() else 1.0)
        if not difference <= self.tolerance * scale:
            raise AssertionError(f"{name}: differs from autograd by {difference:.3g}")


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A call's arguments with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    return (
        tuple(_mapped(one, change) for one in value) if isinstance(value, tuple | list) else value
    )


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations of products and convolutions in a block.

    As `torch.utils.flop_counter.FlopCounterMode` does (two for a multiply-accumulate), but without
    its hooks on modules, which forbid calls of ``autograd.grad`` for inner tensors.

    Attributes:
        total: Operations so far.

    Examples:
        >>> with Operations() as counter:
        ...     opt.step()
        >>> counter.total
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the signature is torch's
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        self.total += int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        return out
