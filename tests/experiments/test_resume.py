# SPDX-License-Identifier: MIT
"""Trainings that are killed and go on: the same to the bit as those that are not."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import random
import signal
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from ddpnopt.experiments import training
from ddpnopt.experiments.checkpoints import (
    CheckpointError,
    Checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from ddpnopt.experiments.commands import app
from ddpnopt.experiments.records import RunConfig
from ddpnopt.experiments.training import train
from experiments.train_program import SMALL, check_resume, differences, final, main
from oracles.effort import effort
from oracles.processes import FORKS

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
FOLDER = Path(__file__).parents[1]
#: Kills of the test; more on demand.
KILLS = effort("DDPNOPT_KILLS", 6, 40)
#: Steps of an epoch on WINE's 142 training samples.
EPOCH = 4


@pytest.fixture(autouse=True)
def importable_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    search = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", search)


@pytest.mark.parametrize(
    ("every", "at"), [(None, EPOCH), (1, EPOCH), (1, EPOCH - 1), (1, EPOCH + 1), (5, 5)]
)
def test_wherever_in_an_epoch(every: int | None, at: int, tmp_path: Path) -> None:
    check_resume(SMALL, tmp_path, every, at)


def test_a_longer_training_goes_on_from_a_shorter_one(tmp_path: Path) -> None:
    train(SMALL, None, Checkpoints(tmp_path / "resumed"))
    longer = SMALL.model_copy(update={"epochs": 4})
    train(longer, None, Checkpoints(tmp_path / "straight"))
    seen: list[int] = []
    resumed = Checkpoints(tmp_path / "resumed", resume=True)
    train(longer, lambda e: seen.append(e.epoch), resumed)
    assert seen == [3, 4]
    one, other = final(tmp_path / "straight"), final(tmp_path / "resumed")
    assert differences(one, other) == []
    # What is done is not trained again, and less than what is done can't be asked for.
    assert train(longer, lambda e: seen.append(e.epoch), resumed).epochs[-1].epoch == 4
    assert seen == [3, 4]
    with pytest.raises(CheckpointError, match="4 epochs behind it, 2 are asked for"):
        train(SMALL, None, resumed)
    # A rate that falls to 0 at the end has another course in a longer training.
    falling = SMALL.model_copy(update={"schedule": "cosine"})
    train(falling, None, Checkpoints(tmp_path / "falling"))
    with pytest.raises(CheckpointError, match="epochs is 2 there and 3 here"):
        train(
            falling.model_copy(update={"epochs": 3}),
            None,
            Checkpoints(tmp_path / "falling", resume=True),
        )


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"architecture": "mlp-8x1-tanh"}, "architecture is 'mlp-8x2-tanh' there"),
        ({"optimizer": "sgd"}, "optimizer is 'ddpnopt' there and 'sgd' here"),
        ({"dataset": "digits"}, "dataset is 'wine' there and 'digits' here"),
        ({"lr": 0.1}, "lr is 0.05 there and 0.1 here"),
        ({"options": {"momentum": 0.9}}, "options is {} there"),
        ({"seed": 1, "batch": 8}, "batch is 36 there and 8 here; seed is 0 there and 1 here"),
        ({"schedule": "cosine"}, "schedule is 'constant' there"),
    ],
)
def test_another_trainings_checkpoint_is_refused(
    update: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train(SMALL, None, Checkpoints(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="another training") as error:
        train(SMALL.model_copy(update=update), None, Checkpoints(tmp_path, resume=True))
    assert message in str(error.value) and str(Checkpoints(tmp_path).files()[0]) in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_data_under_the_same_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(SMALL, None, Checkpoints(tmp_path))
    load = training._load
    from dataclasses import replace

    monkeypatch.setattr(training, "_load", lambda c: replace(load(c), checksum="abc"))
    with pytest.raises(CheckpointError, match="checksum is '' there and 'abc' here"):
        train(SMALL, None, Checkpoints(tmp_path, resume=True))


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, resume=True)
    train(SMALL, None, Checkpoints(tmp_path))
    path = checkpoints.files()[0]
    whole = read_checkpoint(path)
    for part, value in (("model", {}), ("optimizer", {"state": {}}), ("progress", {"order": 1})):
        write_checkpoint(path, {**whole, part: value})
        with pytest.raises(CheckpointError, match="is not of this training") as error:
            train(SMALL, None, checkpoints)
        assert str(path) in str(error.value)


def _places(node: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything inside a state."""
    inside = node.items() if isinstance(node, dict) else ()
    inside = enumerate(node) if isinstance(node, list | tuple) else inside
    return [path, *(place for key, value in inside for place in _places(value, (*path, key)))]


