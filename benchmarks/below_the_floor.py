# SPDX-License-Identifier: MIT
"""Less than a closed loop: what it costs and what it holds: `python benchmarks/below_the_floor.py`.

Between the open loop and the closed one lie cheaper steps: the second forward pass in every k-th
step only (the others open loop, or plain), or with a part of the batch only (the other samples'
states are taken as unmoved), and the brake. Each is trained at every rate with the same budget; its
good rates are those whose mean accuracy is within 2 points of the best that any method reaches on
that net around that optimizer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer
from joblib import Parallel, delayed
from torch import nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, Feedback
from ddpnopt.experiments.bench.cases import dense_net
from ddpnopt.experiments.data import load
from ddpnopt.layer import Layer
from ddpnopt.rollout import Method, policies, recurse, rollout
from ddpnopt.stages import Trajectory
from ddpnopt.step import Step
from ddpnopt.trajectory import Recorder
from ddpnopt.value.base import Blocks
from rates import print_rates

NETS: dict[str, tuple[tuple[int, ...], type[nn.Module]]] = {
    "64-32x4-10 Tanh": ((64, 32, 32, 32, 32, 10), nn.Tanh),
    "64-128x6-10 ReLU": ((64, *(128,) * 6, 10), nn.ReLU),
}
RATES = {"SGD": [0.1 * 2**k for k in range(7)], "AdamW": [1e-3 * 2**k for k in range(7)]}
CLIPS = (0.25, 1.0, 4.0)
BATCH = 32


def alone(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
    """The open loop, at the step."""
    recurse(recorder, step, trajectories)
    for layer in step.layers.values():
        step.apply(layer, None)
    step.settle()


def every(k: int) -> Method:
    """A rollout in every k-th step, the open loop in the others."""
    steps = 0

    def method(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
        nonlocal steps
        steps += 1
        (policies if steps % k == 1 or k == 1 else alone)(recorder, step, trajectories)

    return method


def part(share: float) -> Method:
    """A rollout that only the first samples of the batch take part in."""

    def method(recorder: Recorder, step: Step, trajectories: Sequence[Trajectory]) -> None:
        recurse(recorder, step, trajectories)

        def apply(layer: Layer, dx: Blocks | None) -> None:
            if dx is not None:
                dx = [one.clone() for one in dx]
                for one in dx:
                    one[math.ceil(share * len(one)) :] = 0
            step.apply(layer, dx)

        rollout(recorder, trajectories, step.layers, apply)
        step.settle()

    return method


#: Name: depth of feedback, and how a step moves the layers (None: as it does).
METHODS: dict[str, tuple[bool | str, Callable[[], Method] | None]] = {
    "plain": (False, None),
    **{f"plain, clip {clip:g}": (False, None) for clip in CLIPS},
    "open loop": ("open_loop", None),
    "closed loop every 8, open between": (True, lambda: every(8)),
    "closed loop every 4, open between": (True, lambda: every(4)),
    "closed loop every 2, open between": (True, lambda: every(2)),
    "closed loop of 1/8 of the batch": (True, lambda: part(1 / 8)),
    "closed loop of 1/2 of the batch": (True, lambda: part(1 / 2)),
    "brake": (True, None),
    "closed loop": (True, None),
}


def make(method: str, around: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer with a method of feedback."""
    depth, how = METHODS[method]
    if around == "AdamW" or method == "brake":
        kind = torch.optim.AdamW if around == "AdamW" else torch.optim.SGD
        inner = kind(model.parameters(), lr=lr)
        if depth is False:
            return inner
        mode = "brake" if method == "brake" else "samples"
        opt: DDPNOpt | Feedback = Feedback(model, inner, feedback=depth, mode=mode)
    else:
        opt = DDPNOpt(model, lr=lr, feedback=depth)
    if how is not None:
        opt.engine.method = how()
    return opt


def trained(net: str, around: str, method: str, lr: float, seed: int, epochs: int) -> float:
    """Accuracy on the test part in per cent; that of chance where the training broke off."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = load("digits", seed=seed)
    torch.manual_seed(seed)
    widths, activation = NETS[net]
    model = dense_net(widths, activation)
    opt = make(method, around, model, lr)
    clip = float(method.split()[-1]) if "clip" in method else None
    try:
        for _ in range(epochs):
            for index in torch.randperm(len(data.x_train)).split(BATCH):
                opt.zero_grad()
                F.cross_entropy(model(data.x_train[index]), data.y_train[index]).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
    except FloatingPointError:
        return 100 / data.classes
    with torch.no_grad():
        right = (model(data.x_test).argmax(1) == data.y_test).double().mean()
    return 100 * float(right)


def main(
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    first_seed: int = 0,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    jobs: int = -1,
    net: Annotated[list[str] | None, typer.Option(help="part of a net's name")] = None,
) -> None:
    """Print a table for each net and optimizer."""
    chosen = [name for name in NETS if not net or any(one in name for one in net)]
    cells = [
        (name, around, method, lr)
        for name in chosen
        for around, rates in RATES.items()
        for method in METHODS
        for lr in rates
    ]
    one = delayed(trained)
    calls = (
        one(*cell, seed, epochs) for cell in cells for seed in range(first_seed, first_seed + seeds)
    )
    flat = list(Parallel(n_jobs=jobs)(calls))
    found = {cell: flat[i * seeds : (i + 1) * seeds] for i, cell in enumerate(cells)}
    for name in chosen:
        for around, rates in RATES.items():
            own = {m: [found[name, around, m, lr] for lr in rates] for m in METHODS}
            print_rates(f"{name}, around {around}, {seeds} seeds, {epochs} epochs", own, rates)


if __name__ == "__main__":
    typer.run(main)
