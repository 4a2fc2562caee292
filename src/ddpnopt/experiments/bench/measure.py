# SPDX-License-Identifier: MIT
"""Measures a training step: wall time, live tensors and floating-point operations."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddpnopt
from ddpnopt.experiments.bench.cases import BASELINE, Net, Variant
from ddpnopt.experiments.reproduce.step_cost import PeakMemory
from ddpnopt.testing import Operations

MIB = 2**20
#: A timed chunk lasts at least this long, far above the clock's and the scheduler's grain.
CHUNK_SECONDS = 0.05
#: Chunks of a recorded variant that go before the timed ones.
SETTLING = 20


Recorded = ddpnopt.CapturedStep | ddpnopt.CapturedUpdate | ddpnopt.CapturedLoop


class Job:
    """A model, its optimizer and one batch: what `step` needs to train once.

    Args:
        net: The net.
        variant: The optimizer.
        device: Torch device.
        data: The batch; None: the net's own.

    Attributes:
        loss: The last step's loss.
        compiled: Its iterations, or its steps, are run from a compiled record.
    """

    def __init__(
        self,
        net: Net,
        variant: Variant,
        device: str = "cpu",
        data: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = net.build().to(device)
            self.optimizer = variant.make(self.model)
        self.x, self.y = net.data(device) if data is None else data
        self.clip, self.device, self.loss = variant.clip, device, 0.0
        self.compiled = variant.compiled
        self.net = net
        self._initial: list[Tensor] = []
        self._iteration: ddpnopt.CapturedStep | None = None
        self._update: Recorded | None = None
        if variant.captured:
            optimizer, compiled = self.optimizer, self.compiled
            assert isinstance(optimizer, ddpnopt.DDPNOpt | ddpnopt.Feedback)
            if variant.captured.startswith("step"):
                self._update = ddpnopt.capture(optimizer, compile=compiled)
            elif variant.captured.startswith("loop"):
                self._update = ddpnopt.capture(optimizer, compile=compiled, passes=True)
            else:
                self._iteration = ddpnopt.capture(
                    optimizer, lambda x, y: net.objective(self.model, x, y), compile=compiled
                )

    def step(self) -> Tensor:
        """One whole training step: zero_grad, forward, loss, backward, clip, step.

        Returns:
            The loss before the step.
        """
        if self._iteration is not None:
            loss: Tensor = self._iteration(self.x, self.y)
            self._check(self._iteration)
            return loss
        self.optimizer.zero_grad()
        loss = self.net.objective(self.model, self.x, self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self._update is not None:
            self._check(self._update)
        return loss.detach()

    def _check(
        self, record: ddpnopt.CapturedStep | ddpnopt.CapturedUpdate | ddpnopt.CapturedLoop
    ) -> None:
        """It must be the record that is measured."""
        if record.reason:
            raise RuntimeError(f"not run from a record: {record.reason}")
        if self.compiled and not record.compiles:
            raise RuntimeError("torch's compiler failed: not run from a compiled record")

    def remember(self) -> None:
        """Keep the weights for `reset`."""
        self._initial = [p.detach().clone() for p in self.model.parameters()]

    def reset(self) -> None:
        """Put the weights back, so that every chunk times the same steps."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self._initial, strict=True):
                p.copy_(start)

    def seconds(self, steps: int) -> float:
        """Mean time of a step over some steps from the same weights."""
        self.reset()
        if not self.device.startswith("cuda"):
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            return (time.perf_counter() - start) / steps
        begin, end = (_event() for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(steps):
            self.step()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3 / steps


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Timing:
    """Step time of one variant.

    Attributes:
        milliseconds: Median time of a step.
        ratio: Median over the rounds of its time over the mean of the baseline's chunks right
            before and after it.
        low: Lower quartile of that ratio.
        high: Upper quartile of that ratio.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float


class _Clock:
    """One variant's job and its chunks: (its seconds a step, the baseline's around it)."""

    def __init__(self, net: Net, variant: Variant, device: str) -> None:
        self.job = Job(net, variant, device)
        self.job.remember()
        self.job.seconds(variant.settle)
        # First calls allocate, choose kernels and decompose; the second period is as all others.
        self.job.seconds(variant.period)
        once = self.job.seconds(variant.period)
        self.steps = variant.period * max(1, round(CHUNK_SECONDS / (once * variant.period)))
        if variant.captured:  # a new record is compared with the code more often than later on
            self.job.seconds(variant.period * (SETTLING * self.steps // variant.period))
        self.chunks: list[tuple[float, float]] = []

    def chunk(self) -> float:
        return self.job.seconds(self.steps)

    @property
    def timing(self) -> Timing:
        own = [seconds for seconds, _ in self.chunks]
        ratios = [seconds / base for seconds, base in self.chunks]
        several = len(ratios) > 1
        low, _, high = statistics.quantiles(ratios, method="inclusive") if several else ratios * 3
        return Timing(1e3 * statistics.median(own), statistics.median(ratios), low, high)


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def time_steps(
    net: Net,
    variants: Mapping[str, Variant],
    rounds: int,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time all variants in turn, round after round, in this process.

    Every chunk of a variant has a chunk of the baseline on either side, and its ratio is to their
    mean: what slows the machine slows the three alike, so the ratio stays honest. The order
    rotates, so that no variant always runs after the same one.

    Args:
        net: The net.
        variants: Optimizers by name, the baseline among them.
        rounds: How often each variant is timed.
        device: Torch device.
        advance: Called after every chunk of a variant, for a progress display.

    Returns:
        The timing of each variant, by name; and why the others could not be timed. The baseline's
        own ratio is that of a chunk to its neighbours: its quartiles show the noise.
    """
    clocks: dict[str, _Clock] = {}
    errors: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            clocks[name] = _Clock(net, variant, device)
        except Exception as error:  # one that fails must not cost the figures of all others
            errors[name] = f"{type(error).__name__}: {error}"
    names, base = list(clocks), clocks[BASELINE]
    with _no_collection():
        for turn in range(rounds):
            shift = turn % len(names)
            before = base.chunk()
            for name in names[shift:] + names[:shift]:
                own = clocks[name].chunk()
                after = base.chunk()
                clocks[name].chunks.append((own, (before + after) / 2))
                before = after
                advance()
            gc.collect()
    return {name: clock.timing for name, clock in clocks.items()}, errors


