# SPDX-License-Identifier: MIT
"""Attention and encoder layers of torch, and the same nets by dense layers and plain functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracles.graph_parts import linear, norm

#: Width, and heads.
D, HEADS = 4, 2


def masked(mask: Tensor | None, padding: Tensor | None) -> Tensor | float:
    """Both masks as one that is added to the scores (B, heads, T, T)."""
    total: Tensor | float = 0.0 if mask is None else mask
    if padding is not None:
        hidden = torch.zeros_like(padding, dtype=torch.float64).masked_fill(padding, -torch.inf)
        total = total + hidden[:, None, None]
    return total


class Written(nn.Module):
    """Self-attention over (B, T, d): two dense layers, and functions.

    Args:
        like: Whose weights it copies.
        fused: Draw dropout where torch's fused attention draws it, not on the weights.
    """

    def __init__(self, like: nn.MultiheadAttention, fused: bool) -> None:
        super().__init__()
        bias = like.in_proj_bias is not None
        self.inward, self.outward = linear(D, 3 * D, bias), linear(D, D, bias)
        self.p, self.fused = like.dropout, fused
        with torch.no_grad():
            self.inward.weight.copy_(like.in_proj_weight)
            self.outward.weight.copy_(like.out_proj.weight)
            if bias:
                self.inward.bias.copy_(like.in_proj_bias)
                self.outward.bias.copy_(like.out_proj.bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """Softmax attention."""
        q, k, v = (self.split(part) for part in self.inward(x).chunk(3, -1))
        p = self.p if self.training else 0.0
        if self.fused and p:
            found = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        else:
            scores = q @ k.mT / (D // HEADS) ** 0.5 + masked(mask, padding)
            found = F.dropout(scores.softmax(-1), p) @ v
        return self.outward(found.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """(B, heads, T, d / heads)."""
        return x.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2)

    def pairs(self, other: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor]]:
        """The parameters beside those that they stand for."""
        found = [
            (self.inward.weight, other.in_proj_weight),
            (self.outward.weight, other.out_proj.weight),
            (self.inward.bias, other.in_proj_bias),
            (self.outward.bias, other.out_proj.bias),
        ]
        return [(mine, its) for mine, its in found if its is not None]


class Attention(nn.Module):
    """Attention on a skip between dense layers; by torch's module.

    Args:
        batch_first: Inputs are (B, T, 3), otherwise (T, B, 3).
        mask: Added to the scores.
        padding: (B, T), positions that are not looked at.
        call: More arguments of the attention's call.
        options: Of its constructor.
    """

    def __init__(
        self,
        batch_first: bool = True,
        mask: Tensor | None = None,
        padding: Tensor | None = None,
        call: dict[str, object] | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        self.batch_first, self.mask, self.padding = batch_first, mask, padding
        self.call = call or {}
        self.stem, self.feed, self.head = linear(3, D), linear(D, D), linear(D, 3)
        self.attention = nn.MultiheadAttention(
            D,
            HEADS,
            batch_first=batch_first,
            dtype=torch.float64,
            **options,  # type: ignore[arg-type]
        )
        with torch.no_grad():  # attention that says something
            self.attention.in_proj_weight.mul_(3)

    def attend(self, h: Tensor) -> Tensor:
        """The attention's output."""
        made: Tensor = self.attention(
            h, h, h, attn_mask=self.mask, key_padding_mask=self.padding, **self.call
        )[0]
        return made

    def forward(self, x: Tensor) -> Tensor:
        """The mean over positions, classified."""
        h = self.stem(x)
        h = h + self.attend(h)
        h = torch.tanh(h + torch.tanh(self.feed(h)))
        made: Tensor = self.head(h.mean(1 if self.batch_first else 0))
        return made


class ByHand(Attention):
    """The same by dense layers, always batch first."""

    def __init__(self, like: Attention, fused: bool = False) -> None:
        super().__init__(True, like.mask, like.padding)
        del self.attention
        rest = {k: v for k, v in like.state_dict().items() if not k.startswith("attention")}
        self.load_state_dict(rest)
        self.written = Written(like.attention, fused)

    def attend(self, h: Tensor) -> Tensor:
        """By hand."""
        made: Tensor = self.written(h, self.mask, self.padding)
        return made

    def pairs(self, other: Attention) -> list[tuple[Tensor, Tensor]]:
        """The parameters beside those that they stand for."""
        found = self.written.pairs(other.attention)
        for name in ("stem", "feed", "head"):
            mine, its = getattr(self, name), getattr(other, name)
            found += [(mine.weight, its.weight), (mine.bias, its.bias)]
        return found


