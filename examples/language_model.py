# SPDX-License-Identifier: MIT
"""A small language model in the style of GPT-2 on generated text, AdamW with feedback around it."""

import torch
from torch import nn

from ddpnopt import Feedback
from ddpnopt.experiments.nets import LanguageModel
from ddpnopt.experiments.tasks import ALPHABET, encode, grammar

torch.manual_seed(0)
text = grammar(count=1280, seed=0)  # sequences of 32 characters

# --8<-- [start:loop]
model = LanguageModel(vocabulary=len(ALPHABET), length=32, width=32, blocks=2)
opt = torch.optim.AdamW(model.parameters(), lr=0.003)
Feedback(model, opt, feedback="open_loop")  # the added line

for epoch in range(2):
    losses = []
    for batch in torch.randperm(len(text.x)).split(16):
        opt.zero_grad()
        logits = model(text.x[batch])  # (B, T, V); a sample is a whole sequence
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.y[batch].flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: first loss {losses[0]:.3f}, last {losses[-1]:.3f}")
# --8<-- [end:loop]

line = "the quiet "
for _ in range(60):
    with torch.no_grad():
        line += ALPHABET[int(model(encode(line[-32:])[None])[0, -1].argmax())]
print(line)
