# SPDX-License-Identifier: MIT
"""Memory of a large net's training step, measured in a process that does nothing else.

`python -m ddpnopt.experiments.bench.large '{"net": "dense", "variant": "SGD"}'` prints one line.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ddpnopt.experiments.bench.cases import LARGE, SMALL, VARIANTS
from ddpnopt.experiments.bench.measure import MIB, Job, footprint, resident_peak

#: Optimizers that are measured on a large net.
COMPARED = ("SGD", "Adam", "DDPNOpt closed loop", "DDPNOpt closed, no weight grads")
TIMED_STEPS = 3


class LargeCost(BaseModel):
    """Cost of a step on a large net.

    Attributes:
        net: Key in `LARGE`.
        title: The net's title.
        batch: Samples in a step.
        parameters: Number of parameters.
        variant: Name of the optimizer.
        tensor_mib: Peak of live tensors, as in `Footprint`.
        steady_mib: The same after the first steps.
        process_mib: Peak of the process's resident memory (of the allocator's on a GPU) above what
            it held before the model was made. Scratch memory of kernels is in it.
        gflop: 10^9 operations of a step's products.
        milliseconds: Median time of a step.
        losses: Loss before the first and after the last step.
    """

    model_config = ConfigDict(frozen=True)

    net: str
    title: str
    batch: int
    parameters: int
    variant: str
    tensor_mib: float
    steady_mib: float
    process_mib: float
    gflop: float
    milliseconds: float
    losses: tuple[float, float]


def measure_here(net: str, variant: str, device: str, quick: bool) -> LargeCost:
    """Measure in this process, which must not have trained anything before.

    Args:
        net: Key in `LARGE`.
        variant: Name in `VARIANTS`.
        device: Torch device.
        quick: Take the net of `SMALL` instead.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    case = (SMALL if quick else LARGE)[net]
    on_gpu = device.startswith("cuda")
    data = case.data(device)
    before = torch.cuda.memory_reserved(device) / MIB if on_gpu else resident_peak()
    job = Job(case, VARIANTS[variant], device, data)
    first = float(job.step())
    for _ in range(VARIANTS[variant].settle - 1):
        job.step()
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        last = float(job.step())  # reading the loss waits for the device
        times.append(time.perf_counter() - start)
    if not math.isfinite(first + last):
        raise FloatingPointError(f"{variant} on {case.title}: loss {first} became {last}")
    after = torch.cuda.max_memory_reserved(device) / MIB if on_gpu else resident_peak()
    parameters = sum(p.numel() for p in job.model.parameters())
    del job
    cost = footprint(case, VARIANTS[variant], device)
    return LargeCost(
        net=net,
        title=case.title,
        batch=case.batch,
        parameters=parameters,
        variant=variant,
        tensor_mib=cost.tensor_mib,
        steady_mib=cost.steady_mib,
        process_mib=after - before,
        gflop=cost.gflop,
        milliseconds=1e3 * statistics.median(times),
        losses=(first, last),
    )


def measure_apart(net: str, variant: str, device: str, threads: int, quick: bool) -> LargeCost:
    """Measure in a process of its own.

    Args:
        net: Key in `LARGE`.
        variant: Name in `VARIANTS`.
        device: Torch device.
        threads: Torch's threads.
        quick: Take the net of `SMALL` instead.

    Raises:
        RuntimeError: The process failed; its last line is given (too little memory, mostly).
    """
    asked = {"net": net, "variant": variant, "device": device, "quick": quick, "threads": threads}
    command = [sys.executable, "-m", __name__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        why = said[-1] if said else f"ended with status {done.returncode} (too little memory?)"
        raise RuntimeError(f"{variant} on {net}: {why}")
    return LargeCost.model_validate_json(done.stdout.splitlines()[-1])


def _main(text: str) -> None:
    asked: dict[str, Any] = json.loads(text)
    torch.set_num_threads(asked.pop("threads"))
    sys.stdout.write(measure_here(**asked).model_dump_json() + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
