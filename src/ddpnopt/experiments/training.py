# SPDX-License-Identifier: MIT
"""One training run: a configuration in, a result out, the same for the same seed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ddpnopt.experiments.data import Dataset, load
from ddpnopt.experiments.models import build_model, wants_images
from ddpnopt.experiments.optimizers import Built, OptionValue, build_optimizer, label_of


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
        data: Folder of the files of data sets that are read from files. It says where, not what:
            records and keys leave it out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    data: Path | None = Field(default=None, exclude=True)

    @property
    def key(self) -> str:
        """A short name of this configuration: equal keys, equal runs."""
        parts = self.model_dump(mode="json")
        if self.train_samples is None:
            # The keys of results from before this field existed stay as they are.
            del parts["train_samples"]
        parts["options"] = sorted((k, repr(v)) for k, v in self.options.items())
        text = repr(sorted(parts.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """The optimizer's name in tables and plots."""
        return label_of(self.optimizer, self.options)


class Epoch(BaseModel):
    """State after one epoch.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean cross-entropy over the whole training part (nats), model in eval mode.
        test_accuracy: Share of the test part answered rightly, in [0, 1].
        seconds: Seconds spent in training steps of this epoch, evaluation left out.
        cpu_seconds: The process's CPU time in them, all threads together: it doesn't grow when
            other processes share the cores.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    epoch: int
    train_loss: float
    test_accuracy: float
    seconds: float
    cpu_seconds: float = math.nan


class RunResult(BaseModel):
    """Outcome of a run.

    Attributes:
        config: What was run.
        epochs: One record per finished epoch, and one for the epoch in which it diverged.
        train_loss: The last record's training loss.
        test_accuracy: The last record's accuracy, measured with the weights as they are.
        chance: Accuracy of always answering the test part's largest class.
        seconds: Seconds in training steps.
        diverged: The loss, or something inside the optimizer's step, became non-finite.
        reason: How it diverged; empty otherwise.
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

    @property
    def failed(self) -> bool:
        """Diverged, or hardly better than chance (less than a tenth of the way to 1)."""
        return self.diverged or self.test_accuracy <= self.chance + 0.1 * (1.0 - self.chance)


class _Diverged(Exception):
    """Ends a run whose loss is no longer finite."""


def _steps(model: nn.Module, built: Built, data: Dataset, order: torch.Tensor, batch: int) -> None:
    """Train through one permutation of the training part."""
    for index in torch.split(order, batch):
        built.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.x_train[index]), data.y_train[index])
        if not math.isfinite(loss.item()):
            raise _Diverged(f"non-finite loss {loss.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        if built.grad_clip is not None:
            clip_grad_norm_(model.parameters(), built.grad_clip)
        built.optimizer.step()


#: Samples evaluated at once.
_PART = 2048


@torch.no_grad()
def _measure(model: nn.Module, data: Dataset) -> tuple[float, float]:
    """Return (training loss, test accuracy) with the weights as they are."""
    model.eval()
    loss, right = 0.0, 0
    # In parts: the activations of a large set's images would fill the memory.
    for x, y in zip(
        torch.split(data.x_train, _PART), torch.split(data.y_train, _PART), strict=True
    ):
        part = float(nn.functional.cross_entropy(model(x), y))
        loss += part * (len(y) / len(data.y_train))
    for x, y in zip(torch.split(data.x_test, _PART), torch.split(data.y_test, _PART), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    model.train()
    return loss, right / len(data.y_test)


def resolve_device(name: str) -> torch.device:
    """Return the device, checked to exist.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto" is a GPU where there is one.

    Returns:
        The device.

    Raises:
        ValueError: No such device.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda, cuda:N, auto.") from error
    if device.type == "cuda" and not has_gpu:
        raise ValueError(f"device {name!r} asked for, but PyTorch sees no GPU; use cpu")
    return device


def _load(config: RunConfig) -> Dataset:
    return load(
        config.dataset,
        seed=config.seed,
        scale=config.scale,
        images=wants_images(config.architecture),
        folder=config.data,
        train_samples=config.train_samples,
    )


def check(config: RunConfig) -> None:
    """Raise the error that `train` would raise for unknown names or options, without training.

    Args:
        config: What is going to be run.

    Raises:
        ValueError: Unknown names or options, or a network that can't take the data.
    """
    resolve_device(config.device)
    data = _load(config)
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.architecture, data.input_shape, data.classes)
    build_optimizer(config.optimizer, model, config.lr, config.options)


def train(config: RunConfig, on_epoch: Callable[[Epoch], None] | None = None) -> RunResult:
    """Train one network.

    Data, weights and order of the samples follow from `config.seed` alone; torch's global
    generator is left as it was.

    Args:
        config: What to run.
        on_epoch: Called after every epoch, for progress displays.

    Returns:
        The result. Divergence is a result, never an exception.

    Raises:
        ValueError: Unknown names or options.
    """
    device = resolve_device(config.device)
    data = _load(config).to(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        model = build_model(config.architecture, data.input_shape, data.classes).to(device)
        built = build_optimizer(config.optimizer, model, config.lr, config.options)
        return _run(config, model, built, data, on_epoch)


def _run(
    config: RunConfig,
    model: nn.Module,
    built: Built,
    data: Dataset,
    on_epoch: Callable[[Epoch], None] | None,
) -> RunResult:
    order = torch.Generator().manual_seed(config.seed)
    records: list[Epoch] = []
    reason = ""
    for number in range(1, config.epochs + 1):
        permutation = torch.randperm(len(data.y_train), generator=order).to(data.y_train.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        try:
            _steps(model, built, data, permutation, config.batch)
        except (_Diverged, FloatingPointError) as error:
            reason = str(error) or type(error).__name__
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        loss, accuracy = _measure(model, data)
        if not reason and not math.isfinite(loss):
            reason = f"non-finite training loss {loss}"
        records.append(
            Epoch(
                epoch=number,
                train_loss=loss,
                test_accuracy=accuracy,
                seconds=seconds,
                cpu_seconds=cpu,
            )
        )
        if on_epoch is not None:
            on_epoch(records[-1])
        if reason:
            break
    return RunResult(
        config=config,
        epochs=tuple(records),
        train_loss=records[-1].train_loss,
        test_accuracy=records[-1].test_accuracy,
        chance=data.chance,
        seconds=sum(r.seconds for r in records),
        diverged=bool(reason),
        reason=reason,
    )
