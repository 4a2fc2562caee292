# SPDX-License-Identifier: MIT
"""What the study trains, with which optimizers and at which rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ddpnopt.experiments.optimizers import OptionValue, label_of
from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.tasks import TASKS
from ddpnopt.experiments.training import RunConfig

Options = tuple[tuple[str, OptionValue], ...]

#: Rates of gradient descent, and of methods that divide by the size of the gradients.
STEPS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RATIOS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Family:
    """A borrowed optimizer at its three depths, and its rivals.

    Attributes:
        title: The borrowed optimizer's name in tables.
        off, open_loop, closed: Registry names of the three depths.
        rivals: Registry names with options: the same optimizer made robust in other ways.
        lrs: Rates, ascending.
    """

    title: str
    off: str
    open_loop: str
    closed: str
    rivals: tuple[tuple[str, Options], ...]
    lrs: tuple[float, ...]

    def depths(self) -> list[Contender]:
        """Off, open loop, closed loop."""
        return [Contender(name, self.lrs) for name in (self.off, self.open_loop, self.closed)]

    def others(self) -> list[Contender]:
        """The rivals."""
        return [Contender(name, self.lrs, options) for name, options in self.rivals]

    def contenders(self) -> list[Contender]:
        """All of them."""
        return self.depths() + self.others()


def _clipped(name: str, *thresholds: float) -> tuple[tuple[str, Options], ...]:
    return tuple((name, (("grad_clip", threshold),)) for threshold in thresholds)


def _tenths(lrs: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(lr / 10, 6) for lr in lrs)


FAMILIES: Mapping[str, Family] = {
    "sgd": Family(
        "SGD",
        "sgd",
        "ddpnopt-open-loop",
        "ddpnopt",
        (
            *_clipped("sgd", 0.25, 0.5, 1.0, 2.0),
            ("sgd-agc", ()),
            ("sam", ()),
            ("sgd-schedule-free", ()),
        ),
        STEPS,
    ),
    "momentum": Family(
        "SGD momentum",
        "momentum",
        "ddpnopt-momentum-open-loop",
        "ddpnopt-momentum",
        _clipped("momentum", 0.5, 2.0),
        _tenths(STEPS),
    ),
    "rmsprop": Family(
        "RMSprop",
        "rmsprop",
        "ddpnopt-rmsprop-open-loop",
        "ddpnopt-rmsprop",
        _clipped("rmsprop", 1.0),
        RATIOS,
    ),
    "adamw": Family(
        "AdamW",
        "adamw",
        "feedback-adamw-open-loop",
        "feedback-adamw",
        (*_clipped("adamw", 1.0), ("adamw-schedule-free", ())),
        RATIOS,
    ),
    "kfac": Family("KFAC", "kfac", "ddpnopt-kfac-open-loop", "ddpnopt-kfac", (), STEPS[:-1]),
    "muon": Family("Muon", "muon", "feedback-muon-open-loop", "feedback-muon", (), RATIOS),
}
MOST = ("sgd", "momentum", "rmsprop", "adamw")


@dataclass(frozen=True)
class Problem:
    """A network and its data.

    Attributes:
        heading: What it is, in words.
        base: Everything but optimizer, rate and seed.
        families: Names in `FAMILIES`.
        mixes: Its layers mix samples (BatchNorm).
    """

    heading: str
    base: RunConfig
    families: tuple[str, ...] = MOST
    mixes: bool = False

    def reading(self, folder: Path | None) -> Problem:
        """The same with its data's files in a folder."""
        return replace(self, base=self.base.model_copy(update={"data": folder}))

    def contenders(self) -> list[Contender]:
        """All optimizers of all its families."""
        return [c for name in self.families for c in FAMILIES[name].contenders()]


def label(contender: Contender) -> str:
    """A contender's name in tables."""
    return label_of(contender.optimizer, dict(contender.options))


_DIGITS = RunConfig(dataset="digits", batch=32, epochs=8)
_IMAGES = _DIGITS.model_copy(update={"scale": "pooled"})


def _on(base: RunConfig, architecture: str, **update: object) -> RunConfig:
    return base.model_copy(update={"architecture": architecture, **update})


_TANH = _on(_DIGITS, "mlp-20x4-tanh", batch=16, epochs=4)
_CNN = _on(_DIGITS, "cnn-16", batch=16, epochs=4)

