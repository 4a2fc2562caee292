# SPDX-License-Identifier: MIT
"""What a release must still do: learning curves, and states that it must still load.

python tests/release/record.py curves     before a release whose curves differ on purpose
python tests/release/record.py states     once for each format of states, never again
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ddpnopt import DDPNOpt, DDPNOptWarning, Feedback, open_loop
from ddpnopt.formats import FORMAT_VERSION

HERE = Path(__file__).parent
CURVES = HERE / "curves.json"
STEPS, BATCH, SAVED, AFTER = 30, 32, 4, 3


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 8 - 1, dtype=torch.float32), torch.tensor(y)


def filled(model: nn.Module) -> nn.Module:
    """Weights by a formula: generators differ between releases of torch."""
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            index = torch.arange(p.numel(), dtype=torch.float64)
            wave = torch.sin(index * (1.7 + number)) * 1.4 / max(p[0].numel(), 1) ** 0.5
            p.copy_((wave if p.dim() > 1 else 0 * wave).view_as(p))
    return model


def dense(inputs: int = 64, hidden: int = 24) -> nn.Module:
    layers = (nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
    return filled(nn.Sequential(*layers, nn.Linear(hidden, 10)))


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
    return filled(
        nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(32, 10))
    )


class Wrapped:
    """An optimizer and the handle of `open_loop`, with one state."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
        self.handle = open_loop(model, self.optimizer)
        self.step, self.zero_grad = self.optimizer.step, self.optimizer.zero_grad

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "handle": self.handle.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.handle.load_state_dict(state["handle"])


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "ddpnopt": lambda model: DDPNOpt(model, lr=0.5, momentum=0.5),
    "ddpnopt-adamw": lambda model: DDPNOpt(model, lr=0.01, curvature="adamw"),
    "ddpnopt-rmsprop": lambda model: DDPNOpt(model, lr=0.003, curvature="rmsprop"),
    "ddpnopt-kfac": lambda model: DDPNOpt(model, lr=0.1, curvature="kfac"),
    "low_rank": lambda model: DDPNOpt(model, lr=0.5, value="low_rank"),
    "gauss_newton": lambda model: DDPNOpt(model, lr=0.2, value="gauss_newton"),
    "feedback-adamw": lambda model: Feedback(model, torch.optim.AdamW(model.parameters(), 0.01)),
    "open_loop-sgd": Wrapped,
}


def losses(model: nn.Module, opt: Any, steps: range, features: slice | None = None) -> list[float]:
    """Train; each step's loss before it."""
    x, y = data()
    x = x if features is None else x[:, features]
    found = []
    for step in steps:
        rows = slice(BATCH * step, BATCH * (step + 1))
        opt.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        opt.step()
        found.append(loss.item())
    return found


def curve(kind: str, convolutions: bool, disturbed: float = 0.0) -> list[float]:
    model = convolutional() if convolutions else dense()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + disturbed)
    return losses(model, OPTIMIZERS[kind](model), range(STEPS))


CASES = [*((kind, False) for kind in OPTIMIZERS), ("ddpnopt", True), ("feedback-adamw", True)]


def name_of(kind: str, convolutions: bool) -> str:
    return f"{kind} {'convolutional' if convolutions else 'dense'}"


#: The saved states are of a small network on ten pixels.
FEATURES = slice(20, 30)


def record_curves() -> None:
    """Each curve with its noise: how far rounding carries it, from weights a few ulps apart."""
    found = {}
    for case in CASES:
        base = curve(*case)
        others = [curve(*case, disturbed=sign * 2e-7) for sign in (1, -1)]
        pairs = zip(base, *others, strict=True)
        noise = max(abs(a - b) for a, *rest in pairs for b in rest)
        found[name_of(*case)] = {"losses": base, "noise": noise}
    CURVES.write_text(json.dumps(found, indent=1) + "\n")


def record_states() -> None:
    """Model, state, and the losses of the steps that follow."""
    path = HERE / f"format{FORMAT_VERSION}.pt"
    if path.exists():
        sys.exit(f"{path.name} is there: states of a format are recorded once")
    found = {}
    for kind, make in OPTIMIZERS.items():
        model = dense(10, 8)
        opt = make(model)
        losses(model, opt, range(SAVED), FEATURES)
        saved = {"model": model.state_dict(), "state": opt.state_dict()}
        saved = torch.load(_through_a_file(saved), weights_only=True)
        saved["losses"] = losses(model, opt, range(SAVED, SAVED + AFTER), FEATURES)
        found[kind] = saved
    torch.save(found, path)


def _through_a_file(saved: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return file


if __name__ == "__main__":
    warnings.simplefilter("ignore", DDPNOptWarning)
    torch.set_num_threads(1)
    {"curves": record_curves, "states": record_states}[sys.argv[1]]()