class Encoder(nn.Module):
    """`nn.TransformerEncoder` of two layers between dense ones.

    Args:
        batch_first: Inputs are (B, T, 3), otherwise (T, B, 3).
        norm_first: Pre-norm.
        dropout: In every place.
        padding: (B, T), positions that are not looked at.
    """

    def __init__(
        self,
        batch_first: bool,
        norm_first: bool,
        dropout: float = 0.0,
        padding: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.batch_first, self.padding = batch_first, padding
        self.stem, self.head = linear(3, D), linear(D, 3)
        layer = nn.TransformerEncoderLayer(
            D, HEADS, 5, dropout, F.gelu, batch_first=batch_first, norm_first=norm_first
        )
        nested = not norm_first  # warned of otherwise
        self.encoder = nn.TransformerEncoder(layer.double(), 2, enable_nested_tensor=nested)
        with torch.no_grad():
            for one in self.encoder.layers:
                one.self_attn.in_proj_weight.mul_(3)
                for name in ("norm1", "norm2"):
                    setattr(one, name, norm(D))

    def forward(self, x: Tensor) -> Tensor:
        """The mean over positions, classified."""
        h = self.encoder(self.stem(x), src_key_padding_mask=self.padding)
        made: Tensor = self.head(torch.tanh(h).mean(1 if self.batch_first else 0))
        return made


class EncoderByHand(nn.Module):
    """The same by dense layers and LayerNorms, always batch first."""

    def __init__(self, like: Encoder, fused: bool = True) -> None:
        super().__init__()
        first = like.encoder.layers[0]
        self.norm_first, self.p, self.padding = first.norm_first, first.dropout.p, like.padding
        self.stem, self.head = linear(3, D), linear(D, 3)
        self.blocks = nn.ModuleList()
        for one in like.encoder.layers:
            parts = {"up": linear(D, 5), "down": linear(5, D), "one": norm(D), "two": norm(D)}
            self.blocks.append(nn.ModuleDict(parts))
            self.blocks[-1]["attention"] = Written(one.self_attn, fused)
        with torch.no_grad():
            for mine, its in self.pairs(like):
                mine.copy_(its)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout."""
        return F.dropout(x, self.p, self.training)

    def attend(self, block: nn.ModuleDict, h: Tensor) -> Tensor:
        """The attention's branch; torch draws its dropout with the positions in front."""
        found: Tensor = block["attention"](h, None, self.padding)
        if self.p and self.training:
            drawn = self.drop(torch.ones_like(found.transpose(0, 1).contiguous()))
            found = found * drawn.transpose(0, 1)
        return found

    def feed(self, block: nn.ModuleDict, h: Tensor) -> Tensor:
        """The other branch."""
        return self.drop(block["down"](self.drop(F.gelu(block["up"](h)))))

    def forward(self, x: Tensor) -> Tensor:
        """The mean over positions, classified."""
        h = self.stem(x)
        for block in self.blocks:
            one, two = block["one"], block["two"]
            if self.norm_first:
                h = h + self.attend(block, one(h))
                h = h + self.feed(block, two(h))
            else:
                h = one(h + self.attend(block, h))
                h = two(h + self.feed(block, h))
        made: Tensor = self.head(torch.tanh(h).mean(1))
        return made

    def pairs(self, other: Encoder) -> list[tuple[Tensor, Tensor]]:
        """The parameters beside those that they stand for."""
        found = [(self.stem, other.stem), (self.head, other.head)]
        attention = []
        for block, one in zip(self.blocks, other.encoder.layers, strict=True):
            found += [(block["up"], one.linear1), (block["down"], one.linear2)]
            found += [(block["one"], one.norm1), (block["two"], one.norm2)]
            attention += block["attention"].pairs(one.self_attn)
        return attention + [
            pair for a, b in found for pair in ((a.weight, b.weight), (a.bias, b.bias))
        ]
