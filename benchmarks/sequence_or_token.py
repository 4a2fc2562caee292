# SPDX-License-Identifier: MIT
"""Which is the better sample of a language model: `python benchmarks/sequence_or_token.py`.

The loss over positions is a sum of the tokens' losses. A model that does not mix positions can be
fed (B, T, ..) inputs, where a sequence is a sample, or the same tokens as (B T, ..) rows, where a
token is: the plain gradients are equal, the samples' coefficients are not. The model reads the
three tokens before each and is trained on text from a random Markov source; reported is the
cross-entropy on fresh text after the last step, mean (worst) over the seeds.
"""

from __future__ import annotations

import math
import warnings
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt

WORDS, ORDER, BATCH, LENGTH, PARALLEL = 32, 3, 8, 32, 64
METHODS = ("SGD", "SGD, clip 1", "sequence", "token", "sequence, open loop", "token, open loop")


def text(length: int, seed: int) -> Tensor:
    """(64, length) words; the source is always the same."""
    source = torch.Generator().manual_seed(0)
    torch.randn(WORDS, WORDS, generator=source)
    tables = [torch.randn(WORDS, WORDS, generator=source) * s for s in (2.0, 1.5, 1.0)]
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randint(WORDS, (PARALLEL, length + ORDER), generator=generator)
    for t in range(ORDER, x.shape[1]):
        scores = torch.stack([tables[k][x[:, t - 1 - k]] for k in range(ORDER)]).sum(0)
        x[:, t] = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    return x


def examples(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, 3) contexts and (B, T) words that follow them."""
    return x.unfold(1, ORDER, 1)[:, :-1], x[:, ORDER:]


class Model(nn.Module):
    """Scores of the next word, position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.first, self.second = nn.Linear(16 * ORDER, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        """(.., 3) contexts to (.., words)."""
        h = torch.tanh(self.first(self.embedding(x).flatten(-2)))
        scores: Tensor = self.head(torch.tanh(self.second(h)))
        return scores


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over all tokens."""
    return F.cross_entropy(model(x).reshape(-1, WORDS), y.reshape(-1))


def trained(method: str, lr: float, seed: int, steps: int, test: Tensor) -> float:
    """Cross-entropy on the test text after training; NaN where the loss overflowed."""
    torch.manual_seed(seed)
    model, data = Model(), text(600, seed)
    opt: torch.optim.Optimizer
    if method.startswith("SGD"):
        opt = torch.optim.SGD(model.parameters(), lr=lr)
    else:
        opt = DDPNOpt(model, lr=lr, feedback="open_loop" if "open" in method else True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(PARALLEL, (BATCH,), generator=generator).tolist()
        last = data.shape[1] - LENGTH - ORDER
        starts = torch.randint(last, (BATCH,), generator=generator).tolist()
        chosen = zip(rows, starts, strict=True)
        x, y = examples(torch.stack([data[i, j : j + LENGTH + ORDER] for i, j in chosen]))
        if method.startswith("token"):
            x, y = x.reshape(-1, ORDER), y.reshape(-1)
        opt.zero_grad()
        loss = loss_of(model, x, y)
        if not bool(loss.isfinite()):
            return math.nan
        loss.backward()
        if method.endswith("clip 1"):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    with torch.no_grad():
        return float(loss_of(model, *examples(test)))


def main(
    lrs: Annotated[list[float] | None, typer.Option("--lr", help="Learning rates.")] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps.")] = 250,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rates = lrs or [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    test = text(100, 999)
    table = Table("sample", *(f"{lr:g}" for lr in rates))
    for method in METHODS:
        cells = []
        for lr in rates:
            losses = [trained(method, lr, seed, steps, test) for seed in range(seeds)]
            cells.append(f"{sum(losses) / seeds:.3f} ({max(losses):.3f})")
        table.add_row(method, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
