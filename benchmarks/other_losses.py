# SPDX-License-Identifier: MIT
"""Losses other than a hard-label cross-entropy: `python benchmarks/other_losses.py`.

Binary cross-entropy one class against the others, soft targets (mixed-up images), smoothed labels
and squared error, each at every rate with the same budget. Good rates are those whose mean accuracy
is within 2 points of the best that any method reaches with that loss around that optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from joblib import Parallel, delayed
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, Feedback
from ddpnopt.experiments.bench.cases import dense_net
from ddpnopt.experiments.data import load
from rates import print_rates

CLASSES, BATCH = 10, 32
WIDTHS = (64, 32, 32, 32, 32, CLASSES)


@dataclass(frozen=True)
class Loss:
    """A loss of outputs and (N, classes) targets.

    Attributes:
        of: The loss.
        terminal: How it is named to the optimizer.
        rates: Factor on the rates: a mean over outputs, too, has gradients so much smaller.
        mixed: Images and targets are mixed in pairs.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    terminal: str = "auto"
    rates: float = 1.0
    mixed: bool = False


LOSSES = {
    "binary cross-entropy": Loss(F.binary_cross_entropy_with_logits, rates=8),
    "soft targets": Loss(F.cross_entropy, "cross_entropy", mixed=True),
    "label smoothing 0.1": Loss(lambda z, y: F.cross_entropy(z, y.argmax(1), label_smoothing=0.1)),
    "squared error": Loss(F.mse_loss, "mse", rates=4),
}
RATES = {"SGD": [0.1 * 2**k for k in range(7)], "AdamW": [1e-3 * 2**k for k in range(7)]}
METHODS: dict[str, bool | str | float] = {
    "plain": False,
    "clip 0.25": 0.25,
    "clip 1": 1.0,
    "clip 4": 4.0,
    "open loop": "open_loop",
    "closed loop": True,
}


def rates_of(loss: str, around: str) -> list[float]:
    """A loss's grid; AdamW's steps do not depend on the gradients' size."""
    return [lr * (LOSSES[loss].rates if around == "SGD" else 1.0) for lr in RATES[around]]


def trained(loss: str, around: str, method: str, lr: float, seed: int, epochs: int) -> float:
    """Accuracy on the test part in per cent; that of chance where the training broke off."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data, chosen, how = load("digits", seed=seed), LOSSES[loss], METHODS[method]
    torch.manual_seed(seed)
    model = dense_net(WIDTHS, nn.Tanh)
    kind = torch.optim.AdamW if around == "AdamW" else torch.optim.SGD
    opt: torch.optim.Optimizer = kind(model.parameters(), lr=lr)
    if how is True or isinstance(how, str):
        if around == "AdamW":
            opt = Feedback(model, opt, terminal=chosen.terminal, feedback=how)
        else:
            opt = DDPNOpt(model, lr=lr, terminal=chosen.terminal, feedback=how)
    targets = F.one_hot(data.y_train, CLASSES).float()
    mix = torch.distributions.Beta(0.4, 0.4)
    try:
        for _ in range(epochs):
            for index in torch.randperm(len(targets)).split(BATCH):
                x, y = data.x_train[index], targets[index]
                if chosen.mixed:
                    share, other = mix.sample((len(x), 1)), torch.randperm(len(x))
                    x, y = torch.lerp(x, x[other], share), torch.lerp(y, y[other], share)
                opt.zero_grad()
                chosen.of(model(x), y).backward()
                if isinstance(how, float):
                    nn.utils.clip_grad_norm_(model.parameters(), how)
                opt.step()
    except FloatingPointError:
        return 100 / CLASSES
    with torch.no_grad():
        right = (model(data.x_test).argmax(1) == data.y_test).double().mean()
    return 100 * float(right)


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    first_seed: int = 0,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    jobs: int = -1,
) -> None:
    """Print a table for each loss and optimizer."""
    cells = [
        (loss, around, method, lr)
        for loss in LOSSES
        for around in RATES
        for method in METHODS
        for lr in rates_of(loss, around)
    ]
    one, numbers = delayed(trained), range(first_seed, first_seed + seeds)
    flat = list(
        Parallel(n_jobs=jobs)(one(*cell, seed, epochs) for cell in cells for seed in numbers)
    )
    found = {cell: flat[i * seeds : (i + 1) * seeds] for i, cell in enumerate(cells)}
    for loss in LOSSES:
        for around in RATES:
            rates = rates_of(loss, around)
            own = {m: [found[loss, around, m, lr] for lr in rates] for m in METHODS}
            print_rates(f"{loss}, around {around}, {seeds} seeds, {epochs} epochs", own, rates)


if __name__ == "__main__":
    typer.run(main)
