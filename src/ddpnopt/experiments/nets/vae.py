# SPDX-License-Identifier: MIT
"""A small variational autoencoder (Kingma and Welling 2014): a sampled layer, a two-term loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Logits of the pixels (B, d), mean and log-variance of the code (B, latent).
Outputs = tuple[Tensor, Tensor, Tensor]


class VAE(nn.Module):
    """Dense encoder to a Gaussian code, dense decoder to the logits of binary pixels.

    In eval mode the code is its mean.

    Args:
        pixels: Features d of a sample.
        width: Units of both hidden layers.
        latent: Features of the code.
    """

    def __init__(self, pixels: int = 64, width: int = 64, latent: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> Outputs:
        """(B, pixels) -> logits, mean, log-variance."""
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.training:
            code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def negative_elbo(outputs: Outputs, x: Tensor) -> Tensor:
    """Negative evidence lower bound in nats, the mean over the batch.

    Args:
        outputs: Of a `VAE`.
        x: Its inputs (B, pixels), in [0, 1].

    Returns:
        Binary cross-entropy of the pixels plus KL divergence of the code from N(0, 1).
    """
    logits, mean, log_variance = outputs
    pixels = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()
    return (pixels + divergence) / len(x)
