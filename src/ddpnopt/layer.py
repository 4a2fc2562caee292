# SPDX-License-Identifier: MIT
"""One layer over all passes of a step: the products that the recursion asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ddpnopt.changes import Changed
from ddpnopt.crossing import Predicted
from ddpnopt.cuts import Cut
from ddpnopt.grams import gram_of, lengths_of
from ddpnopt.layers import LayerRule, MatrixRule, tied
from ddpnopt.layers.base import Kept
from ddpnopt.layers.coordinates import Coordinates, Rotated
from ddpnopt.linearise import cast_state, flat, per_sample
from ddpnopt.matrices import Matrices
from ddpnopt.parameters import parameters
from ddpnopt.positions import Gain, Kronecker, diagonal
from ddpnopt.stages import Stage
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks, Coupling, Policy
from ddpnopt.weighted import Weighted


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
        strength: The factor on S that suits the curvature.
        kept: The samples' own gradients by pass, where the Gram products formed them.
        coordinates: By pass, under a Kronecker-factored curvature, where that saves work.
        rotated: By pass, what has been formed to measure such a curvature and will be asked for.
        besides: What p.grad holds besides the plain gradient, once compared.
        segments: Its time steps of each pass cut at its layers, for second-order dynamics.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    blocks: list[Stage]
    counts: list[int]
    params: dict[str, nn.Parameter]
    factor: bool
    couple: Callable[[Layer, Tensor], Coupling]
    sketch: torch.Generator | None = None
    strength: float = 1.0
    segments: list[Cut] = field(default_factory=list)
    gain: dict[str, Gain] = field(default_factory=dict)
    policy: Policy | None = None
    keep_gain: bool = True
    kept: dict[Stage, Kept] = field(default_factory=dict)
    coordinates: dict[Stage, Coordinates] = field(default_factory=dict)
    rotated: dict[Stage, Rotated] = field(default_factory=dict)
    besides: tuple[Tensor | None] | None = None

    def __post_init__(self) -> None:
        """All products are made in the layer's own dtype, whatever autocast recorded.

        Half-precision layers use float32: squared norms of gradients leave their range.
        """
        self.own_dtype = parameters(self.module)[0].dtype
        narrow = self.own_dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if narrow else self.own_dtype

    def columns(self, stage: Stage) -> Tensor:
        """A pass's columns [g, Z] in h-space."""
        assert stage.G is not None
        G = self.G(stage)[None]
        return G if stage.Z_h is None else torch.cat([G, stage.Z_h.to(self.dtype)])

    def gram(self) -> Tensor:
        """eta (g, Z)_u^T M^-1 (g, Z)_u."""
        if all(stage.Z_h is None for stage in self.blocks):
            return self.lengths()[:, None, None]
        return _whole([gram_of(self, stage, samples) for stage, samples in self.pairs()])

    def lengths(self) -> Tensor:
        """eta g_u^T M^-1 g_u; what it had to form is kept for the feedback."""
        return _whole([lengths_of(self, stage, samples) for stage, samples in self.pairs()])

    def h_gram(self) -> Tensor:
        """Inner products of the columns in h-space."""
        flat = [
            per_sample(self.columns(s), n) for s, n in zip(self.blocks, self.counts, strict=True)
        ]
        return torch.cat([v @ v.transpose(-1, -2) for v in flat])

    def project(self, dx: Blocks) -> Tensor:
        """Z_x . dx, or g_x . dx."""
        if isinstance(dx, Predicted):
            return torch.cat(list(dx.q)).to(self.dtype)
        if not self.factor and isinstance(dx, Changed):
            given = [one.g_x for one in self.blocks if one.g_x is not None]
            assert len(given) == len(self.blocks)
            return _whole(
                [
                    dx.along(index, g_x, samples, self.dtype)
                    for index, (g_x, samples) in enumerate(zip(given, self.counts, strict=True))
                ]
            )
        parts = []
        for stage, change, samples in zip(self.blocks, dx, self.counts, strict=True):
            found = stage.Z_x if self.factor else stage.g_x
            assert found is not None
            columns = per_sample((found if self.factor else found[None]).to(self.dtype), samples)
            change = cast_state(change, self.dtype).reshape(samples, -1)
            parts.append((columns @ change[..., None])[..., 0])
        return _whole(parts)

    def combine(self, a: Tensor | None, b: Tensor | None) -> Blocks:
        """a g + Z b."""
        if b is None and a is not None:
            return Weighted([self.G(s) for s in self.blocks], a, self.counts)
        out = []
        at = 0
        for stage, samples in zip(self.blocks, self.counts, strict=True):
            assert stage.G is not None
            rows = slice(at, at + samples)
            G = flat(self.G(stage), samples)
            v = None if a is None else G * cast_state(a[rows, None], self.dtype)
            if b is not None:
                assert stage.Z_h is not None
                columns = per_sample(stage.Z_h.to(self.dtype), samples)
                along = torch.einsum("brh,br->bh", columns, b[rows].to(self.dtype))
                v = along if v is None else v + along
            v = torch.zeros_like(G) if v is None else v
            out.append(v if v.shape == stage.G.shape else v.reshape(stage.G.shape))
            at += samples
        return out

    def coupling(self, weight: Tensor) -> Coupling:
        """What gives rho."""
        return self.couple(self, weight)

    def gradient(self) -> Tensor:
        """(B, H)."""
        return _whole([self.G(s).reshape(n, -1) for s, n in self.pairs()])

    def curvature(self) -> Tensor:
        """D, the Gram matrix of all unit vectors of h-space."""
        return _whole(
            [
                self.rule.curvature(self.module, self.x(s), self.G(s), self.gain, n)
                for s, n in self.pairs()
            ]
        )

    def push(self, dx: Blocks) -> Tensor:
        """g_x dx."""
        return _whole(
            [
                self.rule.push(
                    self.module, cast_state(s.x, self.own_dtype), change.to(self.own_dtype)
                ).reshape(n, -1)
                for (s, n), change in zip(self.pairs(), dx, strict=True)
            ]
        ).to(self.dtype)

    def pull(self, V: Tensor) -> Tensor:
        """g_x^T V for (B, H, k)."""
        parts, at = [], 0
        for stage, samples in self.pairs():
            columns = (V if samples == len(V) else V[at : at + samples]).permute(2, 0, 1)
            columns = columns.reshape(-1, *self.G(stage).shape)
            x, columns = (cast_state(one, self.own_dtype) for one in (stage.x, columns))
            pulled = cast_state(self.rule.pull(self.module, x, columns), self.dtype)
            parts.append(per_sample(pulled, samples).transpose(1, 2))
            at += samples
        return _whole(parts)

    def through(self, V: Tensor) -> Tensor:
        """J^T V for (B, X', k)."""
        parts = [cast_state(s.J, self.dtype) for s in self.blocks if s.J is not None]
        J = _whole(parts)
        return torch.bmm(J.mT, cast_state(V, self.dtype))

    def split(self, v: Tensor) -> Blocks:
        """(B, H) to one tensor for each pass."""
        if len(self.blocks) == 1:
            return [v.reshape(self.G(self.blocks[0]).shape)]
        parts = torch.split(v, self.counts)
        return [p.reshape(self.G(s).shape) for p, s in zip(parts, self.blocks, strict=True)]

    @property
    def matrices(self) -> Matrices:
        """The same maps as explicit matrices."""
        return Matrices(self)

    def bent(self, vectors: Blocks, dx: Blocks) -> dict[str, Tensor]:
        """(V . g_ux) dx summed over all passes, by parameter."""
        total: dict[str, Tensor] = {}
        for stage, v, change in zip(self.blocks, vectors, dx, strict=True):
            change = change.to(self.dtype)
            one = self.rule.mixed(self.module, self.x(stage), change, v.to(self.dtype))
            total = {k: total[k] + g if k in total else g for k, g in one.items()}
        return {k: g.to(self.own_dtype) for k, g in total.items()}

    def weighted(self, vectors: Blocks) -> dict[str, Tensor]:
        """The weight gradient sum_i g_u^T v_i over all passes."""
        if isinstance(vectors, Weighted) and len(self.kept) == len(self.blocks):
            zero = {name: torch.zeros_like(p) for name, p in self.params.items()}
            return self.onto(zero, vectors, 1.0)
        total: dict[str, Tensor] = {}
        for stage, v in zip(self.blocks, vectors, strict=True):
            one = self.rule.gradient(self.module, self.x(stage), v.to(self.dtype))
            total = {k: total[k] + g if k in total else g for k, g in one.items()}
        return {k: g.to(self.own_dtype) for k, g in total.items()}

    def onto(
        self, gradients: Mapping[str, Tensor], vectors: Blocks, scale: float
    ) -> dict[str, Tensor]:
        """gradients + scale sum_i g_u^T v_i, by parameter."""
        if isinstance(vectors, Weighted) and len(self.kept) == len(self.blocks):
            found = dict(gradients)
            for stage, a in zip(self.blocks, torch.split(vectors.a, self.counts), strict=True):
                found = self.kept[stage].onto(found, a.to(self.dtype), scale)
            return {name: g.to(self.own_dtype) for name, g in found.items()}
        if len(self.blocks) == 1 and self.dtype == self.own_dtype:
            x, v = self.x(self.blocks[0]), cast_state(vectors[0], self.dtype)
            return self.rule.onto(self.module, x, v, gradients, scale)
        total = self.weighted(vectors)
        return {name: g.add(total[name], alpha=scale) for name, g in gradients.items()}

    def adds(self, vectors: Blocks) -> bool:
        """Whether `add` needs no memory of the parameters' size."""
        kept = isinstance(vectors, Weighted) and len(self.kept) == len(self.blocks)
        alone = len(self.blocks) == 1 and self.dtype == self.own_dtype
        return self.rule.adds_in_place and alone and not kept

    def add(self, vectors: Blocks, scale: float) -> None:
        """u <- u + scale sum_i g_u^T v_i, of one pass."""
        x, v = self.x(self.blocks[0]), cast_state(vectors[0], self.dtype)
        self.rule.add(self.module, x, v, self.params, scale)

    def predicted(self, stage: Stage, samples: int, change: Mapping[str, Tensor]) -> Tensor:
        """What a change of the parameters does in one execution, g_u . du; (B, r) with a factor.

        Args:
            stage: An execution that still comes.
            samples: B.
            change: By parameter.
        """
        if stage.module is not self.module:  # tied to it
            rule, module, x, G, Z_h = tied.tied([stage], samples)
            columns = Z_h if self.factor and Z_h is not None else G[None]
            return rule.along(
                module, x, columns, {n: du.to(x.dtype) for n, du in change.items()}, samples
            ).to(self.dtype)
        assert stage.G is not None
        columns = stage.Z_h if self.factor and stage.Z_h is not None else stage.G[None]
        moved = {name: du.to(self.dtype) for name, du in change.items()}
        return self.rule.along(self.module, self.x(stage), columns.to(self.dtype), moved, samples)

    def squares(self, vectors: Blocks) -> dict[str, Tensor]:
        """Sum over samples of the squared per-sample gradients of given h-space vectors."""
        total: dict[str, Tensor] = {}
        for stage, n, v in zip(self.blocks, self.counts, vectors, strict=True):
            x = self.x(stage)
            one = self.rule.squares(self.module, x, v.to(self.dtype), n)
            total = {k: total[k] + g if k in total else g for k, g in one.items()}
        return total

    def plain_vectors(self) -> Blocks:
        """g itself."""
        return [self.G(s) for s in self.blocks]

    def applied(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P d by parameter."""
        found = {}
        for name, P in self.gain.items():
            if isinstance(P, Kronecker):
                assert isinstance(self.rule, MatrixRule)
                D = self.rule.joined(self.module, gradients, P.bias)
                found.update(self.rule.parted(self.module, P(D), P.bias))
            else:
                found[name] = gradients[name] * P
        return found

    def length(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """d^T P d over the layer's parameters."""
        parts = []
        for name, P in self.gain.items():
            if isinstance(P, Kronecker):
                assert isinstance(self.rule, MatrixRule)
                parts.append(P.square(self.rule.joined(self.module, gradients, P.bias)))
            else:
                g = gradients[name].to(self.dtype).flatten()
                scaled = g * P.to(self.dtype).flatten() if diagonal(P) else None
                parts.append(g.dot(g) * P if scaled is None else g.dot(scaled))
        return torch.stack(parts).sum()

    def x(self, stage: Stage) -> Tensor:
        """A pass's state."""
        return cast_state(stage.x, self.dtype)

    def G(self, stage: Stage) -> Tensor:
        """A pass's gradient in h-space."""
        assert stage.G is not None
        return cast_state(stage.G, self.dtype)

    def pairs(self) -> list[tuple[Stage, int]]:
        """Each pass with its number of samples."""
        if len(self.blocks) == 1:
            return [(self.blocks[0], self.counts[0])]
        return list(zip(self.blocks, self.counts, strict=True))


def _whole(parts: list[Tensor]) -> Tensor:
    """All passes' rows, which need no copy where there is one pass."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
