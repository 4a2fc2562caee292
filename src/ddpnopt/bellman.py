# SPDX-License-Identifier: MIT
"""The Bellman backward pass through the recorded layers.

`linearise` runs when the output's gradient arrives (the graph is still there) and keeps what the
value function needs of the linearised dynamics; `backward` runs at the step, where it is algebra:
V through the activation, M's statistics, Gram products, the backup, layer by layer from the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddpnopt.errors import UnsupportedModelError
from ddpnopt.layers import Gain, LayerRule
from ddpnopt.stages import Link, Stage, Trajectory
from ddpnopt.terminal import Cost
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks, Policy, Recursion, ValueFunction


def linearise(trajectory: Trajectory, link: Link | None, cost: Cost, value: ValueFunction) -> None:
    """Pull the terminal factor's columns, or the segments' Jacobians, back to the stages.

    Args:
        trajectory: The pass whose output has just received its gradient.
        link: Edges of its stages, newest first.
        cost: Its terminal cost.
        value: Says what is needed.
    """
    if value.linearization == "gradient" or link is None:
        return
    assert trajectory.z is not None
    factor = value.linearization == "factor"
    columns = cost.factor(value.rank) if factor else _unit_columns(trajectory.z, cost.w.numel())
    last = link.stage
    if not last.plain:
        if factor:
            last.fresh_Z["Z_h"] = columns
        else:
            last.fresh_Z["J"] = _per_sample(columns, cost.w.numel())
    if link.x is None:
        return
    if factor:
        link.stage.fresh_Z["Z_x"] = columns = _through_layer(last, columns)
    links: list[Link] = []
    before = link.before
    while before is not None:
        links.append(before)
        before = before.before
    links = [one for one in links if not one.stage.plain and one.h is not None]
    if not links:
        return
    if factor:
        _pull_columns(link, links, columns)
    else:
        _segment_jacobians(link, links, columns, cost.w.numel())


def _pull_columns(link: Link, links: list[Link], Z_x: Tensor) -> None:
    """One batched back-propagation of all columns from the last layer's input to every stage."""
    edges = [one.h for one in links] + [one.x for one in links if one.x is not None]
    pulled = iter(_vjp(link.x, edges, Z_x if not link.stage.unbatched else Z_x[:, 0]))
    for one in links:
        one.stage.fresh_Z["Z_h"] = _batched(one.stage, next(pulled))
    for one in links:
        if one.x is not None:
            one.stage.fresh_Z["Z_x"] = _batched(one.stage, next(pulled))


def _segment_jacobians(link: Link, links: list[Link], columns: Tensor, samples: int) -> None:
    """Jacobians of each active stage's state by the h before it; the tail goes to the output."""
    upper, edge, batched = link.stage, link.x, link.stage.unbatched
    if not upper.plain:
        columns = _unit_columns(upper.x, samples)
    else:
        columns = _through_layer(upper, columns)
    for one in links:
        (J,) = _vjp(edge, [one.h], columns[:, 0] if batched else columns)
        one.stage.fresh_Z["J"] = _per_sample(_batched(one.stage, J), samples)
        edge, batched = one.x, one.stage.unbatched
        if edge is None:
            break
        columns = _unit_columns(one.stage.x, samples)


