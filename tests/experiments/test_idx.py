# SPDX-License-Identifier: MIT
"""Image sets read from IDX files: a tiny stand-in in the same format, and files that are wrong."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpnopt.experiments.data import load
from ddpnopt.experiments.loaders.idx import FOLDERS, read_idx
from ddpnopt.experiments.training import RunConfig, RunResult, train

STEMS = {"train": 60, "t10k": 20}


def idx(values: NDArray[np.uint8]) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def write(folder: Path, *, zipped: bool = True, side: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for stem, count in STEMS.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{stem}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("name", "sub"), [(name, sub) for name, subs in FOLDERS.items() for sub in subs]
)
def test_layouts(name: str, sub: str, zipped: bool, tmp_path: Path) -> None:
    write(tmp_path / sub, zipped=zipped)
    data = load(name, folder=tmp_path, scale="unit")
    assert data.x_train.shape == (60, 36) and data.x_test.shape == (20, 36)
    assert data.classes == 10 and data.y_test[:3].tolist() == [0, 1, 2]
    assert data.origin == "60 + 20 images, IDX files"
    assert float(data.x_train.min()) >= 0 and float(data.x_train.max()) <= 1
    images = load(name, folder=tmp_path, scale="unit", images=True)
    assert images.input_shape == (1, 6, 6)
    assert torch.equal(images.x_train.flatten(1), data.x_train)


def test_subset_is_drawn_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path)

    def subset(seed: int) -> torch.Tensor:
        data = load("mnist", folder=tmp_path, scale="none", seed=seed, train_samples=7)
        assert len(data.y_train) == 7 and len(data.y_test) == 20
        return data.x_train

    assert torch.equal(subset(1), subset(1)) and not torch.equal(subset(1), subset(2))
    everything = load("mnist", folder=tmp_path, scale="none").x_train
    assert all(bool((everything == row).all(1).any()) for row in subset(1))
    with pytest.raises(ValueError, match="60 training samples, 61 asked for"):
        load("mnist", folder=tmp_path, train_samples=61)
    with pytest.raises(ValueError, match="20 test samples, 21 asked for"):
        load("mnist", folder=tmp_path, test_samples=21)
    assert len(load("mnist", folder=tmp_path, test_samples=4).y_test) == 4


def test_names_with_a_dot_and_a_changed_file(tmp_path: Path) -> None:
    write(tmp_path, zipped=False)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    before = load("mnist", folder=tmp_path, scale="none")
    path = tmp_path / "t10k-labels.idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"\x07" + content[9:])
    os.utime(path, (1, 1))
    after = load("mnist", folder=tmp_path, scale="none")
    # What is kept in memory is not what lies on disk any more.
    assert before.y_test[0] == 0 and after.y_test[0] == 7
    assert before.checksum != after.checksum


def test_one_set_is_not_taken_for_the_other(tmp_path: Path) -> None:
    write(tmp_path, zipped=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    mnist = bytes(int(digit) for digit in "50419213143536172869")
    path.write_bytes(content[:8] + mnist + content[28:])
    assert load("mnist", folder=tmp_path).y_train[:3].tolist() == [5, 0, 4]
    with pytest.raises(ValueError, match="holds 'mnist', not 'fashion-mnist'"):
        load("fashion-mnist", folder=tmp_path)


def test_a_header_is_not_believed(tmp_path: Path) -> None:
    """60 GB announced by a file of a few bytes: refused without making room for them."""
    huge = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (1_000_000, 256, 256))
    for name, content in (("a", huge + bytes(9)), ("a.gz", gzip.compress(huge + bytes(9)))):
        (tmp_path / name).write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="bytes of values announced, too many"):
            read_idx(tmp_path / name, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000


def test_where_the_files_lie_is_not_part_of_a_record(tmp_path: Path) -> None:
    write(tmp_path)
    config = RunConfig(
        dataset="mnist", architecture="linear", optimizer="sgd", epochs=1, data=tmp_path
    )
    assert config.key == config.model_copy(update={"data": None}).key
    assert config.key != config.model_copy(update={"train_samples": 5}).key
    text = train(config).model_dump_json()
    assert str(tmp_path) not in text
    assert RunResult.model_validate_json(text).config.key == config.key


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (IMAGES, lambda b: b[:-1], "truncated"),
        (IMAGES, lambda b: b[:9], "truncated inside the header"),
        (IMAGES, lambda b: b"", "truncated inside the header"),
        (IMAGES, lambda b: b + b"x", "longer than its header says"),
        (IMAGES, lambda b: b"\x00\x00\x0d\x03" + b[4:], "not an IDX file of unsigned bytes with 3"),
        (IMAGES, lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "out of bounds"),
        (IMAGES, lambda b: b[:8] + b"\x00\x00\x00\x00" + b[12:], "out of bounds"),
        (LABELS, lambda b: b[:-1] + b"\x0a", "label 10 is not in 0 to 9"),
        (LABELS, lambda b: b[:4] + b"\x00\x00\x00\x3b" + b[8:-1], "59 labels for 60 images"),
    ],
)
def test_a_wrong_file_is_named(
    file: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    changed(tmp_path / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        load("mnist", folder=tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-20], "truncated"),
        (lambda b: b"no gzip at all", "no valid gzip file"),
        (lambda b: b[:-8] + bytes(4) + b[-4:], "no valid gzip file"),
    ],
)
def test_a_damaged_archive_is_named(
    change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / IMAGES
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load("mnist", folder=tmp_path)
    assert IMAGES in str(caught.value)


def test_missing_files_and_parts_of_different_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put the four standard IDX files there"):
        load("mnist", folder=tmp_path)
    with pytest.raises(ValueError, match="is no folder; name the folder that holds its files"):
        load("mnist", folder=tmp_path / "absent")
    with pytest.raises(ValueError, match="no such file"):
        read_idx(tmp_path / "absent.gz", 1)
    write(tmp_path, side=4)
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / f"t10k-{kind}-ubyte.gz").unlink()
    write(tmp_path / "other", side=5)
    for kind in ("images-idx3", "labels-idx1"):
        name = f"t10k-{kind}-ubyte.gz"
        (tmp_path / "other" / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match=r"training images are \(4, 4\), test images \(5, 5\)"):
        load("mnist", folder=tmp_path)
