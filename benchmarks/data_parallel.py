# SPDX-License-Identifier: MIT
"""A step over several processes of this machine: weak and strong scaling, and where the time goes.

Strong scaling shares one batch out, weak scaling gives each process a whole one. All ways are timed
in turn, round by round, so that a busy machine is busy for all of them; the figure is the lower
tenth over the rounds of the slowest rank. Processes have one thread each.

Examples:
    python benchmarks/data_parallel.py --page docs/data_parallel.md
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpnopt import DDPNOpt, Feedback, open_loop
from ddpnopt.experiments.bench.cases import NETS
from ddpnopt.experiments.markdown import update_page


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The plain optimizer."""
    return torch.optim.SGD(model.parameters(), 0.01)


def opened(model: nn.Module) -> torch.optim.Optimizer:
    """The same, re-weighted in open loop."""
    optimizer = sgd(model)
    open_loop(model, optimizer)
    return optimizer


#: By name: how the optimizer is made, and whether DistributedDataParallel averages.
WAYS: dict[str, tuple[Callable[[nn.Module], torch.optim.Optimizer], bool]] = {
    "SGD, DDP": (sgd, True),
    "open loop, DDP": (opened, True),
    "closed loop, DDP": (lambda m: DDPNOpt(m, lr=0.01), True),
    "closed loop": (lambda m: DDPNOpt(m, lr=0.01), False),
    "closed loop, two_bucket": (lambda m: DDPNOpt(m, lr=0.01, communication="two_bucket"), True),
    "closed loop, AdamW": (lambda m: DDPNOpt(m, lr=1e-3, curvature="adamw"), True),
    "closed loop around AdamW": (
        lambda m: Feedback(m, torch.optim.AdamW(m.parameters(), lr=1e-3)),
        True,
    ),
}


class Counter:
    """Counts collectives and the numbers in them."""

    def __init__(self) -> None:
        self.calls = self.numbers = 0
        self._reduce, self._gather = dist.all_reduce, dist.all_gather

    def __enter__(self) -> Counter:
        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.numbers += tensor.numel()
            return self._reduce(tensor, *args, **kwargs)

        def all_gather(found: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self._gather(found, tensor, *args, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *exception: object) -> None:
        dist.all_reduce, dist.all_gather = self._reduce, self._gather


def step_of(way: str, number: int, samples: int, several: bool) -> Callable[[], None]:
    """One training step on a fixed batch."""
    torch.manual_seed(0)
    net = NETS[number]
    make, wrapped = WAYS[way]
    inner = net.build()
    optimizer = make(inner)
    model = DistributedDataParallel(inner) if several and wrapped else inner
    x, y = net.data()
    repeats = -(-samples // len(y))
    x, y = (torch.cat([one] * repeats)[:samples] for one in (x, y))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def latency(size: int, rounds: int = 200) -> float:
    """Microseconds of one all_reduce of so many float32 numbers."""
    vector = torch.zeros(size)
    for _ in range(10):
        dist.all_reduce(vector)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        dist.all_reduce(vector)
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times)


def measure(nets: list[int], rounds: int, processes: int) -> dict[str, Any]:
    """Milliseconds of a step by net, way and share of the batch, on this rank."""
    found: dict[str, Any] = {}
    for number in nets:
        batch = NETS[number].batch
        shares = (
            {"whole": batch} if processes == 1 else {"weak": batch, "strong": batch // processes}
        )
        steps = {
            (way, share): step_of(way, number, samples, processes > 1)
            for way in WAYS
            for share, samples in shares.items()
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        for step in steps.values():
            for _ in range(3):
                step()
        for _ in range(rounds):
            for key, step in steps.items():
                begun = time.perf_counter()
                step()
                times[key].append(time.perf_counter() - begun)
        for (way, share), seconds in times.items():
            with Counter() as counter:
                steps[way, share]()
            found[f"{number}|{way}|{share}"] = {
                "ms": [1e3 * one for one in seconds],
                "calls": counter.calls,
                "numbers": counter.numbers,
            }
    if processes > 1:
        found["latency"] = {size: latency(size) for size in (1, 1_000, 100_000, 1_000_000)}
    return found


def quick(times: list[float]) -> float:
    """The lower tenth: what a step takes when nobody else wants the cores."""
    return statistics.quantiles(times, n=10)[0]


def rank_main(rank: int, processes: int, folder: str, nets: list[int], rounds: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if processes > 1:
        init = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=processes)
    found = measure(nets, rounds, processes)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    if processes > 1:
        dist.destroy_process_group()


def launch(processes: int, nets: list[int], rounds: int) -> list[dict[str, Any]]:
    """Every rank's figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rounds", str(rounds), "--folder", folder]
        command += [part for number in nets for part in ("--net", str(number))]
        command += ["--processes", str(processes)]
        running = [subprocess.Popen([*command, "--rank", str(r)]) for r in range(processes)]
        assert [one.wait() for one in running] == [0] * processes
        return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(processes)]


def tables(
    nets: list[int],
    single: dict[str, Any],
    ranks: list[dict[str, Any]],
    rounds: int,
    load: str,
) -> str:
    """The figures in Markdown."""

    def figure(key: str) -> float:
        slowest = [max(times) for times in zip(*(one[key]["ms"] for one in ranks), strict=True)]
        return quick(slowest)

    lines = [
        f"{len(ranks)} gloo processes of one thread on a machine with {os.cpu_count()} cores, "
        f"{rounds} rounds, torch {torch.__version__}; load before the measurement {load}.",
    ]
    for number in nets:
        lines += ["", f"{NETS[number].title}, batch {NETS[number].batch}:", ""]
        header = "way | 1 process, ms | strong | speed-up | weak | efficiency | exchanges | numbers"
        lines += [f"| {header} |", "|---" * 8 + "|"]
        for way in WAYS:
            alone = quick(single[f"{number}|{way}|whole"]["ms"])
            strong, weak = (figure(f"{number}|{way}|{share}") for share in ("strong", "weak"))
            one = ranks[0][f"{number}|{way}|weak"]
            lines.append(
                f"| {way} | {alone:.2f} | {strong:.2f} | {alone / strong:.2f} | {weak:.2f} | "
                f"{alone / weak:.2f} | {one['calls']} | {one['numbers']:,} |"
            )
    slowest = [max(one["latency"][size] for one in ranks) for size in ranks[0]["latency"]]
    named = [
        f"{us:.0f} us for {int(n):,}" for us, n in zip(slowest, ranks[0]["latency"], strict=True)
    ]
    return "\n".join([*lines, "", f"One `all_reduce`, by numbers: {'; '.join(named)}."])


def main(
    processes: Annotated[int, typer.Option(help="Processes beside the single one.")] = 2,
    rounds: Annotated[int, typer.Option(help="Steps of each kind.")] = 30,
    net: Annotated[list[int] | None, typer.Option(help="Of `ddpnopt bench`.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the tables there, too.")] = None,
    rank: Annotated[int, typer.Option(hidden=True)] = -1,
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Print tables in Markdown; write them between a page's marks."""
    nets = net or [1, 2]
    if rank >= 0:
        rank_main(rank, processes, folder, nets, rounds)
        return
    before = f"{os.getloadavg()[0]:.1f}"
    single = launch(1, nets, rounds)[0]
    ranks = launch(processes, nets, rounds)
    text = tables(nets, single, ranks, rounds, before)
    print(text)
    if page is not None:
        page.write_text(update_page(page.read_text(), text, "scaling"))


if __name__ == "__main__":
    typer.run(main)
