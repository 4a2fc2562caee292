# SPDX-License-Identifier: MIT
"""Settings of Figs. 5 and 7: which network is trained, and whose feedback is looked at."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ddpnopt.experiments.models import wants_images
from ddpnopt.experiments.reproduce.mistakes import Misplaced
from ddpnopt.experiments.reproduce.schema import (
    ArchitectureName,
    Count,
    DatasetName,
    OptimizerName,
    Options,
    Positive,
    ScaleName,
    Seed,
    Several,
    Strict,
    takes,
)


class Problem(Strict):
    """A data set and how the network is trained on it.

    Attributes:
        dataset: Its name.
        epochs: Passes over the training part.
        batch: Samples per step.
        train_samples: Training samples drawn by the seed; None: all.
    """

    dataset: DatasetName
    epochs: Count
    batch: Count
    train_samples: Count | None = None


class QuickPolicies(Strict):
    """Sizes of a quick run."""

    epochs: Count = 1
    train_samples: Count = 500
    samples: Count = 2


class Policies(Strict):
    """Fig. 5 or 7.

    Attributes:
        architecture: A convolutional network, see `ddpnopt.experiments.models.build_model`.
        scale: How inputs are scaled.
        optimizer: Trains the network.
        lr: Its learning rate.
        options: Its options.
        value: Value function of the gains: "low_rank" (exact terminal Hessian) or "gauss_newton"
            (outer product: K has rank 1).
        step: Learning rate at which K = -Q_uu^-1 Q_ux is taken.
        seed: Seed of split, weights and order.
        samples: Samples looked at, the first of the test part from so many classes.
        vectors: Right-singular vectors shown for each layer.
        triplets: Singular values that are computed.
        quick: Sizes of a quick run.
        problem: The data sets; those whose files are not there are left out, visibly.
    """

    architecture: ArchitectureName
    scale: ScaleName
    optimizer: OptimizerName
    lr: Positive
    options: Options = {}
    value: Literal["low_rank", "gauss_newton"] = "low_rank"
    step: Positive
    seed: Seed = 0
    samples: Count
    vectors: Count
    triplets: Count
    quick: QuickPolicies = QuickPolicies()
    problem: Several[Problem]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        takes(self.optimizer, self.lr, self.options, "options")
        if not wants_images(self.architecture):
            raise Misplaced(
                f"{self.architecture!r} has no convolutions: allowed is cnn-..., conv4-..., "
                "resnet-...",
                "architecture",
            )
        if self.vectors > self.triplets:
            raise Misplaced(
                f"{self.vectors}: allowed is at most triplets = {self.triplets}", "vectors"
            )
        return self
