# SPDX-License-Identifier: MIT
"""What a training run is given and what it returns."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ddpnopt.experiments.optimizers import OPTIMIZERS, OptionValue, label_of


class RunConfig(BaseModel):
    """Everything that decides a run's outcome.

    Attributes:
        dataset: Data set name.
        scale: How inputs are scaled, see `ddpnopt.experiments.data.load`.
        architecture: Network name, see `ddpnopt.experiments.models.build_model`.
        optimizer: Optimizer name, see `ddpnopt.experiments.optimizers.OPTIMIZERS`.
        lr: Learning rate.
        options: The optimizer's options that differ from its defaults.
        batch: Samples per step; the last batch of an epoch may be smaller.
        epochs: Passes over the training part.
        seed: Seed of the split, the initial weights and the order of the samples: runs with one
            seed are paired, whatever the optimizer.
        device: torch device.
        train_samples: Number of training samples to draw by the seed; None: all.
        test_samples: Number of test samples to draw by the seed; None: all.
        schedule: The learning rate over the steps, see `ddpnopt.experiments.schedules.SCHEDULES`.
        label_noise: Share of the training labels that are drawn anew from all classes, by the seed.
        initialisation: Weights at the start, see `ddpnopt.experiments.models.INITIALISATIONS`.
        loss: What is trained on, see `ddpnopt.experiments.training.LOSSES`.
        test_share: Share of the samples held out of data sets that come without a test part.
        record_updates: Measure `Epoch.update_norm`; it costs a copy of the weights per step.
        checksum: Which data of that name: the checksum of their files, see
            `ddpnopt.experiments.data.describe`; empty where they come with scikit-learn, or where
            nobody looked.
        data: Folder of the files of data sets that are read from files. It says where, not what:
            records and keys leave it out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    dataset: str = "digits"
    scale: str = "standard"
    architecture: str = "mlp-20x4-tanh"
    optimizer: str = "ddpnopt"
    lr: float = Field(default=0.1, ge=0.0)
    options: dict[str, OptionValue] = Field(default_factory=dict)
    batch: int = Field(default=8, ge=1)
    epochs: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    train_samples: int | None = Field(default=None, ge=1)
    test_samples: int | None = Field(default=None, ge=1)
    schedule: str = "constant"
    label_noise: float = Field(default=0.0, ge=0.0, lt=1.0)
    initialisation: str = "torch"
    loss: str = "cross_entropy"
    test_share: float = Field(default=0.2, gt=0.0, lt=1.0)
    record_updates: bool = False
    checksum: str = ""
    data: Path | None = Field(default=None, exclude=True)

    @field_validator("options")
    @classmethod
    def _numbers(cls, options: dict[str, OptionValue]) -> dict[str, OptionValue]:
        # JSON has no infinity: an infinite option is written as one of these words.
        words = ("Infinity", "-Infinity", "NaN")
        return {k: float(v) if isinstance(v, str) and v in words else v for k, v in options.items()}

    @property
    def key(self) -> str:
        """A short name of this configuration: equal keys, equal runs."""
        parts = self.model_dump(mode="json")
        parts["options"] = sorted((k, repr(v)) for k, v in self.options.items())
        text = repr(sorted(parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The optimizer's name in tables and plots."""
        if self.optimizer not in OPTIMIZERS:
            # A run that crashed because of its name has a row in the table, too.
            return self.optimizer
        return label_of(self.optimizer, self.options)


class Epoch(BaseModel):
    """State after one epoch.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean loss over the whole training part (cross-entropy: nats), model in eval
            mode, weights as they are after the epoch.
        test_accuracy: Share of the test part answered rightly, in [0, 1].
        seconds: Seconds spent in training steps of this epoch, evaluation left out.
        cpu_seconds: The process's CPU time in them, all threads together: it doesn't grow when
            other processes share the cores.
        running_loss: Mean of the losses that the epoch's steps saw, each before its step; it
            holds the loss that ended a diverged run. NaN where no step came to a loss.
        update_norm: Mean over the epoch's steps of |u_new - u_old|, the Euclidean norm over all
            parameters together; NaN unless `RunConfig.record_updates`.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float
    cpu_seconds: float = math.nan
    running_loss: float = math.nan
    update_norm: float = math.nan


class RunResult(BaseModel):
    """Outcome of a run.

    Attributes:
        config: What was run.
        epochs: One record per finished epoch, and one for the epoch in which it diverged.
        train_loss: The last record's training loss.
        test_accuracy: The last record's accuracy, measured with the weights as they are.
        chance: Accuracy of always answering the test part's largest class.
        seconds: Seconds in training steps.
        diverged: The loss, or something inside the optimizer's step, became non-finite; or the
            run crashed.
        reason: How it diverged; empty otherwise.
        error: The exception that ended a crashed run, "ExceptionType: message"; its numbers are
            NaN. Empty otherwise.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    config: RunConfig
    epochs: tuple[Epoch, ...]
    train_loss: float
    test_accuracy: float
    chance: float
    seconds: float
    diverged: bool
    reason: str = ""
    error: str = ""

    @classmethod
    def crash(cls, config: RunConfig, error: str) -> RunResult:
        """Return the result of a run that an exception ended.

        Args:
            config: What was run.
            error: "ExceptionType: message".
        """
        return cls(
            config=config,
            epochs=(),
            train_loss=math.nan,
            test_accuracy=math.nan,
            chance=math.nan,
            seconds=0.0,
            diverged=True,
            reason=error,
            error=error,
        )

    @property
    def failed(self) -> bool:
        """Diverged, or hardly better than chance (less than a tenth of the way to 1)."""
        return self.diverged or self.test_accuracy <= self.chance + 0.1 * (1.0 - self.chance)
