# SPDX-License-Identifier: MIT
"""Kill trainings at random moments and resume them: `python benchmarks/killed_trainings.py`.

Real processes of `ddpnopt train --checkpoint DIR --checkpoint-every 1 --resume` get SIGKILL at a
random moment, some trainings with a writer slowed down so that most kills fall into it. After the
kills of a training its last process runs to the end, and the newest checkpoint, result.json,
curve.csv and curve.png are compared with those of an uninterrupted training: all but the times
must be the same to the bit. Of the checkpoints, every kill must leave a newest one that is whole
and not older than before.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ddpnopt.experiments import checkpoints as files
from ddpnopt.experiments.checkpoints import Checkpoints, read_checkpoint

TRAININGS = (
    "ddpnopt -O gram=sketch -a cnn-4 -d digits --train-samples 400 --schedule cosine",
    "ddpnopt-ekfac -a mlp-20x4-tanh -d wine --schedule one-cycle",
    "ddpnopt-kfac-open-loop -O momentum=0.9 -a mlp-20x4-tanh -d wine",
    "feedback-adamw -a mlp-20x4-tanh -d wine --schedule linear",
    "muon -a mlp-20x4-relu-bn -d wine",
    "emsa -a mlp-8x2-tanh -d wine",
    "vanilla-ddp -a mlp-8x2-tanh -d wine",
    "ddpnopt -O weight_gradients=False -a mlp-20x4-tanh -d wine",
    "sgd-vgr -a mlp-20x4-tanh -d wine",
    "ddpnopt-low-rank -a transformer-16x1 -d digits --train-samples 200",
)
EPOCHS, BATCH, LR = 8, 16, 0.02


def slow(self: Any, content: bytes, write: Any = files._Sealing.write) -> int:
    """Write a few kilobytes at a time, each to the disk before the next."""
    for place in range(0, len(content), 2000):
        write(self, content[place : place + 2000])
        self._file.flush()
        time.sleep(0.002)
    return len(content)


def child(arguments: list[str]) -> None:
    """The command line, with the slow writer where the first argument says so."""
    from ddpnopt.experiments.commands import app

    if arguments[0] == "slow":
        files._Sealing.write = slow  # type: ignore[method-assign]
    app(["train", *arguments[1:]])


def start(training: str, folder: Path, writer: str) -> subprocess.Popen[bytes]:
    """Start `ddpnopt train` in a process of its own."""
    name, *options = training.split()
    command = [sys.executable, __file__, "child", writer, "-m", name, *options]
    command += ["-e", str(EPOCHS), "-b", str(BATCH), "-l", str(LR), "-o", str(folder / "out")]
    command += ["--checkpoint", str(folder / "c"), "--checkpoint-every", "1", "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end; an error ends this program."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors.decode())


def newest(folder: Path) -> Path | None:
    """The newest checkpoint."""
    return next(iter(Checkpoints(folder / "c").files()), None)


def kill(training: str, folder: Path, writer: str, generator: random.Random) -> bool:
    """Kill a training at a random moment after its first write; was it writing?"""
    place = folder / "c"
    before = set(place.iterdir()) if place.exists() else set()
    process = start(training, folder, writer)
    while process.poll() is None and not (place.exists() and set(place.iterdir()) - before):
        time.sleep(0.002)
    time.sleep(generator.random())
    process.kill()
    process.communicate()
    return bool(list(place.glob("*.part")))


def plain(node: Any) -> Any:
    """As nested lists of text and bytes, times left out."""
    if isinstance(node, torch.Tensor):
        bits = node.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(node.dtype), list(node.shape), bits]
    if isinstance(node, dict):
        return [[k, plain(v)] for k, v in node.items() if k not in ("seconds", "cpu_seconds")]
    return [plain(v) for v in node] if isinstance(node, (list, tuple)) else repr(node)


def outcome(folder: Path) -> tuple[Any, ...]:
    """All that a training leaves, times left out."""
    path = newest(folder)
    assert path is not None
    out = folder / "out"
    curve = [row.rpartition(",")[0] for row in (out / "curve.csv").read_text().splitlines()]
    record = plain(json.loads((out / "result.json").read_text()))
    return plain(read_checkpoint(path)), record, curve, (out / "curve.png").read_bytes()


def main(
    kills: Annotated[int, typer.Option(help="Of all trainings together.")] = 50,
    seed: Annotated[int | None, typer.Option(help="Of the moments; not given: the time.")] = None,
) -> None:
    """Kill, resume, compare."""
    seed = time.time_ns() if seed is None else seed
    generator, done, writing, wrong = random.Random(seed), 0, 0, 0
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as name:
        for number, training in enumerate(TRAININGS):
            straight, folder = Path(name) / f"{number}-straight", Path(name) / f"{number}-killed"
            finish(start(training, straight, "plain"))
            step, own = 0, 0
            for _ in range(kills * (number + 1) // len(TRAININGS) - done):
                own += kill(training, folder, ("plain", "slow")[number % 2], generator)
                path, done = newest(folder), done + 1
                now = read_checkpoint(path)["progress"]["steps"] if path is not None else 0
                assert now >= step, f"{training}: {step} steps were kept, {now} are left"
                step = now
            finish(start(training, folder, "plain"))
            same = outcome(straight) == outcome(folder)
            wrong, writing = wrong + (not same), writing + own
            print(f"{training}: last kill behind step {step}, {own} writes killed, same: {same}")
    print(f"{done} kills, {writing} of them in the middle of writing; {wrong} trainings differ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2:])
    else:
        typer.run(main)
