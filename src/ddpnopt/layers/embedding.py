# SPDX-License-Identifier: MIT
"""Embeddings: the weight's rows that a sample looks up, and no others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.registry import register
from ddpnopt.positions import Gain, Kronecker, diagonal
from ddpnopt.typing import Tensor

#: Marks a place of a padded bag where nothing is looked up.
EMPTY = -1


class LookupRule(LayerRule, ABC):
    """A sample's gradient is sparse: v[t] is added to row index[t] for each of its positions t."""

    parameters: tuple[str, ...] = ("weight",)
    holds_weight = True

    @abstractmethod
    def places(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Rows looked up (b, t), EMPTY for none, and what is added there (r, b, t, d)."""

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """Indices don't move."""
        return torch.zeros_like(self.function(module, x))

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """Nor have they a gradient."""
        return V.new_zeros(V.shape[0], *x.shape)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """The rows' sums over the batch."""
        index, v = self.places(module, x, V[None], 1)
        return {"weight": self._scattered(module, index, v[0])}

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Sum over pairs of positions that look up the same row."""
        if "weight" not in gain:
            return V.new_zeros(samples, V.shape[0], V.shape[0])
        P = gain["weight"]
        assert not isinstance(P, Kronecker)
        index, v = self.places(module, x, V, samples)
        together = self._same(index, v.dtype) @ v
        weighted = v * (P[index.clamp(min=0)] if diagonal(P) else P)
        return torch.einsum("rbtd,sbtd->brs", weighted, together)

    def along(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        change: Mapping[str, Tensor],
        samples: int,
    ) -> Tensor:
        """What the looked-up rows change."""
        if "weight" not in change:
            return V.new_zeros(samples, V.shape[0])
        index, v = self.places(module, x, V, samples)
        moved = change["weight"][index.clamp(min=0)] * (index != EMPTY)[..., None]
        return torch.einsum("btd,rbtd->br", moved, v)

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """Each row's sum within a sample squared, once."""
        index, v = self.places(module, x, V[None], samples)
        same = self._same(index, v.dtype)
        count = same.sum(-1).clamp(min=1)
        return {"weight": self._scattered(module, index, (same @ v[0]).square() / count[..., None])}

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """Dense, for inspection only."""
        index, v = self.places(module, x, V, samples)
        rows, width = cast(nn.Embedding, module).weight.shape
        G = v.new_zeros(v.shape[0], samples, rows, width)
        at = index.clamp(min=0)[None, ..., None].expand_as(v)
        return {"weight": G.scatter_add(2, at, v * (index >= 0)[None, ..., None])}

    @staticmethod
    def _same(index: Tensor, dtype: torch.dtype) -> Tensor:
        equal = (index[:, :, None] == index[:, None, :]) & (index >= 0)[:, None, :]
        return equal.to(dtype)

    @staticmethod
    def _scattered(module: nn.Module, index: Tensor, v: Tensor) -> Tensor:
        weight = cast(nn.Embedding, module).weight
        total = v.new_zeros(weight.shape)
        known = v * (index >= 0)[..., None]
        return total.index_add_(0, index.clamp(min=0).flatten(), known.flatten(0, -2))


@register(nn.Embedding)
class EmbeddingRule(LookupRule):
    """Any number of positions a sample; the padding index has no gradient."""

    positionwise = True

    def refusal(self, module: nn.Module) -> str:
        """Options that change weights in the forward pass, or mix samples."""
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None:
            return "Embedding(max_norm=...) changes its weights in the forward pass"
        if embedding.scale_grad_by_freq:
            return "Embedding(scale_grad_by_freq=True) depends on the other samples"
        return "Embedding(sparse=True) has sparse gradients" if embedding.sparse else ""

    def batched_dim(self, module: nn.Module) -> int:
        """(B,) or (B, T, ...)."""
        return 1

    def places(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """The indices themselves."""
        index = x.reshape(samples, -1)
        padding = cast(nn.Embedding, module).padding_idx
        if padding is not None:
            index = torch.where(index == padding, EMPTY, index)
        return index, V.reshape(V.shape[0], samples, -1, V.shape[-1])


@register(nn.EmbeddingBag)
class EmbeddingBagRule(LookupRule):
    """Sums and means of bags, given as rows or by offsets; the state is padded to rows."""

    arguments = (1, 2)

    def refusal(self, module: nn.Module) -> str:
        """Options that are not sums or means of rows of unchanging weights."""
        bag = cast(nn.EmbeddingBag, module)
        if bag.max_norm is not None:
            return "EmbeddingBag(max_norm=...) changes its weights in the forward pass"
        if bag.scale_grad_by_freq:
            return "EmbeddingBag(scale_grad_by_freq=True) depends on the other samples"
        if bag.mode == "max":
            return "EmbeddingBag(mode='max') is not linear in its weights"
        return "EmbeddingBag(sparse=True) has sparse gradients" if bag.sparse else ""

    def call_refusal(self, module: nn.Module, given: Sequence[object]) -> str:
        """A second tensor is offsets, or the weights of the places, which the state can't hold."""
        weighted = any(isinstance(t, Tensor) and t.is_floating_point() for t in given[1:])
        return "EmbeddingBag(per_sample_weights=...) has no rule" if weighted else ""

    def batched_dim(self, module: nn.Module) -> int:
        """(B, L)."""
        return 2

    def pack(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Bags as rows (B, L), EMPTY where a bag is shorter."""
        if len(inputs) == 1:
            return inputs[0]
        index, offsets = inputs
        if cast(nn.EmbeddingBag, module).include_last_offset:
            offsets = offsets[:-1]
        ends = torch.cat([offsets[1:], offsets.new_tensor([index.numel()])])
        length = int((ends - offsets).max()) if offsets.numel() else 0
        at = offsets[:, None] + torch.arange(max(length, 1), device=index.device)
        inside = at < ends[:, None]
        if not index.numel():
            return torch.full_like(at, EMPTY)
        return torch.where(inside, index[at.clamp(max=index.numel() - 1)], EMPTY)

    def function(self, module: nn.Module, x: Tensor) -> Tensor:
        """Sum or mean of the rows looked up."""
        weight = cast(nn.EmbeddingBag, module).weight
        share = self._share(module, x, weight.dtype)
        return (weight[x.clamp(min=0)] * share[..., None]).sum(-2)

    def places(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Each place of a bag gets the bag's v, or its share of it."""
        share = self._share(module, x, V.dtype)
        v = V[:, :, None, :] * share[..., None]
        padding = cast(nn.EmbeddingBag, module).padding_idx
        index = x if padding is None else torch.where(x == padding, EMPTY, x)
        return index.reshape(samples, -1), v.reshape(V.shape[0], samples, -1, V.shape[-1])

    def _share(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, L) 0 where nothing is looked up, else 1, or 1 over the bag's size."""
        bag = cast(nn.EmbeddingBag, module)
        inside = x >= 0
        if bag.padding_idx is not None:
            inside = inside & (x != bag.padding_idx)
        share = inside.to(dtype)
        return share / share.sum(-1, keepdim=True).clamp(min=1) if bag.mode == "mean" else share
