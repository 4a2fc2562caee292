# SPDX-License-Identifier: MIT
"""Readers fed with damaged files: the outcome is data or a ValueError that names the folder."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from ddpnopt.experiments.loaders import cifar, idx, svhn
from ddpnopt.experiments.loaders.files import Blob
from ddpnopt.experiments.loaders.images import ImageSet
from ddpnopt.experiments.loaders.pickles import read_pickle

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
LABELS = [0, 1, 2]


def _idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def _pickle(protocol: int) -> bytes:
    return pickle.dumps({b"data": PIXELS, b"fine_labels": LABELS}, protocol)


def _mat(packed: bool) -> bytes:
    buffer = io.BytesIO()
    pixels = PIXELS.reshape(3, 32, 32, 3).transpose(1, 2, 3, 0)
    labels = np.array([[1], [2], [10]], np.uint8)
    savemat(buffer, {"X": pixels, "y": labels}, do_compression=packed)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("train", "test"):
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(_pickle(2))
            archive.addfile(member, io.BytesIO(_pickle(2)))
    return buffer.getvalue()


def _read_idx(path: Path) -> ImageSet | np.ndarray:
    return idx.read_idx(path, 3)


def _read_cifar(path: Path) -> ImageSet:
    if path.suffix == ".gz":
        return cifar.read((path,), "cifar-100")
    test = path.with_name(path.name.replace("train", "test"))
    test.write_bytes(path.read_bytes())
    return cifar.read((path, test), "cifar-100")


def _read_svhn(path: Path) -> ImageSet:
    return svhn.read((path, path), "svhn")


IMAGES = PIXELS.reshape(3, 64, 48)
CASES: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "idx": ("images", _idx(IMAGES), _read_idx),
    "idx, gzipped": ("images.gz", gzip.compress(_idx(IMAGES)), _read_idx),
    "binary": ("train.bin", np.zeros((2, 3074), np.uint8).tobytes(), _read_cifar),
    "pickle 0": ("train", _pickle(0), _read_cifar),
    "pickle 2": ("train", _pickle(2), _read_cifar),
    "pickle 5": ("train", _pickle(5), _read_cifar),
    "archive": ("cifar-100-python.tar.gz", _tar(), _read_cifar),
    "mat": ("train_32x32.mat", _mat(False), _read_svhn),
    "mat, packed": ("train_32x32.mat", _mat(True), _read_svhn),
}


def _outcome(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except ValueError as error:
        assert str(path.parent) in str(error)


@pytest.mark.parametrize("case", CASES)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files(case: str, tmp_path: Path, data: st.DataObject) -> None:
    name, content, read = CASES[case]
    read_back = bytearray(content)
    # Headers are where a wrong byte matters; the pixels are most of the file.
    early = st.integers(0, min(300, len(content) - 1)) | st.integers(0, len(content) - 1)
    changes = data.draw(st.lists(st.tuples(early, st.integers(0, 255)), max_size=4))
    for place, value in changes:
        read_back[place] = value
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    _outcome(read, tmp_path / name, bytes(read_back[:end]) + data.draw(st.binary(max_size=4)))


@pytest.mark.parametrize("case", CASES)
def test_the_undamaged_file_is_read(case: str, tmp_path: Path) -> None:
    name, content, read = CASES[case]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) is not None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"\x80\x05"]))
def test_random_programs(program: bytes, start: bytes) -> None:
    try:
        result = read_pickle(Blob("file", start + program + b"."))
    except ValueError as error:
        assert "file" in str(error)
    else:
        assert isinstance(result, dict)
