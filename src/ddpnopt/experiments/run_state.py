# SPDX-License-Identifier: MIT
"""All that decides how a training goes on, as tensors and plain values, and back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpnopt.experiments.checkpoints import CheckpointError, Checkpoints
from ddpnopt.experiments.fingerprint import code_hash, package_version
from ddpnopt.experiments.records import Epoch, RunConfig
from ddpnopt.experiments.schedules import Scheduler, fits_any_length

#: What plain values of the wrong kind raise where they are unpacked, by torch and NumPy, too.
_MISFITS = (
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        order: State of the generator of the samples' order, at the start of the epoch under way.
        epochs: Records of the finished epochs.
        losses: Losses that the steps of the epoch under way saw, each before its step.
        updates: Norms of their updates, where they are recorded.
        seconds: Seconds in them.
        cpu_seconds: The process's CPU time in them.
        steps: Steps of all epochs.
    """

    order: Tensor
    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: int = 0

    def shuffled(self, samples: int) -> tuple[Tensor, Tensor]:
        """The order of so many samples in the epoch under way, and the state behind it."""
        generator = torch.Generator()
        generator.set_state(self.order)
        return torch.randperm(samples, generator=generator), generator.get_state()

    def close(self, record: Epoch, samples: int) -> None:
        """Make the next epoch the one under way."""
        _, self.order = self.shuffled(samples)
        self.epochs.append(record)
        self.losses, self.updates = [], []
        self.seconds = self.cpu_seconds = 0.0

    @classmethod
    def beginning(cls, seed: int) -> Progress:
        """Of a training whose samples are ordered by `seed`."""
        return cls(torch.Generator().manual_seed(seed).get_state())

    def plain(self) -> dict[str, Any]:
        """As tensors and plain values."""
        return {**vars(self), "epochs": [epoch.model_dump() for epoch in self.epochs]}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Progress:
        """What `plain` returned, back.

        Raises:
            TypeError: Something is of another kind than what `plain` returns.
            ValueError: An epoch's record is none.
            RuntimeError: The order is no state of a generator.
        """
        progress = cls(**{**plain, "epochs": [Epoch(**epoch) for epoch in plain["epochs"]]})
        torch.Generator().set_state(progress.order)
        numbers = [*progress.losses, *progress.updates, progress.seconds, progress.cpu_seconds]
        if not all(isinstance(number, float | int) for number in (*numbers, progress.steps)):
            raise TypeError("losses, updates, seconds and steps must be numbers")
        return progress


@dataclass(frozen=True)
class RunState:
    """A training's parts that change, seen from its checkpoints.

    Attributes:
        config: What is run.
        model: The network.
        optimizer: Its optimizer.
        scheduler: Of the learning rate; None where it is constant.
        device: Where it runs.
        data: Checksum of the data set's files.
    """

    config: RunConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    device: torch.device
    data: str

    def capture(self, progress: Progress) -> dict[str, Any]:
        """Return everything, as tensors and plain values."""
        return {
            "settings": self._settings(),
            "made_by": self._makers(),
            "progress": progress.plain(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generators": generators(self.device),
        }

    def _settings(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json"), "checksum": self.data}

    def _makers(self) -> dict[str, str]:
        """What else the last bit of a number depends on."""
        return {
            "code": code_hash(),
            "ddpnopt": package_version(),
            "torch": str(torch.__version__),
            "threads": str(torch.get_num_threads()),
            "device": self.device.type,
        }

    def restore(self, path: Path, state: Mapping[str, Any], checkpoints: Checkpoints) -> Progress:
        """Go back to where `capture` was called.

        Args:
            path: The file that `state` comes from, for messages.
            state: What `capture` returned.
            checkpoints: Is told where the rest may differ in the last bits.

        Returns:
            How far the training had come.

        Raises:
            CheckpointError: The state is of another training: other settings, data, network or
                optimizer.
        """
        try:
            self._compare(path, state["settings"])
            progress = Progress.of(state["progress"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            set_generators(state["generators"], self.device)
            made_by = dict(state["made_by"])
        except CheckpointError:
            raise
        except _MISFITS as error:
            raise CheckpointError(
                f"the checkpoint {path} is not of this training: {type(error).__name__}: {error}"
            ) from error
        if len(progress.epochs) > self.config.epochs:
            raise CheckpointError(
                f"the checkpoint {path} has {len(progress.epochs)} epochs behind it, "
                f"{self.config.epochs} are asked for"
            )
        here = self._makers()
        changed = [
            f"{k} {made_by.get(k)}, here {v}" for k, v in here.items() if made_by.get(k) != v
        ]
        if changed:
            checkpoints.tell(
                f"{path} was made by another version or elsewhere ({'; '.join(changed)}): the rest "
                "may differ from an uninterrupted training in the last bits"
            )
        return progress

    def _compare(self, path: Path, found: Mapping[str, Any]) -> None:
        """Refuse what was made with other settings."""
        # Where it runs is free, and how long, unless the rate depends on it.
        free = {"device", "epochs"} if fits_any_length(self.config.schedule) else {"device"}
        wanted = self._settings()
        differences = [
            f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
            for name in sorted({*found, *wanted} - free)
            if repr(found.get(name)) != repr(wanted.get(name))
        ]
        if differences:
            raise CheckpointError(
                f"the checkpoint {path} is of another training: {'; '.join(differences)}. Give "
                "its settings, or another folder"
            )


class Keeper:
    """Writes a training's checkpoints, where it has any.

    Args:
        state: The training's parts.
        checkpoints: Where and how often; None: nothing is written.
    """

    def __init__(self, state: RunState, checkpoints: Checkpoints | None) -> None:
        self._state, self._checkpoints = state, checkpoints

    def start(self) -> Progress:
        """Where the training begins or goes on.

        Raises:
            CheckpointError: It can't go on from what is there.
        """
        found = None if self._checkpoints is None else self._checkpoints.start()
        if found is None or self._checkpoints is None:
            return Progress.beginning(self._state.config.seed)
        return self._state.restore(*found, self._checkpoints)

    def stepped(self, progress: Progress) -> None:
        """After a step."""
        every = None if self._checkpoints is None else self._checkpoints.every
        if every is not None and progress.steps % every == 0:
            self._save(progress)

    def closed(self, progress: Progress) -> None:
        """After an epoch."""
        if self._checkpoints is None:
            return
        last = len(progress.epochs) == self._state.config.epochs
        if last or self._checkpoints.every is None:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        assert self._checkpoints is not None
        self._checkpoints.save(progress.steps, self._state.capture(progress))


def generators(device: torch.device) -> dict[str, Any]:
    """States of the global generators of torch, NumPy and Python, as tensors and plain values.

    Args:
        device: A GPU's generator is among them if this is one.
    """
    # As a dictionary, NumPy's state is plain but for its words.
    state: dict[str, Any] = np.random.get_state(legacy=False)
    words, position = state["state"]["key"], state["state"]["pos"]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [words.tolist(), int(position), int(state["has_gauss"]), float(state["gauss"])],
        "python": random.getstate(),
    }


def set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the global generators back.

    Args:
        states: What `generators` returned. Without a GPU's state, its generator stays as it is.
        device: Where the training runs.
    """
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    words, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, gauss))
    random.setstate(states["python"])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the global generators start from `seed`, and be afterwards as they were.

    Args:
        seed: For all of them.
        device: Where the training runs.
    """
    numpy, python = np.random.get_state(), random.getstate()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        np.random.set_state(numpy)
        random.setstate(python)
