# SPDX-License-Identifier: MIT
"""What the study of `any_network` trains, with which optimizers and at which rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ddpnopt.experiments.sweep import Contender
from ddpnopt.experiments.tasks import TASKS
from ddpnopt.experiments.training import RunConfig

_CLIP = (("grad_clip", 1.0),)


@dataclass(frozen=True)
class Family:
    """A borrowed optimizer, its clipped form, and the library around it.

    Attributes:
        name: The borrowed optimizer's name in tables.
        rivals: Without the library.
        closed: Registry name of the closed loop; its open loop is the name with "-open-loop".
    """

    name: str
    rivals: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    closed: str

    def contenders(self, lrs: tuple[float, ...]) -> list[Contender]:
        """All optimizers of the family, the library's last, closed loop before open loop."""
        own = [(self.closed, ()), (f"{self.closed}-open-loop", ())]
        return [Contender(name, lrs, options) for name, options in (*self.rivals, *own)]


SGD = Family("SGD", (("sgd", ()), ("sgd", _CLIP)), "ddpnopt")
ADAMW = Family("AdamW", (("adamw", _CLIP),), "feedback-adamw")


@dataclass(frozen=True)
class Problem:
    """A network and its data.

    Attributes:
        heading: What it is, in words.
        base: Everything but optimizer, rate and seed.
        sgd: Rates of the family of SGD, ascending.
        adamw: Rates of the family of AdamW.
        by_loss: Judge by the training loss rather than by accuracy on the test part.
        tolerance: How much worse than the best still counts as good: points, or the loss's units.
    """

    heading: str
    base: RunConfig
    sgd: tuple[float, ...]
    adamw: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    by_loss: bool = False
    tolerance: float = 2.0

    def families(self) -> list[tuple[Family, tuple[float, ...]]]:
        """Both families with their rates."""
        return [(SGD, self.sgd), (ADAMW, self.adamw)]

    def contenders(self) -> list[Contender]:
        """All optimizers."""
        return [c for family, lrs in self.families() for c in family.contenders(lrs)]

    @property
    def steps(self) -> int:
        """Steps of a run; the two sets that are used whole have these many training samples."""
        whole = {"digits": 1437, "digits-binary": 1200}
        samples = self.base.train_samples or whole[self.base.dataset]
        return -(-samples // self.base.batch) * self.base.epochs


_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_CIFAR = RunConfig(
    dataset="cifar-10", scale="pooled", batch=16, epochs=4, train_samples=1280, test_samples=800
)
_DIGITS = RunConfig(dataset="digits", scale="pooled", batch=32, epochs=5)


def _of(base: RunConfig, architecture: str) -> RunConfig:
    return base.model_copy(update={"architecture": architecture})


PROBLEMS = {
    "resnet20-gn": Problem(
        "ResNet-20 of width 8 with GroupNorm, first stride 2, CIFAR-10, 1280 images",
        _of(_CIFAR, "resnet20-8s2-gn"),
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    ),
    "resnet20-bn": Problem(
        "ResNet-20 of width 8 with BatchNorm, first stride 2, CIFAR-10, 1280 images",
        _of(_CIFAR, "resnet20-8s2-bn"),
        _RATES,
    ),
    "inception": Problem(
        "Inception, two blocks of four branches of 8 channels, DIGITS",
        _of(_DIGITS, "inception-8"),
        _RATES,
    ),
    "encoder": Problem(
        "Pre-norm transformer encoder, two blocks of 32, DIGITS row by row",
        _of(_DIGITS, "encoder-32x2"),
        _RATES,
    ),
    "language-model": Problem(
        "Language model in the style of GPT-2, two blocks of 32, tied head, generated text",
        RunConfig(
            dataset="grammar",
            architecture="gpt-32x2",
            batch=16,
            epochs=3,
            train_samples=1280,
            test_samples=320,
        ),
        _RATES,
    ),
    "vae": Problem(
        "Variational autoencoder 64-64-8-64-64, binary DIGITS",
        RunConfig(dataset="digits-binary", architecture="vae-64", loss="elbo", batch=32, epochs=8),
        (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        by_loss=True,
        tolerance=0.5,
    ),
    "graph-net": Problem(
        "Graph network, three layers of 16 with skips, generated graphs of 16 nodes",
        RunConfig(
            dataset="graphs",
            architecture="graphnet-16",
            batch=32,
            epochs=6,
            train_samples=1600,
            test_samples=800,
        ),
        _RATES,
    ),
    "recurrent": Problem(
        "GRU cell of width 32 unrolled over the rows of DIGITS",
        _of(_DIGITS, "gru-32"),
        (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
}


def quick(problem: Problem) -> Problem:
    """The same network for a few steps at two rates of each family, on data that need no files."""
    base = problem.base
    dataset = base.dataset if base.dataset in TASKS else "digits"
    update = {"dataset": dataset, "epochs": 1, "train_samples": 64, "test_samples": 32}
    return replace(
        problem,
        base=base.model_copy(update=update),
        sgd=problem.sgd[::4],
        adamw=problem.adamw[::4],
    )
