# SPDX-License-Identifier: MIT
"""Many steps in one process: does anything grow?

    python benchmarks/soak.py [--steps 20000] [--kinds closed_loop,open_loop,kfac,feedback,branches]

For each kind it prints, after a tenth of the steps and at the end: resident memory, objects that
the garbage collector tracks, live tensors, tensors with a graph, hooks on the model and open files.
Without arguments it takes some minutes a kind. Exits with 1 where something grew.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, Feedback

#: Memory may differ by this share: allocators keep what they have freed.
FLAT = 0.02


class Branches(nn.Module):
    """A residual net with a norm over the batch and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.last(self.drop(h + torch.tanh(self.inner(h))))
        return out


def chain() -> nn.Module:
    """A dense net."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)
    )


def _feedback(model: nn.Module) -> torch.optim.Optimizer:
    return Feedback(model, torch.optim.AdamW(model.parameters(), 1e-3))


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "closed_loop": (chain, lambda m: DDPNOpt(m, lr=0.05, momentum=0.5)),
    "open_loop": (chain, lambda m: DDPNOpt(m, lr=0.05, feedback="open_loop", curvature="rmsprop")),
    "kfac": (chain, lambda m: DDPNOpt(m, lr=0.05, curvature="kfac")),
    "feedback": (chain, _feedback),
    "branches": (Branches, lambda m: DDPNOpt(m, lr=0.05, curvature="adamw")),
}


@dataclass(frozen=True)
class Counts:
    """What may grow.

    Attributes:
        memory: Resident bytes.
        objects: Objects that the garbage collector tracks.
        tensors: Live tensors among them.
        graphs: Those with a graph.
        hooks: On the model's modules and parameters.
        files: Open file descriptors; -1 where the system does not tell.
    """

    memory: int
    objects: int
    tensors: int
    graphs: int
    hooks: int
    files: int

    @classmethod
    def of(cls, model: nn.Module) -> Counts:
        """Now, rubbish collected."""
        gc.collect()
        objects = gc.get_objects()
        tensors = [one for one in objects if issubclass(type(one), Tensor)]
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ) + sum(len(p._backward_hooks or ()) for p in model.parameters())
        descriptors, pages = Path("/proc/self/fd"), Path("/proc/self/statm")
        files = len(list(descriptors.iterdir())) if descriptors.exists() else -1
        known = int(pages.read_text().split()[1]) if pages.exists() else 0
        return cls(
            known * os.sysconf("SC_PAGE_SIZE"),
            len(objects),
            len(tensors),
            sum(t.grad_fn is not None for t in tensors),
            hooks,
            files,
        )

    def grown_from(self, before: Counts) -> list[str]:
        """Names of what has grown."""
        # Caches of Python and torch fill up slowly: some objects in 20,000 steps are none a step.
        slack = {"memory": FLAT * before.memory, "objects": 0.01 * before.objects}
        return [
            one.name
            for one in fields(self)
            if getattr(self, one.name) > getattr(before, one.name) + slack.get(one.name, 0)
        ]


def soak(kind: str, steps: int) -> tuple[Counts, Counts]:
    """Counts after a tenth of the steps, and at the end."""
    make, optimizer = KINDS[kind]
    torch.manual_seed(0)
    model = make()
    opt = optimizer(model)
    teacher = torch.randn(8, 4)
    first: Counts | None = None
    for step in range(steps):
        if step == steps // 10:
            first = Counts.of(model)
        x = torch.randn(16, 8)
        y = (x @ teacher).argmax(1)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        if step % 5 == 0:
            model(x)  # a pass in training mode without a backward pass
            with torch.no_grad():
                model(x)
    del x, y
    assert first is not None
    return first, Counts.of(model)


def main() -> int:
    """Soak all kinds that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--kinds", default=",".join(KINDS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = False
    names = [one.name for one in fields(Counts)]
    print("kind", "when", *names, sep="\t")
    for kind in asked.kinds.split(","):
        first, last = soak(kind, asked.steps)
        grown = last.grown_from(first)
        failed = failed or bool(grown)
        print(kind, asked.steps // 10, *astuple(first), sep="\t")
        print(kind, asked.steps, *astuple(last), *(f"{one} grew" for one in grown), sep="\t")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
