# SPDX-License-Identifier: MIT
"""One training run: a configuration in, a result out, the same for the same seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ddpnopt.experiments.checkpoints import Checkpoints
from ddpnopt.experiments.data import Dataset, load
from ddpnopt.experiments.models import build_model, initialise, wants_images
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.nets import negative_elbo
from ddpnopt.experiments.optimizers import Built, OptionValue, build_optimizer
from ddpnopt.experiments.records import Epoch, RunConfig, RunResult
from ddpnopt.experiments.rival_steps import clip_by_unit, sharpened
from ddpnopt.experiments.run_state import Keeper, Progress, RunState, seeded
from ddpnopt.experiments.schedules import Scheduler, build_scheduler
from ddpnopt.losses import MMCLoss

__all__ = ["LOSSES", "Epoch", "Objective", "RunConfig", "RunResult", "check", "train"]


@dataclass(frozen=True)
class Objective:
    """A loss, and how its outputs answer.

    Attributes:
        loss: (outputs, labels) -> mean loss over the batch. Outputs are the network's: (B, C), or
            (B, T, C) for labels (B, T), or several tensors.
        predict: Outputs -> answers of the labels' shape.
        right: (answers, labels) -> how right each answer is, at most 1.
    """

    loss: Callable[[Any, Tensor], Tensor]
    predict: Callable[[Any], Tensor]
    right: Callable[[Tensor, Tensor], Tensor] = torch.eq


def _cross_entropy(classes: int, device: torch.device) -> Objective:
    def loss(z: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z.flatten(0, -2), labels.flatten())

    return Objective(loss, lambda z: z.argmax(-1))


def _mmc(classes: int, device: torch.device) -> Objective:
    # As many features as classes, so that every architecture serves as it is.
    criterion = MMCLoss(classes, classes).to(device)
    return Objective(criterion, criterion.predict)


def _elbo(classes: int, device: torch.device) -> Objective:
    return Objective(negative_elbo, lambda outputs: (outputs[0] > 0).float())


def _mse(classes: int, device: torch.device) -> Objective:
    # Targets have variance 1: the mean over a test part is the share of it that is explained.
    return Objective(
        nn.functional.mse_loss, lambda z: z, lambda z, y: 1.0 - (z - y).square().clamp(max=1e6)
    )


#: Losses by name, each made from the number of classes and the device.
LOSSES: dict[str, Callable[[int, torch.device], Objective]] = {
    "cross_entropy": _cross_entropy,
    "mmc": _mmc,
    "elbo": _elbo,
    "mse": _mse,
}

#: Beginnings of the names of optimizers that must be told a loss they can't recognise.
_TOLD = ("ddpnopt", "vanilla-ddp", "feedback")
_UNKNOWABLE = ("mmc", "mse")


def _options(config: RunConfig) -> dict[str, OptionValue]:
    if config.loss in _UNKNOWABLE and config.optimizer.startswith(_TOLD):
        return {"terminal": config.loss, **config.options}
    return config.options


class _Diverged(Exception):
    """Ends an epoch whose loss is no longer finite."""


@dataclass(frozen=True)
class _Run:
    """The parts of a run that stay the same over its epochs."""

    config: RunConfig
    model: nn.Module
    built: Built
    scheduler: Scheduler | None
    data: Dataset
    objective: Objective

    def epoch(self, progress: Progress, stepped: Callable[[], None]) -> None:
        """Train through the rest of one permutation of the training part.

        Args:
            progress: How far the run has come; goes on with every step.
            stepped: Called after every step.
        """
        order, _ = progress.shuffled(len(self.data.y_train))
        batches = torch.split(order.to(self.data.y_train.device), self.config.batch)
        for index in batches[len(progress.losses) :]:
            start, cpu_start = time.perf_counter(), time.process_time()
            try:
                self._step(index, progress)
            finally:
                progress.seconds += time.perf_counter() - start
                progress.cpu_seconds += time.process_time() - cpu_start
            progress.steps += 1
            stepped()

    def _step(self, index: Tensor, progress: Progress) -> None:
        """One step on the samples of `index`."""
        self.built.optimizer.zero_grad()
        outputs = self.model(self.data.x_train[index])
        loss = self.objective.loss(outputs, self.data.y_train[index])
        progress.losses.append(loss.item())
        if not math.isfinite(progress.losses[-1]):
            raise _Diverged(f"non-finite loss {progress.losses[-1]}")
        loss.backward()  # type: ignore[no-untyped-call]
        self._treat(index)
        before = self._weights() if self.config.record_updates else None
        self.built.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        if before is not None:
            progress.updates.append(float(torch.linalg.vector_norm(self._weights() - before)))

    def _treat(self, index: Tensor) -> None:
        """What a rival does to the gradients between backward pass and step."""
        built = self.built
        if built.sharpness is built.grad_clip is built.unit_clip is None:
            return
        parameters = list(self.model.parameters())
        if built.sharpness is not None:
            with sharpened(parameters, built.sharpness):
                self.built.optimizer.zero_grad()
                outputs = self.model(self.data.x_train[index])
                self.objective.loss(outputs, self.data.y_train[index]).backward()  # type: ignore[no-untyped-call]
        if built.grad_clip is not None:
            clip_grad_norm_(parameters, built.grad_clip)
        if built.unit_clip is not None:
            clip_by_unit(parameters, built.unit_clip)

    def close(self, progress: Progress) -> Epoch:
        """Measure at the end of an epoch, and make the next one the epoch under way."""
        loss, accuracy = self.measure()
        record = Epoch(
            epoch=len(progress.epochs) + 1,
            train_loss=loss,
            test_accuracy=accuracy,
            seconds=progress.seconds,
            cpu_seconds=progress.cpu_seconds,
            running_loss=_mean(progress.losses),
            update_norm=_mean(progress.updates),
        )
        progress.close(record, len(self.data.y_train))
        return record

    def _weights(self) -> Tensor:
        # In double precision: an update far below the weights must not drown in their rounding.
        return torch.cat([p.detach().double().flatten() for p in self.model.parameters()])

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """Return (training loss, test accuracy) with the weights as they are."""
        self.model.eval()
        averaged = self.built.averaged
        if averaged is not None:  # schedule-free methods answer with averaged weights
            averaged.eval()
        data, loss, right = self.data, 0.0, 0.0
        # In parts: the activations of a large set's images would fill the memory.
        for x, y in zip(
            torch.split(data.x_train, _PART), torch.split(data.y_train, _PART), strict=True
        ):
            loss += float(self.objective.loss(self.model(x), y)) * (len(y) / len(data.y_train))
        for x, y in zip(
            torch.split(data.x_test, _PART), torch.split(data.y_test, _PART), strict=True
        ):
            right += float(self.objective.right(self.objective.predict(self.model(x)), y).sum())
        self.model.train()
        if averaged is not None:
            averaged.train()
        return loss, right / data.y_test.numel()


#: Samples evaluated at once.
_PART = 2048


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


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
    data = load(
        config.dataset,
        seed=config.seed,
        scale=config.scale,
        images=wants_images(config.architecture),
        folder=config.data,
        train_samples=config.train_samples,
        test_samples=config.test_samples,
        test_share=config.test_share,
        label_noise=config.label_noise,
    )
    if config.checksum and data.checksum != config.checksum:
        raise ValueError(
            f"data set {config.dataset!r}: the files (checksum {data.checksum}) are not those of "
            f"the configuration (checksum {config.checksum})"
        )
    return data


def _build(config: RunConfig, data: Dataset, device: torch.device) -> _Run:
    objective = lookup(LOSSES, config.loss, "loss")(data.classes, device)
    model = build_model(config.architecture, data.input_shape, data.classes)
    initialise(model, config.initialisation)
    model = model.to(device)
    built = build_optimizer(config.optimizer, model, config.lr, _options(config))
    steps = math.ceil(len(data.y_train) / config.batch) * config.epochs
    scheduler = build_scheduler(config.schedule, built.optimizer, steps)
    return _Run(config, model, built, scheduler, data, objective)


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
        _build(config, data, torch.device("cpu"))


def train(
    config: RunConfig,
    on_epoch: Callable[[Epoch], None] | None = None,
    checkpoints: Checkpoints | None = None,
    on_start: Callable[[int], None] | None = None,
) -> RunResult:
    """Train one network.

    Data, weights and order of the samples follow from `config.seed` alone; the global generators of
    torch, NumPy and Python start from it, and are left as they were.

    Args:
        config: What to run.
        on_epoch: Called after every epoch, for progress displays.
        checkpoints: Where to write checkpoints and whether to go on from one: the result is that of
            the uninterrupted run to the bit, but for its times. None: nothing is written.
        on_start: Called with the number of steps that have been taken before.

    Returns:
        The result. Divergence is a result, never an exception.

    Raises:
        ValueError: Unknown names or options.
        CheckpointError: A checkpoint can't be written, read or used (a `ValueError`).
    """
    device = resolve_device(config.device)
    data = _load(config).to(device)
    with seeded(config.seed, device):
        return _train(_build(config, data, device), on_epoch, checkpoints, on_start)


def _train(
    run: _Run,
    on_epoch: Callable[[Epoch], None] | None,
    checkpoints: Checkpoints | None,
    on_start: Callable[[int], None] | None,
) -> RunResult:
    config, device = run.config, run.data.y_train.device
    keeper = Keeper(
        RunState(config, run.model, run.built.optimizer, run.scheduler, device, run.data.checksum),
        checkpoints,
    )
    progress, reason = keeper.start(), ""
    if on_start is not None:
        on_start(progress.steps)
    while not reason and len(progress.epochs) < config.epochs:
        try:
            run.epoch(progress, partial(keeper.stepped, progress))
        except (_Diverged, FloatingPointError) as error:
            reason = str(error) or type(error).__name__
        record = run.close(progress)
        if not reason and not math.isfinite(record.train_loss):
            reason = f"non-finite training loss {record.train_loss}"
        if on_epoch is not None:
            on_epoch(record)
        if not reason:
            keeper.closed(progress)
    records = progress.epochs
    return RunResult(
        config=config,
        epochs=tuple(records),
        train_loss=records[-1].train_loss,
        test_accuracy=records[-1].test_accuracy,
        chance=run.data.chance,
        seconds=sum(r.seconds for r in records),
        diverged=bool(reason),
        reason=reason,
    )
