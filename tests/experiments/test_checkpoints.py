# SPDX-License-Identifier: MIT
"""Checkpoint files: whole or absent, never run, refused by name where they are damaged."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpnopt.experiments import atomic
from ddpnopt.experiments.checkpoints import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    read_checkpoint,
    write_checkpoint,
)
from experiments.train_program import differences

STATE = {
    "weights": torch.linspace(0, 1, 7, dtype=torch.float64).reshape(7, 1),
    "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    "ordered": collections.OrderedDict(b=torch.tensor(3), a=None),
    3: [1, 2.5, float("inf"), True, "text", b"bytes", (1, (2,))],
}


def seal(content: bytes) -> bytes:
    return (
        content + f"\nddpnopt checkpoint, sha256 {hashlib.sha256(content).hexdigest()}\n".encode()
    )


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_comes_back_as_it_was_and_torch_reads_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.pt"
    write_checkpoint(path, STATE)
    assert differences(read_checkpoint(path), STATE) == []
    alone = torch.load(path, weights_only=True)
    assert differences(alone["state"], STATE) == [] and alone["format"] == 1
    assert path.read_bytes() == seal(path.read_bytes()[: -len(seal(b""))])
    assert [p.name for p in path.parent.iterdir()] == ["a.pt"]


def test_what_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    import numpy as np

    for bad in (np.float64(1.0), {1, 2}, torch.nn.Linear(1, 1), torch.Generator()):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a .*neither tensor nor plain"):
            write_checkpoint(tmp_path / "a.pt", {"a": [0, bad]})
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_found(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, STATE)
    whole = path.read_bytes()
    match data.draw(st.sampled_from(["cut", "flip", "insert", "append"])):
        case "cut":
            content = whole[: data.draw(st.integers(0, len(whole) - 1))]
        case "flip":
            place = data.draw(st.integers(0, 8 * len(whole) - 1))
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            content = bytes(changed)
        case "insert":
            place = data.draw(st.integers(0, len(whole)))
            content = whole[:place] + data.draw(st.binary(min_size=1)) + whole[place:]
        case _:
            content = whole + data.draw(st.binary(min_size=1))
    path.write_bytes(content)
    with pytest.raises(DamagedError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert any(w in str(error.value) for w in ("truncated", "checksum", "no checkpoint"))


class Evil:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def _packed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", 8) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member) + bytes(2**24))
    return buffer.getvalue()


def test_foreign_files_are_refused_and_never_run(tmp_path: Path) -> None:
    """Each with a right checksum, as an attacker would write it."""
    made, path = tmp_path / "made", tmp_path / "a.pt"
    good = saved({"kind": "ddpnopt checkpoint", "format": 1, "state": {}})
    cases = {
        saved({"kind": "ddpnopt checkpoint", "format": 1, "state": Evil(made)}): "asks for",
        pickle.dumps(Evil(made)): "only tensors and plain values|not a zip",
        saved(torch.nn.Linear(2, 2)): "asks for torch.nn",
        saved({"model": {}}): "no checkpoint of a training",
        saved([1, 2]): "no checkpoint of a training",
        _packed(good): "members are packed",
        b"": "not a zip",
        b"\x89PNG" + bytes(100): "not a zip",
    }
    for content, message in cases.items():
        path.write_bytes(seal(content))
        with pytest.raises(DamagedError, match=message) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value) and "weights_only" not in str(error.value)
        assert not made.exists()
    path.write_bytes(seal(saved({"kind": "ddpnopt checkpoint", "format": 2, "state": {}})))
    with pytest.raises(CheckpointError, match="has format 2, this version of ddpnopt knows 1"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="missing.pt can't be read: No such file"):
        read_checkpoint(tmp_path / "missing.pt")
    path.write_bytes(seal(good))
    assert read_checkpoint(path) == {}


def test_newest_stay_and_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    first = Checkpoints(folder, keep=3)
    assert first.start() is None
    (folder / "step-000000001.pt.part").write_bytes(b"of a killed process")
    (folder / "notes.txt").write_text("mine")
    for step in (5, 10, 15, 20, 1_000_000_000_000):
        first.save(step, {"step": step})
    names = ["step-1000000000000.pt", "step-000000020.pt", "step-000000015.pt"]
    assert [p.name for p in first.files()] == names
    assert sorted(p.name for p in folder.iterdir()) == sorted([*names, "notes.txt"])
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier training"):
        first.start()
    said: list[str] = []
    resumed = Checkpoints(folder, keep=3, resume=True, tell=said.append)
    found = resumed.start()
    assert found == (folder / names[0], {"step": 1_000_000_000_000})
    for name in names[:2]:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{names[0]} is not used.*--fall-back goes on"):
        resumed.start()
    falling = Checkpoints(folder, keep=1, resume=True, fall_back=True, tell=said.append)
    assert falling.start() == (folder / names[2], {"step": 15})
    assert f"set aside as {names[0]}.damaged" in said[1] and len(said) == 4
    # Left in its place, the damaged newer one would have pushed this one out.
    falling.save(16, {"step": 16})
    assert [p.name for p in falling.files()] == ["step-000000016.pt"]
    assert (folder / f"{names[0]}.damaged").exists()
    (folder / "step-000000016.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated.*there is no earlier one"):
        resumed.start()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        falling.start()


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    write_checkpoint(path, {"old": 1})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_checkpoint(path, {"new": 2})
        assert read_checkpoint(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(atomic.os, name, lambda *a, n=name, f=real: (order.append(n), f(*a))[1])
    write_checkpoint(tmp_path / "a.pt", {})
    assert order == ["fsync", "replace", "fsync"]


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from ddpnopt.experiments.checkpoints import CheckpointError, Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"a": torch.zeros(100)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoints.save(2, {"a": torch.zeros(100000)})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """Simulated by a limit of the file size: the write ends with EFBIG instead of ENOSPC."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step-000000002.pt can't be written" in done.stdout and "free space" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.pt"]
    assert torch.equal(read_checkpoint(tmp_path / "step-000000001.pt")["a"], torch.zeros(100))


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="folder of checkpoints can't be made"):
        Checkpoints(tmp_path / "file" / "c").start()
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoints(tmp_path, every=0)