PROBLEMS: Mapping[str, Problem] = {
    "wine": Problem(
        "WINE, 13-16x3-3 ReLU, batch 8",
        RunConfig(dataset="wine", architecture="mlp-16x3-relu", batch=8, epochs=20),
    ),
    "tanh": Problem("DIGITS, 64-20x4-10 Tanh, batch 16", _TANH, (*MOST, "kfac", "muon")),
    "gelu": Problem("DIGITS, 64-32x3-10 GELU, batch 32", _on(_DIGITS, "mlp-32x3-gelu")),
    "sigmoid": Problem(
        "DIGITS, 64-32x2-10 sigmoid, batch 32", _on(_DIGITS, "mlp-32x2-sigmoid", epochs=12)
    ),
    "deep": Problem(
        "DIGITS, 64-20x10-10 Tanh, batch 16", _on(_DIGITS, "mlp-20x10-tanh", batch=16, epochs=4)
    ),
    "deep-norm": Problem(
        "DIGITS, 64-32x20-10 ReLU with LayerNorm, batch 32",
        _on(_DIGITS, "mlp-32x20-relu-ln", epochs=4),
        ("sgd", "adamw"),
    ),
    "noise": Problem(
        "DIGITS, 64-20x4-10 Tanh, batch 16, 20 % of the labels random",
        _on(_TANH, "mlp-20x4-tanh", label_noise=0.2),
    ),
    "cnn": Problem("DIGITS, CNN of 16 channels, batch 16", _CNN, (*MOST, "kfac", "muon")),
    "residual": Problem(
        "DIGITS, residual CNN with GroupNorm, batch 32", _on(_IMAGES, "resnet-16x2-gn", epochs=6)
    ),
    "residual-bn": Problem(
        "DIGITS, residual CNN with BatchNorm, batch 32",
        _on(_IMAGES, "resnet-16x2-bn", epochs=6),
        mixes=True,
    ),
    "dense-bn": Problem(
        "DIGITS, 64-32x4-10 ReLU with BatchNorm, batch 32",
        _on(_DIGITS, "mlp-32x4-relu-bn"),
        mixes=True,
    ),
    "dense-bn-8": Problem(
        "DIGITS, 64-32x4-10 ReLU with BatchNorm, batch 8",
        _on(_DIGITS, "mlp-32x4-relu-bn", batch=8, epochs=2),
        ("sgd", "adamw"),
        mixes=True,
    ),
    "encoder": Problem(
        "DIGITS row by row, transformer encoder, batch 32",
        _on(_IMAGES, "encoder-32x2", epochs=5),
        ("sgd", "momentum", "adamw", "muon"),
    ),
    "text": Problem(
        "Text classification, generated sentences, transformer block, batch 32",
        RunConfig(
            dataset="sentences",
            architecture="text-32x1",
            batch=32,
            epochs=5,
            train_samples=1280,
            test_samples=640,
        ),
        ("sgd", "momentum", "adamw"),
    ),
    "language": Problem(
        "Language model, generated text, one block of 32, batch 16",
        RunConfig(
            dataset="grammar",
            architecture="gpt-32x1",
            batch=16,
            epochs=4,
            train_samples=800,
            test_samples=320,
        ),
        ("sgd", "momentum", "adamw"),
    ),
    "regression": Problem(
        "Regression (MSE), Friedman 1, 10-32x3-1 Tanh, batch 16",
        RunConfig(
            dataset="friedman",
            architecture="mlp-32x3-tanh",
            loss="mse",
            batch=16,
            epochs=5,
            train_samples=1200,
            test_samples=600,
        ),
    ),
    "mnist": Problem(
        "MNIST, 5,000 images, 784-64x3-10 ReLU, batch 128",
        RunConfig(
            dataset="mnist",
            scale="pooled",
            architecture="mlp-64x3-relu",
            batch=128,
            epochs=8,
            train_samples=5000,
            test_samples=2000,
        ),
        (*MOST, "muon"),
    ),
    "mnist-256": Problem(
        "MNIST, 5,000 images, 784-64x3-10 ReLU, batch 256",
        RunConfig(
            dataset="mnist",
            scale="pooled",
            architecture="mlp-64x3-relu",
            batch=256,
            epochs=12,
            train_samples=5000,
            test_samples=2000,
        ),
        ("sgd", "adamw"),
    ),
    "cifar": Problem(
        "CIFAR-10, 1,280 images, CNN of 16 channels, batch 32",
        RunConfig(
            dataset="cifar-10",
            scale="pooled",
            architecture="cnn-16",
            batch=32,
            epochs=4,
            train_samples=1280,
            test_samples=800,
        ),
        ("sgd", "adamw"),
    ),
    "tanh-cycle": Problem(
        "DIGITS, 64-20x4-10 Tanh, batch 16, warm-up and cosine",
        _on(_TANH, "mlp-20x4-tanh", schedule="one-cycle"),
        ("sgd", "momentum", "adamw"),
    ),
    "cnn-cycle": Problem(
        "DIGITS, CNN of 16 channels, batch 16, warm-up and cosine",
        _on(_CNN, "cnn-16", schedule="one-cycle"),
        ("sgd", "momentum", "adamw"),
    ),
    "encoder-cycle": Problem(
        "DIGITS row by row, transformer encoder, batch 32, warm-up and cosine",
        _on(_IMAGES, "encoder-32x2", epochs=5, schedule="one-cycle"),
        ("adamw",),
    ),
}


def quick(problem: Problem) -> Problem:
    """The same network for a few steps, on data that need no files."""
    base = problem.base
    dataset = base.dataset if base.dataset in ("digits", "wine", *TASKS) else "digits"
    update = {"dataset": dataset, "epochs": 1, "train_samples": 64, "test_samples": 30}
    return replace(problem, base=base.model_copy(update=update))
