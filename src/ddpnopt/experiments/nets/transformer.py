# SPDX-License-Identifier: MIT
"""A small transformer: its blocks, and an encoder that classifies images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Self-attention of two dense layers around torch's `scaled_dot_product_attention`.

    Args:
        width: Features of a token.
        heads: Attention heads.
        causal: A token sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.queries_keys_values(x).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and two dense layers, each added to its input.

    Args:
        width: Features of a token.
        heads: Attention heads.
        own: `SelfAttention` rather than `nn.MultiheadAttention`.
        causal: A token sees only itself and those before it; with `own` alone.
    """

    def __init__(self, width: int, heads: int = 2, own: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.before_attention, self.before_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention: nn.Module = (
            SelfAttention(width, heads, causal)
            if own
            else nn.MultiheadAttention(width, heads, batch_first=True)
        )
        self.own = own
        self.dense = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same shape."""
        y = self.before_attention(x)
        x = x + (self.attention(y) if self.own else self.attention(y, y, y, need_weights=False)[0])
        out: Tensor = x + self.dense(self.before_dense(x))
        return out


class Transformer(nn.Module):
    """An encoder that reads an image row by row, and classifies the mean of its tokens.

    Args:
        input_shape: (planes, height, width) of one sample.
        classes: Number of outputs.
        width: Features of a token.
        blocks: Number of blocks.
        own: See `TransformerBlock`.

    Raises:
        ValueError: The input is not an image.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        width: int = 32,
        blocks: int = 2,
        own: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"transformer needs images, got shape {input_shape}")
        planes, height, columns = input_shape
        self.embed = nn.Linear(planes * columns, width)
        self.position = nn.Embedding(height, width)
        self.blocks = nn.Sequential(*[TransformerBlock(width, own=own) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, height, width) -> (B, classes)."""
        rows = x.transpose(1, 2).flatten(2)
        places = torch.arange(rows.shape[1], device=x.device).expand(rows.shape[:2])
        tokens = self.embed(rows) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
