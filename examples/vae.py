# SPDX-License-Identifier: MIT
"""A variational autoencoder: a sampled layer inside the net, and a loss of two terms."""

import torch

from ddpnopt import DDPNOpt
from ddpnopt.experiments.nets import VAE, negative_elbo
from ddpnopt.experiments.tasks import binary_digits

torch.manual_seed(0)
x = binary_digits(count=1200, seed=0).x

# --8<-- [start:loop]
model = VAE(pixels=64, width=64, latent=8)
opt = DDPNOpt(model, lr=0.05)  # was: torch.optim.SGD(model.parameters(), lr=0.05)

for epoch in range(4):
    losses = []
    for batch in torch.randperm(len(x)).split(32):
        opt.zero_grad()
        # Cross-entropy of the pixels plus the code's divergence from N(0, 1).
        loss = negative_elbo(model(x[batch]), x[batch])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: mean loss {sum(losses) / len(losses):.2f} nats")
# --8<-- [end:loop]

print("terminal cost:", opt.last_step.terminal)
