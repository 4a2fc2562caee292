# SPDX-License-Identifier: MIT
"""`ddpnopt watch`: while a run goes on, once, and on folders that are none."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from ddpnopt import StepLog
from ddpnopt.experiments.commands import app
from ddpnopt.experiments.watch_command import Log, display, sparkline

FOUND = {"coefficient/a": 0.75, "coefficient_min/a": 0.1, "bounded/a": 0.25, "Kdx/a": 0.5}


def shown(log: Log) -> str:
    file = io.StringIO()
    Console(file=file, width=120).print(display(log))
    return file.getvalue()


def test_it_reads_on_while_the_run_writes(tmp_path: Path) -> None:
    view = Log(tmp_path / "steps.csv")
    view.look()
    assert "no step yet" in shown(view)
    with StepLog(tmp_path) as log:
        for step, loss in enumerate((4.0, 2.0, 1.0), 1):
            log.step = step
            log.write({"loss": loss, **FOUND, "coefficient/b,c": step / 10})
            view.look()
            text = shown(view)
            assert f"step {step}" in text and f"loss {loss:.6g}" in text
            assert "0.750" in text and "25%" in text and f"0.{step}00" in text and "b,c" in text
    assert "█▃▁" in text and view.losses == [4.0, 2.0, 1.0]
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("4,loss,0.")
    view.look()
    assert "step 3" in shown(view)
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("5\n")
    view.look()
    assert "step 4" in shown(view) and "no layer in feedback" in shown(view)


def test_a_new_log_in_its_place(tmp_path: Path) -> None:
    view = Log(tmp_path / "steps.csv")
    with StepLog(tmp_path) as log:
        log.step = 7
        log.write({"loss": 1.0, **FOUND})
    view.look()
    (tmp_path / "steps.csv").write_text("step,scalar,value\n1,loss,3.0\n")
    view.look()
    assert view.step == 1 and view.losses == [3.0]


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 7.0, float("nan"), 3.0]) == "▁█x▄"
    assert len(sparkline(list(map(float, range(500))))) == 60


def test_train_log_watch(tmp_path: Path) -> None:
    """The two commands together, the second while nothing is written any more."""
    run = ["train", "--epochs", "1", "--batch", "128", "--log", str(tmp_path / "log")]
    trained = CliRunner().invoke(app, [*run, "--out", str(tmp_path / "out")])
    assert trained.exit_code == 0, trained.output
    seen = CliRunner().invoke(app, ["watch", str(tmp_path / "log"), "--once"])
    assert seen.exit_code == 0, seen.output
    for words in ("step ", "loss ", "accuracy ", "coefficient", "cut below"):
        assert words in seen.output
    assert len((tmp_path / "log" / "steps.csv").read_text().splitlines()) > 50


def test_the_log_of_a_resumed_training_is_that_of_one(tmp_path: Path) -> None:
    """What was logged behind the checkpoint, before the training was killed, is taken off."""

    def run(name: str, epochs: int, *more: str) -> str:
        line = f"train --dataset wine --arch mlp-8x2-tanh --batch 32 --epochs {epochs}".split()
        folders = ["--log", str(tmp_path / name), "--checkpoint", str(tmp_path / f"{name}-states")]
        done = CliRunner().invoke(app, [*line, *folders, *more, "--out", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        return (tmp_path / name / "steps.csv").read_text()

    run("killed", 1)
    with StepLog(tmp_path / "killed") as log:
        log.step += 2
        log.write({"loss": 99.0})
    assert run("killed", 2, "--resume") == run("straight", 2)


def until(terminal: int, words: bytes, seconds: float = 60.0) -> None:
    seen, end = b"", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 65536)


def test_live_in_a_terminal(tmp_path: Path) -> None:
    """It follows the log, and ends as users end it."""
    with StepLog(tmp_path) as log:
        log.step = 3
        log.write({"loss": 1.5, **FOUND})
        ours, theirs = pty.openpty()
        # Started in the background, as `pytest &`, a process ignores Ctrl-C, and so would its own.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from ddpnopt.experiments.cli import main; main()"
        )
        running = subprocess.Popen(
            [sys.executable, "-c", code, "watch", str(tmp_path), "--every", "0.1"],
            stdout=theirs,
            env={**os.environ, "TERM": "xterm"},
        )
        try:
            until(ours, b"step 3")
            log.step = 4
            log.write({"loss": 1.25, **FOUND})
            until(ours, b"step 4")
            running.send_signal(signal.SIGINT)
            assert running.wait(timeout=30) == 0
        finally:
            running.kill()


def plain(output: str) -> str:
    return " ".join(output.replace("│", " ").split())


def test_folders_that_are_none(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["watch", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "no such folder" in plain(missing.output)
    empty = CliRunner().invoke(app, ["watch", str(tmp_path), "--once"])
    assert empty.exit_code == 2 and "steps.csv" in plain(empty.output)
    (tmp_path / "steps.csv").write_text("epoch\n1\n")
    foreign = CliRunner().invoke(app, ["watch", str(tmp_path), "--once"])
    assert foreign.exit_code == 2 and "StepLog" in plain(foreign.output)