@dataclass(frozen=True)
class Footprint:
    """Memory and work of a step.

    Attributes:
        tensor_mib: Peak of all live tensors from the model's construction on, without the batch,
            in MiB: parameters, gradients, optimizer state, whatever the optimizer keeps between
            steps and allocates within them. On a GPU the allocator's peak.
        steady_mib: The same after the first steps, in which a DDPNOpt checks its linear maps.
        held_mib: Live tensors between two steps.
        gflop: 10^9 operations of a step's products and convolutions, see `operations`.
    """

    tensor_mib: float
    steady_mib: float
    held_mib: float
    gflop: float


def footprint(net: Net, variant: Variant, device: str = "cpu") -> Footprint:
    """Measure memory and operations of a step.

    Args:
        net: The net.
        variant: The optimizer.
        device: Torch device.
    """
    data = net.data(device)
    gc.collect()  # what others have left must not be freed, or counted, in between
    measured = _cuda_memory if device.startswith("cuda") else _tensor_memory
    job, (peak, steady, held) = measured(net, variant, device, data)
    gflop = operations(job, variant.period) / 1e9
    return Footprint(peak / MIB, steady / MIB, held / MIB, gflop)


def operations(job: Job, steps: int) -> float:
    """Operations of a step's products and convolutions, the mean over some steps.

    By torch's `FlopCounterMode`. Its hooks on modules forbid `autograd.grad` for inner tensors,
    which E-MSA calls; there the library's own counter counts the same operators without hooks.
    Neither sees decompositions, triangular solves and whatever works element by element.

    Args:
        job: What to run, past its first steps.
        steps: Steps to take.
    """
    try:
        with FlopCounterMode(display=False) as standard:
            for _ in range(steps):
                job.step()
        return float(standard.get_total_flops()) / steps
    except RuntimeError:
        with Operations() as own:
            for _ in range(steps):
                job.step()
        return float(own.total) / steps


Memory = tuple[Job, tuple[float, float, float]]


def _tensor_memory(net: Net, variant: Variant, device: str, data: tuple[Tensor, Tensor]) -> Memory:
    with PeakMemory() as memory:
        job = Job(net, variant, device, data)
        for _ in range(variant.settle):
            job.step()
        first, memory.peak = memory.peak, memory.level
        for _ in range(variant.period + 1):
            job.step()
        found = max(first, memory.peak), memory.peak, memory.level
    return job, found


def _cuda_memory(net: Net, variant: Variant, device: str, data: tuple[Tensor, Tensor]) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job = Job(net, variant, device, data)
    for _ in range(variant.settle):
        job.step()
    first = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(variant.period + 1):
        job.step()
    torch.cuda.synchronize(device)
    later, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    return job, (max(first, later) - before, later - before, held - before)


def resident_peak() -> float:
    """Peak resident memory of this process, in MiB.

    Linux's own counter is read where it exists: `ru_maxrss` survives `exec`, so a child process
    would report its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
