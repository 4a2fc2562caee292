# SPDX-License-Identifier: MIT
"""What the two-bucket approximation of the closed loop costs in accuracy, on DIGITS.

Two ranks share every batch out. "layerwise" is one process on the whole batch, which it equals;
"open_loop" is the closed loop without its feedback.

Examples:
    python benchmarks/two_bucket.py --seeds 4 --epochs 4
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn

from ddpnopt import DDPNOpt
from ddpnopt.experiments.data import load

RANKS = 2
RATES = {"identity": (0.3, 1.0, 3.0), "adamw": (0.003, 0.03, 0.1)}


def train(
    seed: int, lr: float, options: dict[str, Any], epochs: int, batch: int, rank: int
) -> float:
    """Test accuracy in percent; rank -1: the whole batch."""
    data = load("digits", seed=seed)
    x, y = data.x_train.flatten(1), data.y_train
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(64, 32), nn.Tanh()]
    for _ in range(3):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    optimizer = DDPNOpt(model, lr=lr, nonfinite="skip", **options)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch):
            if len(rows) < batch:
                continue
            own = rows if rank < 0 else rows.chunk(RANKS)[rank]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[own]), y[own]).backward()
            optimizer.step()
    with torch.no_grad():
        hits = model(data.x_test.flatten(1)).argmax(1) == data.y_test
    return 100 * float(hits.double().mean())


def work(rank: int, folder: str, seeds: int, epochs: int, batch: int) -> None:
    """The two-bucket trainings of one rank, or with rank -1 the others."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways: dict[str, dict[str, Any]] = {"two_bucket": {"communication": "two_bucket"}}
    if rank < 0:
        ways = {"layerwise": {}, "open_loop": {"feedback": "open_loop"}, "off": {"feedback": False}}
    else:
        init = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=RANKS)
    found = {
        f"{curvature}|{lr}|{way}": [
            train(seed, lr, {"curvature": curvature, **options}, epochs, batch, rank)
            for seed in range(seeds)
        ]
        for curvature, rates in RATES.items()
        for lr in rates
        for way, options in ways.items()
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def main(
    seeds: Annotated[int, typer.Option(help="Trainings of each kind.")] = 4,
    epochs: Annotated[int, typer.Option(help="Passes through the data.")] = 4,
    batch: Annotated[int, typer.Option(help="Samples of a step, on both ranks together.")] = 32,
    rank: Annotated[int, typer.Option(hidden=True)] = -2,
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print a table in Markdown."""
    if rank > -2:
        work(rank, folder, seeds, epochs, batch)
        return
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, __file__, "--seeds", str(seeds), "--epochs", str(epochs)]
        command += ["--batch", str(batch), "--folder", place, "--rank"]
        running = [subprocess.Popen([*command, str(one)]) for one in (-1, *range(RANKS))]
        assert not any(one.wait() for one in running)
        found = {
            **json.loads(Path(place, "-1.json").read_text()),
            **json.loads(Path(place, "0.json").read_text()),
        }
    ways = ("off", "open_loop", "two_bucket", "layerwise")
    print(f"| M, lr | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for curvature, rates in RATES.items():
        for lr in rates:
            cells = []
            for way in ways:
                one = found[f"{curvature}|{lr}|{way}"]
                spread = statistics.stdev(one) if len(one) > 1 else 0.0
                cells.append(f"{statistics.mean(one):.1f} ± {spread:.1f}")
            print(f"| {curvature}, {lr:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