def _changed(node: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node, dict):
        return {**node, key: _changed(node[key], rest, value)}
    changed = [_changed(one, rest, value) if i == key else one for i, one in enumerate(node)]
    return tuple(changed) if isinstance(node, tuple) else changed


def test_states_that_are_changed_anywhere(tmp_path: Path) -> None:
    """Whole files of a content that no training has written: a training, or the path and why."""
    checkpoints = Checkpoints(tmp_path, resume=True)
    train(SMALL, None, Checkpoints(tmp_path))
    path = checkpoints.files()[0]
    whole = read_checkpoint(path)
    chance = random.Random(0)
    places = _places(whole)
    # The generators' words are most of the places, and all alike.
    few = [place for place in places if not (place[:1] == ("generators",) and len(place) > 3)]
    given = (None, -1, 2**70, "a", 1.5, math.nan, [], {}, (), torch.zeros(3), torch.zeros(0), True)
    refused = 0
    for _ in range(effort("DDPNOPT_EXAMPLES", 50, 500)):
        for other in checkpoints.files():
            other.unlink()
        place = chance.choice(few[1:])
        write_checkpoint(path, _changed(whole, place, chance.choice(given)))
        try:
            train(SMALL, None, checkpoints)
        except CheckpointError as error:
            assert str(path) in str(error), (place, error)
            refused += 1
    assert refused > 9
    for other in checkpoints.files():
        other.unlink()
    for content in ({}, {"state": 1}, {"state": None}):
        body = io.BytesIO()
        torch.save({"kind": "ddpnopt checkpoint", "format": 1, **content}, body)
        seal = f"\nddpnopt checkpoint, sha256 {sha256(body.getvalue()).hexdigest()}\n"
        path.write_bytes(body.getvalue() + seal.encode())
        with pytest.raises(CheckpointError, match="holds no state"):
            train(SMALL, None, checkpoints)


def test_other_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(SMALL, None, Checkpoints(tmp_path))
    said: list[str] = []
    monkeypatch.setattr("ddpnopt.experiments.run_state.code_hash", lambda: "another")
    train(SMALL, None, Checkpoints(tmp_path, resume=True, tell=said.append))
    assert len(said) == 2 and "resuming from" in said[0]
    assert "here another" in said[1] and "last bits" in said[1]


def program(config: RunConfig, folder: Path, slow: bool) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=main, args=(config.model_dump_json(), str(folder), 1, slow))
    process.start()
    return process


def killed(config: RunConfig, folder: Path, generator: random.Random, slow: bool) -> bool:
    """Start a training, kill it at a random moment after its first write; did it kill a write?"""
    before = {p.name for p in folder.iterdir()} if folder.exists() else set()
    process = program(config, folder, slow)
    while process.is_alive():
        if folder.exists() and {p.name for p in folder.iterdir()} - before:
            break
        time.sleep(0.001)
    time.sleep(0.1 * generator.random())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(list(folder.glob("*.part")))