def _vjp(output: Any, inputs: Sequence[Any], columns: Tensor) -> tuple[Tensor, ...]:
    pulled = torch.autograd.grad(
        (output,), inputs, (columns,), retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    if any(p is None for p in pulled):
        raise UnsupportedModelError(
            "a layer's output does not reach the loss through the layers behind it; "
            "use value='moreau' or feedback=False"
        )
    return pulled


def _through_layer(stage: Stage, columns: Tensor) -> Tensor:
    """Columns at a stage's output to its input, by its rule or by autograd."""
    if stage.rule is not None:
        dtype = next(stage.module.parameters()).dtype  # autocast may run x in a narrower one
        pulled = stage.rule.pull(stage.module, stage.x.to(dtype), columns.to(dtype))
        return pulled.to(stage.x.dtype)
    columns = columns.to(stage.x.dtype)
    vjp: Any = torch.func.vjp(stage.module, stage.x)[1]
    back: Tensor = torch.func.vmap(lambda column: vjp(column)[0])(columns)
    return back


def _batched(stage: Stage, columns: Tensor) -> Tensor:
    return columns[:, None] if stage.unbatched else columns


def _unit_columns(like: Tensor, samples: int) -> Tensor:
    """Unit vectors of a sample's elements, the same for all samples: (X, *shape)."""
    elements = like.numel() // samples
    unit = torch.eye(elements, dtype=like.dtype, device=like.device)
    return unit[:, None].expand(-1, samples, -1).reshape(elements, *like.shape)


def _per_sample(columns: Tensor, samples: int) -> Tensor:
    """(k, n, ..) to (B, k, elements)."""
    return columns.reshape(columns.shape[0], samples, -1).transpose(0, 1)


@dataclass(eq=False)
class Layer:
    """One layer over all passes of a step; satisfies `value.base.Maps`.

    Attributes:
        name: Module path.
        module: The layer.
        rule: Its linear maps.
        blocks: Its stages, one a pass.
        counts: Samples of each pass.
        params: Its parameters that are optimised.
        factor: The value function uses Z, not g, as its columns of the state.
        gain: P = r eta / (1 - momentum) M^-1 by parameter.
        policy: Set by the backward pass.
        keep_gain: The gain is needed after the backward pass, too; it is as large as the weights.
        couple: Computes rho.
        sketch: Generator of sketched Gram matrices; None for exact ones.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    blocks: list[Stage]
    counts: list[int]
    params: dict[str, nn.Parameter]
    factor: bool
    couple: Callable[[Layer, Tensor], Tensor]
    sketch: torch.Generator | None = None
    gain: dict[str, Gain] = field(default_factory=dict)
    policy: Policy | None = None
    keep_gain: bool = True

    def __post_init__(self) -> None:
        """All products are made in the layer's own dtype, whatever autocast recorded.

        Half-precision layers use float32: squared norms of gradients leave their range.
        """
        self.own_dtype = next(self.module.parameters()).dtype
        narrow = self.own_dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if narrow else self.own_dtype

    def _columns(self, stage: Stage) -> Tensor:
        assert stage.G is not None
        G = stage.G.to(self.dtype)[None]
        return G if stage.Z_h is None else torch.cat([G, stage.Z_h.to(self.dtype)])

    def gram(self) -> Tensor:
        """eta (g, Z)_u^T M^-1 (g, Z)_u."""
        return torch.cat(
            [
                self.rule.gram(
                    self.module, s.x.to(self.dtype), self._columns(s), self.gain, n, self.sketch
                )
                for s, n in zip(self.blocks, self.counts, strict=True)
            ]
        )

    def h_gram(self) -> Tensor:
        """Inner products of the columns in h-space."""
        flat = [
            _per_sample(self._columns(s), n) for s, n in zip(self.blocks, self.counts, strict=True)
        ]
        return torch.cat([v @ v.transpose(-1, -2) for v in flat])

    def project(self, dx: Blocks) -> Tensor:
        """Z_x . dx, or g_x . dx."""
        parts = []
        for stage, change, samples in zip(self.blocks, dx, self.counts, strict=True):
            if self.factor:
                assert stage.Z_x is not None
                columns = _per_sample(stage.Z_x.to(self.dtype), samples)
            else:
                assert stage.g_x is not None
                columns = _per_sample(stage.g_x.to(self.dtype)[None], samples)
            change = change.to(self.dtype).reshape(samples, -1, 1)
            parts.append((columns @ change)[..., 0])
        return torch.cat(parts)

    def combine(self, a: Tensor | None, b: Tensor | None) -> Blocks:
        """a g + Z b."""
        out = []
        at = 0
        for stage, samples in zip(self.blocks, self.counts, strict=True):
            assert stage.G is not None
            rows = slice(at, at + samples)
            shape = (samples, -1)
            v = stage.G.new_zeros(stage.G.shape, dtype=self.dtype).reshape(shape)
            if a is not None:
                v = stage.G.to(self.dtype).reshape(shape) * a[rows, None].to(self.dtype)
            if b is not None:
                assert stage.Z_h is not None
                columns = _per_sample(stage.Z_h.to(self.dtype), samples)
                v = v + torch.einsum("brh,br->bh", columns, b[rows].to(self.dtype))
            out.append(v.reshape(stage.G.shape))
            at += samples
        return out

    def coupling(self, weight: Tensor) -> Tensor:
        """rho."""
        return self.couple(self, weight)

    def gradient(self) -> Tensor:
        """(B, H)."""
        return torch.cat([self._G(s).reshape(n, -1) for s, n in self._pairs()])

    def curvature(self) -> Tensor:
        """D, the Gram matrix of all unit vectors of h-space."""
        return torch.cat(
            [
                self.rule.gram(
                    self.module, s.x.to(self.dtype), _unit_columns(self._G(s), n), self.gain, n
                )
                for s, n in self._pairs()
            ]
        )

    def push(self, dx: Blocks) -> Tensor:
        """g_x dx."""
        return torch.cat(
            [
                self.rule.linear(self.module, change.to(self.own_dtype)).reshape(n, -1)
                for change, n in zip(dx, self.counts, strict=True)
            ]
        ).to(self.dtype)

    def pull(self, V: Tensor) -> Tensor:
        """g_x^T V for (B, H, k)."""
        parts, at = [], 0
        for stage, samples in self._pairs():
            columns = V[at : at + samples].permute(2, 0, 1)
            columns = columns.reshape(-1, *self._G(stage).shape)
            x, columns = stage.x.to(self.own_dtype), columns.to(self.own_dtype)
            pulled = self.rule.pull(self.module, x, columns).to(self.dtype)
            parts.append(_per_sample(pulled, samples).transpose(1, 2))
            at += samples
        return torch.cat(parts)

    def through(self, V: Tensor) -> Tensor:
        """J^T V for (B, X', k)."""
        J = torch.cat([s.J.to(self.dtype) for s in self.blocks if s.J is not None])
        return J.transpose(1, 2) @ V.to(self.dtype)

    def split(self, v: Tensor) -> Blocks:
        """(B, H) to one tensor for each pass."""
        shapes = [self._G(s).shape for s in self.blocks]
        parts = torch.split(v, self.counts)
        return [p.reshape(shape) for p, shape in zip(parts, shapes, strict=True)]

    def weighted(self, vectors: Blocks) -> dict[str, Tensor]:
        """The weight gradient sum_i g_u^T v_i over all passes."""
        total: dict[str, Tensor] = {}
        for stage, v in zip(self.blocks, vectors, strict=True):
            one = self.rule.gradient(self.module, stage.x.to(self.dtype), v.to(self.dtype))
            total = {k: total[k] + g if k in total else g for k, g in one.items()}
        return {k: g.to(self.own_dtype) for k, g in total.items()}

    def squares(self, vectors: Blocks) -> dict[str, Tensor]:
        """Sum over samples of the squared per-sample gradients of given h-space vectors."""
        total: dict[str, Tensor] = {}
        for stage, n, v in zip(self.blocks, self.counts, vectors, strict=True):
            x = stage.x.to(self.dtype)
            one = self.rule.squares(self.module, x, v.to(self.dtype), n)
            total = {k: total[k] + g if k in total else g for k, g in one.items()}
        return total

    def plain_vectors(self) -> Blocks:
        """g itself."""
        return [self._G(s) for s in self.blocks]

    def _G(self, stage: Stage) -> Tensor:
        assert stage.G is not None
        return stage.G.to(self.dtype)

    def _pairs(self) -> list[tuple[Stage, int]]:
        return list(zip(self.blocks, self.counts, strict=True))


def backward(
    layers: Mapping[str, Layer],
    recursion: Recursion,
    feed: Callable[[Layer, Blocks | None], None],
    statistics: str,
) -> None:
    """Algorithm 3, step 3: from the output to the input, set every layer's gain and policy.

    Args:
        layers: Layers in execution order.
        recursion: The value function at the output.
        feed: Updates a layer's M with V_h - g (None: with the plain gradient) and sets its gain.
        statistics: "value" or "plain".
    """
    for index, layer in reversed(list(enumerate(layers.values()))):
        correction = recursion.correction(layer) if statistics == "value" else None
        feed(layer, correction)
        layer.policy = recursion.back(layer, bottom=index == 0)
        if not layer.keep_gain:
            layer.gain = {}
