# SPDX-License-Identifier: MIT
"""Measures one training step: wall time, memory and floating-point operations."""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cases import BASELINE, NETS, VARIANTS
from ddpnopt.testing import Operations

MIB = 2**20
# A timed chunk lasts at least this long, far above the clock's and the scheduler's grain.
CHUNK_SECONDS = 0.03


class Job:
    """A model, its optimizer and one batch: what `step` needs to train once.

    Args:
        net: number of the net in `NETS`.
        variant: name of the optimizer in `VARIANTS`.
        device: torch device.
    """

    def __init__(self, net: int, variant: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.model = NETS[net].build().to(device)
        self.x, self.y = NETS[net].data(device)
        self.initial = [p.detach().clone() for p in self.model.parameters()]
        self.clip = VARIANTS[variant].clip
        self.optimizer = VARIANTS[variant].make(self.model)

    def step(self) -> None:
        """One whole training step: zero_grad, forward, cross-entropy, backward, clip, step."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.x), self.y).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()

    def reset(self) -> None:
        """Put the initial weights back, so that every chunk times the same steps."""
        with torch.no_grad():
            for p, start in zip(self.model.parameters(), self.initial, strict=True):
                p.copy_(start)


@dataclass(frozen=True)
class Timing:
    """Step time of one variant.

    Attributes:
        milliseconds: median time of a step.
        ratio: median over the rounds of its time over the baseline's in the same round.
        low: lower quartile of that ratio.
        high: upper quartile of that ratio.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Footprint:
    """Memory and work of a step, measured in a process of its own.

    Attributes:
        process_mib: peak of the process's resident memory minus what it held before the model was
            made, in MiB. Coarse: it has the allocator's and the kernels' scratch memory in it.
        tensor_mib: parameters, optimizer state and the peak of the tensors that a step allocates,
            in MiB. Repeatable to the byte.
        gflop: 10^9 floating-point operations of the step's matrix products and convolutions.
    """

    process_mib: float
    tensor_mib: float
    gflop: float


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _seconds(job: Job, steps: int, device: str) -> float:
    job.reset()
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        job.step()
    _synchronise(device)
    return (time.perf_counter() - start) / steps


def time_steps(
    net: int,
    variants: Sequence[str],
    rounds: int,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time all variants in turn, round after round, in this process.

    Whatever slows the machine slows neighbours in a round alike, so ratios within a round stay
    honest. The order rotates: no variant always runs after the same one.

    Args:
        net: number of the net in `NETS`.
        variants: names in `VARIANTS`; the baseline is added where it is missing.
        rounds: how often each variant is timed.
        device: torch device.
        advance: called after every timed chunk, for a progress display.

    Returns:
        The timing of each variant, by name.
    """
    names = [BASELINE, *(name for name in variants if name != BASELINE)]
    jobs = {name: Job(net, name, device) for name in names}
    steps = {}
    for name, job in jobs.items():
        _seconds(job, 2, device)  # first calls allocate, choose kernels and fill caches
        once = _seconds(job, 2, device)
        steps[name] = max(1, round(CHUNK_SECONDS / once))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(_seconds(jobs[name], steps[name], device))
                advance()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(seconds[name], seconds[BASELINE]) for name in names}


def _timing(seconds: list[float], baseline: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Timing(1e3 * statistics.median(seconds), statistics.median(ratios), low, high)


def resident_peak() -> float:
    """Peak resident memory of this process, in MiB.

    Linux's own counter is read where it exists: `ru_maxrss` survives `exec`, so a child process
    would report its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def footprint(net: int, variant: str, steps: int = 5, device: str = "cpu") -> Footprint:
    """Measure memory and operations of a step. Call it in a process that did nothing before.

    Args:
        net: number of the net in `NETS`.
        variant: name in `VARIANTS`.
        steps: steps to take before the peak is read.
        device: torch device.

    Returns:
        The footprint. On a GPU `process_mib` is the allocator's peak on the device.
    """
    before = resident_peak()
    job = Job(net, variant, device)
    for _ in range(steps):
        job.step()
    if device.startswith("cuda"):
        process = torch.cuda.max_memory_allocated() / MIB
    else:
        process = resident_peak() - before
    held = _held_bytes(job)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        job.step()
    with Operations() as counter:
        job.step()
    return Footprint(
        process_mib=process,
        tensor_mib=(held + transient_peak(record)) / MIB,
        gflop=counter.total / 1e9,
    )


def _held_bytes(job: Job) -> int:
    """Bytes of parameters and optimizer state; gradients belong to the step that makes them."""
    tensors: list[torch.Tensor] = list(job.model.parameters())
    for entry in job.optimizer.state.values():
        tensors += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def transient_peak(record: profile) -> int:
    """Highest sum of allocations minus releases in a profiled step, in bytes."""
    # `record.events()` folds allocations into the operators that made them; the raw list keeps
    # each one. Blocks from before the step are not in it, so gradients that the step replaces
    # count once, when they are allocated.
    assert record.profiler is not None
    raw = record.profiler.kineto_results.events()
    events = [e for e in raw if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
