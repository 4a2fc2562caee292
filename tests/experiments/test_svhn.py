# SPDX-License-Identifier: MIT
"""SVHN's .mat files: small ones written by SciPy, and wrong ones."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from ddpnopt.experiments.data import load
from ddpnopt.experiments.loaders.files import Blob
from ddpnopt.experiments.loaders.matlab import read_mat

Values = dict[str, object]


def values(count: int, seed: int) -> Values:
    generator = np.random.default_rng(seed)
    return {
        "X": generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
        "y": (1 + np.arange(count, dtype=np.uint8) % 10)[:, None],
    }


def write(folder: Path, change: Callable[[Values], Values] = lambda v: v, **options: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "train_32x32.mat", change(values(30, 0)), **options)
    savemat(folder / "test_32x32.mat", values(12, 1), **options)


@pytest.mark.parametrize("place", [".", "svhn", "SVHN"])
@pytest.mark.parametrize("packed", [True, False])
def test_pixels_and_labels(place: str, packed: bool, tmp_path: Path) -> None:
    write(tmp_path / place, do_compression=packed)
    data = load("svhn", folder=tmp_path, scale="none", images=True)
    written = np.asarray(values(30, 0)["X"])
    assert data.x_train.shape == (30, 3, 32, 32)
    expected = torch.from_numpy(written[:, :, 1, 7].astype(np.float32))
    assert torch.equal(data.x_train[7, 1], expected)
    # The file's 10 is the digit 0.
    assert data.y_test.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert data.label == "SVHN, 30 + 12 images, SVHN .mat files" and data.classes == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"X": v["X"]}, r"holds \['X'\]; X and y are needed"),
        (lambda v: v | {"X": v["X"][:31]}, r"X is uint8 of shape \(31, 32, 3, 30\)"),
        (lambda v: v | {"X": v["X"].astype(float)}, "X is float64"),
        (lambda v: v | {"X": v["X"][..., 0]}, r"uint8 of shape \(32, 32, 3\), not"),
        (
            lambda v: v | {"X": np.full((32, 32, 3, 1), 1.0, object)},
            "X is no array of real numbers",
        ),
        (lambda v: v | {"y": v["y"][:29]}, r"y is uint8 of shape \(29, 1\)"),
        (lambda v: v | {"y": v["y"] + 1}, "a label is not in 0 to 10"),
        (lambda v: v | {"y": v["y"] - 0.5}, "a label is not in 0 to 10"),
        (lambda v: v | {"y": "a" * 30}, "y is no array of real numbers"),
    ],
)
def test_wrong_values(change: Callable[[Values], Values], message: str, tmp_path: Path) -> None:
    write(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        load("svhn", folder=tmp_path)
    assert "train_32x32.mat" in str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-50], lambda b: b[:200], lambda b: b[:100], lambda b: b"", lambda b: b"x" * 500],
)
def test_damaged_files(change: Callable[[bytes], bytes], packed: bool, tmp_path: Path) -> None:
    write(tmp_path, do_compression=packed)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"test_32x32.mat: not read as a MATLAB 5 file"):
        load("svhn", folder=tmp_path)


def test_a_header_is_not_believed(tmp_path: Path) -> None:
    """A file of 100 kB that announces a million images: refused before there is room for them."""
    write(tmp_path)
    path = tmp_path / "train_32x32.mat"
    content = path.read_bytes()
    dimensions = np.array([32, 32, 3, 30], dtype="<i4").tobytes()
    assert content.count(dimensions) == 1
    lie = np.array([32, 32, 3, 900_000], dtype="<i4").tobytes()
    path.write_bytes(content.replace(dimensions, lie))
    tracemalloc.start()
    with pytest.raises(ValueError, match="announces shape .32, 32, 3, 900000., but holds"):
        load("svhn", folder=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8"])
def test_values_are_those_that_scipy_reads(kind: str, packed: bool) -> None:
    generator = np.random.default_rng(0)
    written = {
        "short": np.array([[1, 2]]).astype(kind),
        "a_name_of_some_length": generator.integers(0, 100, (3, 4, 5)).astype(kind),
        "text": "words",
        "cell": np.full((1, 2), 3.0, object),
        "complex": np.array([[1j]]),
    }
    buffer = io.BytesIO()
    savemat(buffer, written, do_compression=packed)
    ours, scipys = read_mat(Blob("file", buffer.getvalue())), loadmat(buffer)
    for name in ("short", "a_name_of_some_length"):
        assert np.array_equal(ours[name], scipys[name]) and ours[name].shape == scipys[name].shape
    for name in ("text", "cell", "complex"):
        assert ours[name] == "no array of real numbers"


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no train_32x32.mat and test_32x32.mat .*--data DIR"):
        load("svhn", folder=tmp_path)
    write(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(ValueError, match=r"test_32x32.mat: missing; both of"):
        load("svhn", folder=tmp_path)
