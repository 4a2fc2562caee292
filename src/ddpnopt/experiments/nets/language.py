# SPDX-License-Identifier: MIT
"""Networks for text: a language model in the style of GPT-2, and one that classifies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpnopt.experiments.nets.transformer import TransformerBlock


class LanguageModel(nn.Module):
    """Embeddings of tokens and places, causal pre-norm blocks, and the embedding as the head.

    Args:
        vocabulary: Number of tokens V.
        length: Longest sequence T.
        width: Features of a token.
        blocks: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self, vocabulary: int, length: int, width: int = 32, blocks: int = 2, heads: int = 2
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *[TransformerBlock(width, heads, own=True, causal=True) for _ in range(blocks)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        # As a head, the embedding's default deviation 1 would begin with huge logits.
        for table in (self.embed, self.position):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), int64 -> logits of the next ones (B, T, V)."""
        # One row of places for every sample: each then has its own gradient there.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.embed(tokens) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class TextClassifier(nn.Module):
    """Embeddings of tokens and places, pre-norm blocks, and a dense layer on their mean.

    Args:
        vocabulary: Number of tokens V.
        length: Length T of a sequence.
        classes: Number of outputs.
        width: Features of a token.
        blocks: Number of blocks.
    """

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int = 32, blocks: int = 1
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[TransformerBlock(width, own=True) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), int64 -> (B, classes)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.embed(tokens) + self.position(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits
