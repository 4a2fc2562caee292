# SPDX-License-Identifier: MIT
"""Time and memory of one training step, measured on this machine with one thread.

Time is the process's CPU time: with one thread it is the time on an idle machine, and other
processes don't lengthen it by waiting.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpnopt.experiments.models import mlp
from ddpnopt.experiments.optimizers import OptionValue, build_optimizer

MIB = 2**20
CLASSES = 10
# A timed chunk lasts at least this long, far above the clock's and the scheduler's grain.
CHUNK_SECONDS = 0.02


@dataclass(frozen=True)
class Task:
    """One step to measure: an optimizer on a Tanh net with L hidden layers of width X.

    Attributes:
        method: The method's name in tables.
        optimizer: Name in `ddpnopt.experiments.optimizers.OPTIMIZERS`.
        options: Its options.
        lr: Learning rate.
        period: Steps between two decompositions: a timed chunk is a multiple of it.
        batch: B.
        width: X.
        depth: L.
        inputs: Features of a sample; None: X.
    """

    method: str
    optimizer: str
    options: tuple[tuple[str, OptionValue], ...]
    lr: float
    period: int
    batch: int
    width: int
    depth: int
    inputs: int | None = None


class Cost(BaseModel):
    """Cost of one training step.

    Attributes:
        method: The method's name.
        batch: B.
        width: X.
        depth: L.
        backward: CPU milliseconds of the backward pass and the update: the fastest of the chunks.
        step: CPU milliseconds of the whole step, forward pass included: the fastest chunk.
        median: CPU milliseconds of the whole step: the median over the chunks.
        mib: Parameters, optimizer state and the peak of the tensors that a step allocates.
        refused: Why it could not be measured (it does not fit the memory); empty otherwise.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    batch: int
    width: int
    depth: int
    backward: float | None = None
    step: float | None = None
    median: float | None = None
    mib: float | None = None
    refused: str = ""


def machine() -> dict[str, str]:
    """What the figures were measured on: processor, cores, threads, system, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": "1",
        "system": platform.system(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class _Job:
    """A network, its optimizer and one batch."""

    def __init__(self, task: Task) -> None:
        self.task = task
        torch.manual_seed(0)
        inputs = task.inputs or task.width
        self.model = mlp(inputs, CLASSES, task.width, task.depth, "tanh")
        self.x = torch.randn(task.batch, inputs)
        self.y = torch.randint(CLASSES, (task.batch,))
        self.initial = [p.detach().clone() for p in self.model.parameters()]
        built = build_optimizer(task.optimizer, self.model, task.lr, dict(task.options))
        self.optimizer = built.optimizer
        self.spent: list[tuple[float, float]] = []
        self.chunk = task.period

    def warm_up(self) -> None:
        """First calls allocate, choose kernels and decompose; then set the chunk's length."""
        for _ in range(self.task.period + 1):
            self._step()
        _, once = self._step()
        steps = max(1, round(CHUNK_SECONDS / once))
        self.chunk = -(-steps // self.task.period) * self.task.period

    def _step(self) -> tuple[float, float]:
        """One step; returns the CPU seconds of backward pass and update, and of all."""
        start = time.process_time()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        forward = time.process_time()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        end = time.process_time()
        return end - forward, end - start

    def time(self) -> None:
        """Time one chunk from the initial weights."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self.initial, strict=True):
                p.copy_(start)
        times = [self._step() for _ in range(self.chunk)]
        backward, whole = (statistics.fmean(part) for part in zip(*times, strict=True))
        self.spent.append((backward, whole))

    def mib(self) -> float:
        """Tensors held between steps, and the peak of those that a step allocates."""
        # Gradients of the step before, freed in this one, are not in the count: it makes its own.
        self.optimizer.zero_grad()
        with PeakMemory() as memory:
            self._step()
        return float(self._held() + memory.peak) / MIB

    def _held(self) -> int:
        tensors: list[torch.Tensor] = list(self.model.parameters())
        for entry in self.optimizer.state.values():
            tensors += [value for value in entry.values() if isinstance(value, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which every operator's new tensors are counted while they live.

    Torch's own profiler finds the same peak (to 0.3 %: scratch memory inside of operators is not
    seen here), but writes to the terminal.

    Attributes:
        level: Bytes of tensors made in the context that are alive.
        peak: Highest level so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count the storages that its inputs did not have."""
        old = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in old and storage._cdata not in self._alive:
                self._count(storage, storage._cdata, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, key: int, size: int) -> None:
        def gone(_: object) -> None:
            self.level -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.level += size
        self.peak = max(self.peak, self.level)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


@contextmanager
def _quiet() -> Iterator[None]:
    """One thread, no garbage collection, torch's generator as it was."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()


def measure(
    tasks: Sequence[Task],
    rounds: int,
    *,
    memory: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> list[Cost]:
    """Time all tasks in turn, round after round, then measure their memory.

    What slows the machine for a while slows neighbours in a round alike, and the fastest chunk of
    several is the one that was disturbed least.

    Args:
        tasks: What to measure.
        rounds: Chunks timed of each; 0: memory only.
        memory: Measure the memory, too.
        advance: Called after every task of a round, for a progress display.

    Returns:
        A cost for each task, in their order. A step that does not fit the memory is refused by
        its optimizer, which the cost says.
    """
    with _quiet():
        jobs: list[_Job] = []
        refused: dict[int, str] = {}
        for index, task in enumerate(tasks):
            jobs.append(_Job(task))
            try:
                jobs[-1].warm_up()
            except MemoryError as error:
                refused[index] = str(error) or "not enough memory"
        for _ in range(rounds):
            for index, job in enumerate(jobs):
                if index not in refused:
                    job.time()
                advance()
            gc.collect()
        return [_cost(job, memory, refused.get(index, "")) for index, job in enumerate(jobs)]


def _cost(job: _Job, memory: bool, refused: str) -> Cost:
    task = job.task
    found: dict[str, float | None] = {}
    if not refused and job.spent:
        backward, whole = zip(*job.spent, strict=True)
        found["backward"], found["step"] = 1e3 * min(backward), 1e3 * min(whole)
        found["median"] = 1e3 * statistics.median(whole)
    return Cost(
        method=task.method,
        batch=task.batch,
        width=task.width,
        depth=task.depth,
        backward=found.get("backward"),
        step=found.get("step"),
        median=found.get("median"),
        mib=job.mib() if memory and not refused else None,
        refused=refused,
    )