@pytest.mark.parametrize("slow", [False, True])
def test_killed_at_random_moments(slow: bool, tmp_path: Path) -> None:
    """Real processes, SIGKILL; slow: with a writer that is nearly always in the middle of it."""
    generator = random.Random(time.time_ns())
    config = SMALL.model_copy(update={"optimizer": "ddpnopt-ekfac", "epochs": 15, "batch": 48})
    # In a process, too: the type checker of this one draws from Python's generator.
    straight = program(config, tmp_path / "straight", slow=False)
    folder, writes, before = tmp_path / "killed", 0, 0
    for _ in range(KILLS // 2):
        writes += killed(config, folder, generator, slow)
        # Whatever is there is whole, and nothing that was there is lost.
        found = Checkpoints(folder, resume=True).start()
        now = found[1]["progress"]["steps"] if found is not None else 0
        assert now >= before
        before = now
    assert before > 0
    assert writes or not slow
    last = program(config, folder, slow=False)
    for process in (straight, last):
        process.join()
        assert process.exitcode == 0
    assert differences(final(tmp_path / "straight"), final(folder)) == []
    assert len(final(folder)["progress"]["epochs"]) == 15
    assert sorted(p.suffix for p in folder.iterdir()) == [".pt", ".pt"]
    print(f"{KILLS // 2} kills, {writes} in the middle of writing")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_command_line(tmp_path: Path) -> None:
    base = ["-d", "wine", "-a", "mlp-8x1-tanh", "-b", "24", "--schedule", "constant"]
    folder, outs = str(tmp_path / "c"), [str(tmp_path / "one"), str(tmp_path / "two")]
    assert run(*base, "-e", "4", "-o", outs[0])[0] == 0
    code, output = run(*base, "-e", "2", "-o", outs[1], "--checkpoint", folder, "--resume")
    assert code == 0 and f"no checkpoint in {folder}: starting at the beginning" in output
    code, output = run(*base, "-e", "4", "-o", outs[1], "--checkpoint", folder)
    assert code == 1 and "holds checkpoints of an earlier training" in output
    code, output = run(*base, "-e", "4", "-o", outs[1], "--checkpoint", folder, "--resume")
    assert code == 0 and "resuming from" in output and "epoch 3/4" in output
    records = [json.loads((Path(out) / "result.json").read_text()) for out in outs]
    for record in records:
        for part in (record, *record["epochs"]):
            part.pop("seconds"), part.pop("cpu_seconds", None)
    assert records[0] == records[1]
    curves = [pd.read_csv(Path(out) / "curve.csv").drop(columns="seconds") for out in outs]
    assert curves[0].equals(curves[1])
    assert (Path(outs[0]) / "curve.png").read_bytes() == (Path(outs[1]) / "curve.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume: name the folder with --checkpoint DIR"),
        (["--checkpoint-every", "3"], "--checkpoint-every: name the folder"),
        (["--checkpoint", "c", "--fall-back"], "--fall-back says where --resume goes on"),
        (["--schedule", "cos"], "unknown schedule 'cos'; known: constant, cosine"),
    ],
)
def test_options_that_do_nothing_are_refused(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and message in output


def test_damaged_checkpoint_on_the_command_line(tmp_path: Path) -> None:
    base = ["-d", "wine", "-a", "linear", "-e", "3", "-o", str(tmp_path / "out")]
    base += ["--checkpoint", str(tmp_path / "c")]
    assert run(*base)[0] == 0
    newest, older = Checkpoints(tmp_path / "c").files()
    newest.write_bytes(newest.read_bytes()[:-100])
    code, output = run(*base, "--resume")
    assert code == 1 and f"{newest} is not used: its end is missing (truncated)" in output
    assert "--fall-back goes on from the one before it" in output and "Traceback" not in output
    code, output = run(*base, "--resume", "--fall-back")
    assert code == 0 and f"resuming from {older}" in output and "set aside as" in output
    assert newest.with_name(f"{newest.name}.damaged").exists() and newest.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["ddpnopt", "ddpnopt-ekfac", "feedback-adamw", "muon", "momentum"])
def test_from_the_cpu_to_the_gpu_and_back(name: str, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"optimizer": name, "lr": 0.01, "epochs": 1})
    said: list[str] = []
    for epochs, device in ((1, "cpu"), (2, "cuda"), (3, "cpu")):
        result = train(
            config.model_copy(update={"epochs": epochs, "device": device}),
            None,
            Checkpoints(tmp_path / "moved", resume=True, tell=said.append),
        )
    assert sum("device" in text for text in said) == 2
    straight = train(config.model_copy(update={"epochs": 3}))
    for one, other in zip(straight.epochs, result.epochs, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
    # On one device all is to the bit, the GPU's generator too.
    check_resume(config.model_copy(update={"epochs": 2, "device": "cuda"}), tmp_path)
