# SPDX-License-Identifier: MIT
"""Small files that stand for huge ones, and pickles that run for ever or change their reader."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import signal
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ddpnopt.experiments.loaders import cifar, files, idx, matlab, openml, pickles, svhn
from ddpnopt.experiments.loaders.files import Blob, read_file
from ddpnopt.experiments.loaders.pickles import read_pickle

#: Stands for the true bound, so that the bombs, too, may be small.
BOUND = 2**20
HUGE = 64 * BOUND


@pytest.fixture(autouse=True)
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, idx, matlab, openml):
        monkeypatch.setattr(module, "MAX_FILE", BOUND)


@contextmanager
def bounded(seconds: int = 20, memory: int = 12 * BOUND) -> Iterator[None]:
    """Fail where a reader takes too long or too much."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(read: Callable[[], object], path: Path, message: str) -> None:
    assert path.stat().st_size < BOUND
    with bounded(), pytest.raises(ValueError, match=message) as error:
        read()
    assert str(path) in str(error.value)


def test_idx(tmp_path: Path) -> None:
    sizes = (HUGE // 2**16, 256, 256)
    head = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in sizes)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(head + bytes(HUGE)))
    check(lambda: idx.read_idx(path, 3), path, "too many for such a file")


def _pax(buffer: io.BytesIO) -> None:
    """A name of 64 MB, in a header that belongs to no file yet."""
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a" * HUGE))


def _gnu(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a" * HUGE))


def _other(buffer: io.BytesIO) -> None:
    """Files that nobody asks for, which have to be unpacked on the way."""
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("other")
        member.size = HUGE
        archive.addfile(member, io.BytesIO(bytes(HUGE)))


def _wanted(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("train", "test"):
            member = tarfile.TarInfo(name)
            member.size = BOUND - 2048
            archive.addfile(member, io.BytesIO(bytes(member.size)))


@pytest.mark.parametrize("make", [_pax, _gnu, _other, _wanted])
def test_tar(make: Callable[[io.BytesIO], None], tmp_path: Path) -> None:
    path, buffer = tmp_path / "cifar-100-python.tar.gz", io.BytesIO()
    make(buffer)
    path.write_bytes(buffer.getvalue())
    check(lambda: cifar.read((path,), "cifar-100"), path, "unpacks to more than")


def test_mat_of_many_elements_that_are_each_below_the_bound(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    savemat(buffer, {"a": np.zeros((1, BOUND // 2), np.uint8)}, do_compression=True)
    whole = buffer.getvalue()
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(whole[:128] + 128 * whole[128:])
    check(lambda: svhn.read((path, path), "svhn"), path, "all together are too large")
    # One that never ends.
    packed = zlib.compress(bytes(HUGE))
    tag = np.array([15, len(packed)], "<u4").tobytes()
    path.write_bytes(whole[:128] + tag + packed)
    check(lambda: svhn.read((path, path), "svhn"), path, "too large")


def test_zip_of_folders(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for label in range(10):
            archive.writestr(f"train/{label}/0.png", bytes(HUGE if label == 5 else 10))
    check(lambda: cifar.read((path,), "cifar-10"), path, "too many for 32 x 32|cannot identify")


def test_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros(HUGE, np.uint8), labels=np.zeros(1, np.uint8))
    with bounded(), pytest.raises(ValueError, match="unpacks to more than"):
        openml._open(path)


def laughs(depth: int = 40, width: int = 2) -> bytes:
    """A tuple of tuples of tuples ..., each used again: 2^40 leaves in 200 bytes."""
    program = b"N\x85\x94"
    for number in range(depth):
        program += b"(" + width * (b"h" + bytes([number])) + b"t\x94"
    return program


PROGRAMS = {
    "a key whose hash takes for ever": (b"}" + laughs() + b"Ns.", "keys are not plain"),
    "the same by another opcode": (b"}(" + laughs() + b"Nu.", "keys are not plain"),
    "and by another": (b"(" + laughs() + b"Nd.", "keys are not plain"),
    "a set": (b"\x8f(" + laughs() + b"\x90.", "holds a set"),
    "a frozen set": (b"(" + laughs() + b"\x91.", "holds a set"),
    "a type whose text takes for ever": (
        laughs() + b"cnumpy\ndtype\nh\x28\x85R.",
        "array of another type",
    ),
    "an encoding whose text takes for ever": (
        laughs() + b"c_codecs\nencode\n\x8c\x01ah\x28\x86R.",
        "another encoding",
    ),
    "a text encoded again and again": (
        b"]\x94\x58" + (50_000).to_bytes(4, "little") + 50_000 * b"a" + b"\x940"
        b"(" + 2000 * b"c_codecs\nencode\nh\x01\x8c\x06latin1\x86R" + b"l.",
        "more bytes of text than the file has",
    ),
    "a state for a function": (
        b"cnumpy.core.multiarray\n_reconstruct\nN}\x8c\x08__name__\x8c\x04evils\x86b.",
        "state for what has none",
    ),
    "a state for a class": (
        b"cnumpy\nndarray\nN}\x8c\x04fillNs\x86b.",
        "state for what has none",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_pickles(case: str) -> None:
    program, message = PROGRAMS[case]
    before = dict(vars(pickles._Array)), pickles._reconstruct.__name__
    with bounded(), pytest.raises(ValueError, match=message) as error:
        read_pickle(Blob("some/file", b"\x80\x04" + program))
    assert "some/file" in str(error.value) and len(str(error.value)) < 1000
    assert (dict(vars(pickles._Array)), pickles._reconstruct.__name__) == before


def test_a_label_too_long_to_be_written_out(tmp_path: Path) -> None:
    for name in ("train", "test"):
        content = {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [10**6000]}
        (tmp_path / name).write_bytes(pickle.dumps(content, 2))
    paths = (tmp_path / "train", tmp_path / "test")
    check(lambda: cifar.read(paths, "cifar-100"), paths[0], "label of many digits is not in 0")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_true_file_is_read_fast(protocol: int, tmp_path: Path) -> None:
    """10,000 samples as in a file of CIFAR-10, names and all."""
    count = 10_000
    content = {
        "batch_label": "training batch 1 of 5",
        "labels": [k % 10 for k in range(count)],
        "data": np.arange(count * 16, dtype=np.uint64).astype(np.uint8).reshape(count, 16),
        "filenames": [f"name_s_{k:06d}.png" for k in range(count)],
    }
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol))
    start = time.process_time()
    found = read_pickle(read_file(path))
    assert time.process_time() - start < 5
    assert found["labels"] == content["labels"]
    assert isinstance(found["data"], np.ndarray) and (found["data"] == content["data"]).all()


def test_nothing_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "made"),))

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(ValueError, match="asks for posix.mkdir|asks for nt.mkdir"):
            read_pickle(Blob("file", pickle.dumps({"data": Evil()}, protocol)))
    assert not (tmp_path / "made").exists()
