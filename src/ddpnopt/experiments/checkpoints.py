# SPDX-License-Identifier: MIT
"""Checkpoints: files that are whole or absent, and are refused where they are damaged.

A file is what `torch.save` writes, with one line behind it that bears the SHA-256 of all in front
of it; `torch.load(path, weights_only=True)` reads it as it is. It is written beside its place,
flushed to the disk and moved there, so that a process killed at any moment leaves the old file or
the new one. Loading runs nothing that a file contains.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ddpnopt.experiments.atomic import PART, replacing

#: Number of the layout of what a file holds.
FORMAT = 1
_KIND = "ddpnopt checkpoint"
_SEAL = re.compile(rb"\nddpnopt checkpoint, sha256 ([0-9a-f]{64})\n")
_SEAL_LENGTH = len(b"\nddpnopt checkpoint, sha256 \n") + 64
_NAME = re.compile(r"step-(\d{9,})\.pt")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
#: End of the names of files that were set aside.
_ASIDE = ".damaged"


class CheckpointError(ValueError):
    """A checkpoint can't be written, read or used; the message names the file and the reason."""


class DamagedError(CheckpointError):
    """A file is not what was written: truncated, changed, or none of these files."""


class _Sealing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; it is on disk when this returns, and never there in part.

    Args:
        path: The file; its folder is made where it does not exist.
        state: Tensors and plain values.

    Raises:
        CheckpointError: It can't be written; the file that was there before is untouched.
        TypeError: Something in it is neither tensor nor plain value.
    """
    _check_plain(state, "state")
    content = {"kind": _KIND, "format": FORMAT, "state": dict(state)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            sealing = _Sealing(file)
            torch.save(content, cast(IO[bytes], sealing))
            file.write(f"\n{_KIND}, sha256 {sealing.digest.hexdigest()}\n".encode())
    # A stream that can't be written on makes torch's archive raise a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint {path} can't be written: {error}; look at the folder's permissions "
            "and free space. Earlier checkpoints are as they were: --resume goes on from the last"
        ) from error


def _check_seal(file: BinaryIO) -> None:
    """Compare the content with the checksum behind it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _SEAL_LENGTH, 0))
    seal = _SEAL.fullmatch(file.read())
    if seal is None:
        file.seek(0)
        ours = b"PK\x03\x04".startswith(file.read(4))
        raise ValueError("its end is missing (truncated)" if ours else "it is no checkpoint")
    file.seek(0)
    digest, left = hashlib.sha256(), size - _SEAL_LENGTH
    while left and (block := file.read(min(left, 2**20))):
        digest.update(block)
        left -= len(block)
    if digest.hexdigest().encode() != seal[1]:
        raise ValueError("its content has changed since it was written (checksum)")
    # torch writes its members as they are: what is packed, or overlaps, is a bomb.
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(m.compress_type for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("its members are packed, which torch.save does not do")


def _reason(error: Exception) -> str:
    """One line; torch's own advises to load without safety."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error).partition("\n")[0] or type(error).__name__
    asked = re.search(r"GLOBAL (\S+)", str(error))
    what = f"it asks for {asked[1]}" if asked else "it is no file of torch.save"
    return f"{what}, and only tensors and plain values are loaded"


def _check_plain(node: object, where: str) -> None:
    """What couldn't be loaded again must not be written.

    Raises:
        TypeError: Something is neither tensor nor plain value; the message says where.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            _check_plain(key, f"{where}: its keys")
            _check_plain(value, f"{where}[{key!r}]")
    elif type(node) in (list, tuple):
        for number, value in enumerate(node):  # type: ignore[arg-type]
            _check_plain(value, f"{where}[{number}]")
    elif not (isinstance(node, torch.Tensor) or type(node) in _PLAIN):
        raise TypeError(f"{where} is a {type(node).__name__}: neither tensor nor plain value")


def read_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; nothing that it contains is run.

    Args:
        path: The file.
        map_location: Where its tensors go. From the CPU `load_state_dict` takes them to the
            device and the type of the model's own.

    Returns:
        What was given to `write_checkpoint`.

    Raises:
        DamagedError: The file is truncated, changed, or no checkpoint.
        CheckpointError: It can't be opened, or is of another format.
    """
    try:
        with path.open("rb") as file:
            _check_seal(file)
            file.seek(0)
            content = torch.load(file, map_location=map_location, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} can't be read: {error.strerror}") from error
    except Exception as error:
        # What torch.load raises for a file that is none of its own has no common type.
        raise DamagedError(f"the checkpoint {path} is not used: {_reason(error)}") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise DamagedError(f"the checkpoint {path} is not used: it is no checkpoint of a training")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {content.get('format')}, this version of ddpnopt "
            f"knows {FORMAT}: go on with the version that wrote it"
        )
    state = content.get("state")
    if not isinstance(state, dict):
        raise DamagedError(f"the checkpoint {path} is not used: it holds no state of a training")
    return state


def _quiet(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, in a folder of their own.

    Attributes:
        folder: Made with the first checkpoint.
        every: Steps between two; None: one at the end of every epoch. The end of a training has
            one in either case.
        keep: So many of the newest stay.
        resume: Go on from the newest; start at the beginning where there is none.
        fall_back: Where the newest is damaged, go on from the newest that is not; damaged ones are
            set aside, not removed.
        tell: Called with what a user should know: where the training goes on, and what was damaged.
    """

    folder: Path
    every: int | None = None
    keep: int = 2
    resume: bool = False
    fall_back: bool = False
    tell: Callable[[str], None] = _quiet

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: give a positive number of steps")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least one checkpoint has to stay")

    def files(self) -> list[Path]:
        """The whole files of the folder, the newest first."""
        if not self.folder.is_dir():
            return []
        found = {p: _NAME.fullmatch(p.name) for p in self.folder.iterdir()}
        return sorted(
            (p for p, name in found.items() if name), key=lambda p: int(p.stem[5:]), reverse=True
        )

    def start(self) -> tuple[Path, dict[str, Any]] | None:
        """Find where to go on.

        Returns:
            The file and its content; None where a training has to start at the beginning.

        Raises:
            CheckpointError: The folder can't be used, it holds checkpoints and `resume` is not
                asked for, the newest is damaged and `fall_back` is not asked for, or none is whole.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the folder of checkpoints can't be made: {error}") from error
        files = self.files()
        if not self.resume:
            if files:
                raise CheckpointError(
                    f"{self.folder} holds checkpoints of an earlier training ({files[0].name}): "
                    "go on from them with --resume, or name another folder"
                )
            return None
        for path in files:
            try:
                state = read_checkpoint(path)
            except DamagedError as error:
                if not self.fall_back:
                    raise CheckpointError(self._refusal(error, files)) from error
                # Left in its place it would count as the newest, and push good ones out.
                os.replace(path, path.with_name(path.name + _ASIDE))
                self.tell(f"{error}; set aside as {path.name + _ASIDE}")
                continue
            self.tell(f"resuming from {path}")
            return path, state
        if files:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole; start at the beginning in another folder"
            )
        self.tell(f"no checkpoint in {self.folder}: starting at the beginning")
        return None

    @staticmethod
    def _refusal(error: DamagedError, files: list[Path]) -> str:
        others = len(files) > 1
        way = "--fall-back goes on from the one before it" if others else "there is no earlier one"
        return f"{error}; {way}"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then remove those that are too many.

        Args:
            step: Steps taken, which name the file.
            state: Tensors and plain values.

        Raises:
            CheckpointError: It can't be written; earlier ones are untouched.
        """
        path = self.folder / f"step-{step:09d}.pt"
        write_checkpoint(path, state)
        stale = [p for p in self.files()[self.keep :] if p != path]
        # What a killed process was writing is worth nothing.
        for old in [*stale, *self.folder.glob(f"step-*.pt{PART}")]:
            old.unlink(missing_ok=True)
        return path
