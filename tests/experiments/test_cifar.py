# SPDX-License-Identifier: MIT
"""CIFAR in all its forms: binary files, Python files, archives, folders of images."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpnopt.experiments.data import describe, load

Table = NDArray[np.uint8]
#: Samples in each file; the last one is the test part.
FILES = {
    "cifar-10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    "cifar-100": ["train", "test"],
}
CLASSES = {"cifar-10": 10, "cifar-100": 100}
BINARY = {"cifar-10": "cifar-10-batches-bin", "cifar-100": "cifar-100-binary"}
PYTHON = {"cifar-10": "cifar-10-batches-py", "cifar-100": "cifar-100-python"}


def samples(name: str, file: int, count: int = 6) -> tuple[Table, list[int]]:
    """Pixels (count, 3072) and labels, noise that JPEG can't have made."""
    generator = np.random.default_rng(file)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, [(file + 11 * i) % CLASSES[name] for i in range(count)]


def binary(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(FILES[name]):
        pixels, labels = samples(name, i)
        # CIFAR-100 has the superclass in front, here a value that is no class of the ten.
        front = [] if name == "cifar-10" else [np.full((6, 1), 19, dtype=np.uint8)]
        fine = np.array(labels, dtype=np.uint8)[:, None]
        (folder / f"{file}.bin").write_bytes(np.hstack([*front, fine, pixels]).tobytes())


def content(name: str, file: int, *, text_keys: bool = False) -> dict[object, object]:
    pixels, labels = samples(name, file)
    raw: dict[object, object] = {
        b"batch_label": b"training batch",
        (b"labels" if name == "cifar-10" else b"fine_labels"): labels,
        b"data": pixels,
        b"filenames": [b"leptodactylus_\xe9_%d.png" % i for i in range(6)],
    }
    if name == "cifar-100":
        raw[b"coarse_labels"] = [19] * 6
    return {k.decode(): v for k, v in raw.items() if isinstance(k, bytes)} if text_keys else raw


def python(folder: Path, name: str, protocol: int = 2, *, text_keys: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(FILES[name]):
        raw = content(name, i, text_keys=text_keys)
        (folder / file).write_bytes(pickle.dumps(raw, protocol))


def agree(name: str, folder: Path, form: str) -> None:
    """Every pixel and label is where it belongs."""
    data = load(name, folder=folder, scale="none", images=True)
    pieces = [samples(name, i) for i in range(len(FILES[name]))]
    pixels = np.concatenate([p for p, _ in pieces[:-1]]).reshape(-1, 3, 32, 32)
    assert torch.equal(data.x_train, torch.from_numpy(pixels.astype(np.float32)))
    assert data.y_train.tolist() == [label for _, labels in pieces[:-1] for label in labels]
    assert data.y_test.tolist() == pieces[-1][1]
    assert data.classes == CLASSES[name] and data.input_shape == (3, 32, 32)
    assert data.origin == f"{len(pixels)} + 6 images, {form}"
    assert data.label == f"{name.upper()}, {data.origin}"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [".", "{inner}", "{plain}/{inner}", "{plain}"])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_files_in_every_place(name: str, place: str, kind: str, tmp_path: Path) -> None:
    inner = (BINARY if kind == "binary" else PYTHON)[name]
    folder = tmp_path / place.format(inner=inner, plain=name.replace("-", ""))
    (binary if kind == "binary" else python)(folder, name)
    agree(name, tmp_path, "CIFAR binary files" if kind == "binary" else "CIFAR Python files")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text_keys", [False, True])
def test_python_files_of_every_protocol(protocol: int, text_keys: bool, tmp_path: Path) -> None:
    python(tmp_path, "cifar-10", protocol, text_keys=text_keys)
    agree("cifar-10", tmp_path, "CIFAR Python files")


def test_python_2_wrote_text_as_bytes(tmp_path: Path) -> None:
    """The published files: protocol 2, byte strings for keys, names and pixels."""
    for i, file in enumerate(FILES["cifar-10"]):
        pixels, labels = samples("cifar-10", i)
        raw = pixels.tobytes()
        program = (
            b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
            b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x06M\x00\x0c\x86"
            b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
            b"U\x06labelsq\x07]q\x08(" + b"".join(b"K%c" % label for label in labels) + b"eu."
        )
        (tmp_path / file).write_bytes(program)
    agree("cifar-10", tmp_path, "CIFAR Python files")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_archives_are_read_without_unpacking(name: str, kind: str, tmp_path: Path) -> None:
    inner = (BINARY if kind == "binary" else PYTHON)[name]
    (binary if kind == "binary" else python)(tmp_path / "made" / inner, name)
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"{name}-{kind}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "made" / inner, inner)
        # A member that would leave the folder if anything were written.
        outside = tarfile.TarInfo("../../outside")
        outside.size = 3
        archive.addfile(outside, io.BytesIO(b"bad"))
    agree(name, folder, "CIFAR binary files" if kind == "binary" else "CIFAR Python files")
    assert list(folder.iterdir()) == [path] and not (tmp_path.parent / "outside").exists()
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"\.tar\.gz: damaged archive"):
        load(name, folder=folder)


class Evil:
    """Writes a file when it is unpickled by a reader that trusts it."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("call", "named"),
    [(os.mkdir, "mkdir"), (eval, "eval"), (np.fromfile, "fromfile"), (np.load, "load")],
)
def test_nothing_in_a_pickle_is_run(
    call: Callable[..., object], named: str, protocol: int, tmp_path: Path
) -> None:
    python(tmp_path, "cifar-10")
    mark = tmp_path / "was_run"
    argument = f"__import__('os').mkdir({str(mark)!r})" if call is eval else str(mark)
    for place in ("key of its own", "labels"):
        raw = content("cifar-10", 0)
        raw[place.encode()] = Evil(call, argument)
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(raw, protocol))
        with pytest.raises(ValueError, match=f"{named}, which is not data") as caught:
            load("cifar-10", folder=tmp_path)
        assert "data_batch_1" in str(caught.value) and not mark.exists()


ARRAY = (
    b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
)
DTYPE = b"cnumpy\ndtype\nU\x02u1\x85R"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (ARRAY + b"(K\x01J\x00\x00\x00\x40M\x00\x0c\x86" + DTYPE + b"\x89U\x01atbs.", "shape"),
        (ARRAY + b"(K\x01K\x01J\xff\xff\xff\xff\x86" + DTYPE + b"\x89U\x00tbs.", "shape"),
        (ARRAY + b"s.", "'data' is no table"),
        (ARRAY.replace(b"U\x01b\x87R", b"U\x01b\x87R}b") + b"s.", "not a table of unsigned bytes"),
        (b"\x80\x02}U\x04datacnumpy\ndtype\nU\x02O8\x85Rs.", "only unsigned bytes"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "encoding"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "place 2147483647 in memory"),
        (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00abc.", "not read"),
        (b"\x80\x02U\x01aQ.", "not read"),
        (b"\x80\x02]q\x00.", "holds no dictionary"),
        (b"", "not read"),
    ],
)
def test_pickles_that_lie(program: bytes, message: str, tmp_path: Path) -> None:
    python(tmp_path, "cifar-10")
    (tmp_path / "data_batch_2").write_bytes(program)
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar-10", folder=tmp_path)
    assert "data_batch_2" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0, 1, 2, 3, 4, 10]}, "label 10 is not in 0 to 9"),
        ({b"labels": [0, 1, 2, 3, 4, -1]}, "label -1 is not in 0 to 9"),
        ({b"labels": [0, 1, 2, 3, 4, True]}, "no list of integers"),
        ({b"labels": [0] * 5}, "5 labels for 6 images"),
        ({b"data": np.zeros((6, 3071), np.uint8)}, "3072 columns"),
        ({b"data": np.zeros((6, 3072), np.float32)}, "only unsigned bytes"),
        ({b"data": np.zeros((6, 3, 1024), np.uint8)}, "not a table of unsigned bytes"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "no sample"),
        ({b"data": b"x" * 18432}, "3072 columns"),
    ],
)
def test_python_files_with_wrong_values(
    change: dict[object, object], message: str, tmp_path: Path
) -> None:
    python(tmp_path, "cifar-10")
    raw = content("cifar-10", 5) | change
    (tmp_path / "test_batch").write_bytes(pickle.dumps(raw, 2))
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar-10", folder=tmp_path)
    assert "test_batch" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("cifar-10", "data_batch_3.bin", lambda b: b[:-1], "whole number of records of 3073"),
        ("cifar-10", "data_batch_3.bin", lambda b: b"", "whole number of records of 3073"),
        ("cifar-10", "test_batch.bin", lambda b: b"\x0a" + b[1:], "label 10 is not in 0 to 9"),
        ("cifar-100", "test.bin", lambda b: b + b"x", "whole number of records of 3074"),
        ("cifar-100", "train.bin", lambda b: b"\x00\x64" + b[2:], "label 100 is not in 0 to 99"),
    ],
)
def test_wrong_binary_files(
    name: str, file: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    binary(tmp_path, name)
    path = tmp_path / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load(name, folder=tmp_path)
    assert file in str(caught.value)


def test_a_missing_file_is_not_passed_over(tmp_path: Path) -> None:
    binary(tmp_path, "cifar-10")
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"data_batch_4.bin missing; all of data_batch_1.bin"):
        load("cifar-10", folder=tmp_path)
    with pytest.raises(ValueError, match=r"none of train.bin \(cifar-100-binary\).*--data DIR"):
        load("cifar-100", folder=tmp_path)


def smooth(count: int, seed: int) -> Table:
    """Images (count, 32, 32, 3) as smooth as photographs, with some noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 8, 8, 3)).astype(np.float64)
    fine = np.stack([np.kron(image, np.ones((4, 4, 1))) for image in coarse])
    fine = (fine + np.roll(fine, 1, 1) + np.roll(fine, 2, 2) + np.roll(fine, 3, 1)) / 4
    return np.clip(fine + generator.normal(0, 4, fine.shape), 0, 255).astype(np.uint8)


def encoded(image: Table, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, quality=75)
    return buffer.getvalue()


def class_folders(kind: str) -> dict[str, bytes]:
    files = {}
    for part, count, seed in (("train", 40, 0), ("test", 20, 1)):
        for i, image in enumerate(smooth(count, seed)):
            ending = "jpg" if kind == "JPEG" else "png"
            files[f"{part}/class{i % 10}/{i:04d}.{ending}"] = encoded(image, kind)
    return files


@pytest.mark.parametrize(("kind", "form"), [("JPEG", "JPEG copy"), ("PNG", "PNG files")])
@pytest.mark.parametrize("zipped", [True, False])
def test_class_folders(kind: str, form: str, zipped: bool, tmp_path: Path) -> None:
    files = class_folders(kind)
    if zipped:
        with zipfile.ZipFile(tmp_path / "cifar10-some-copy.zip", "w") as archive:
            for name, raw in files.items():
                archive.writestr(name, raw)
    else:
        for name, raw in files.items():
            path = tmp_path / "cifar10" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
    data = load("cifar-10", folder=tmp_path, scale="none", images=True)
    assert data.origin == f"40 + 20 images, {form}"
    assert torch.bincount(data.y_train).tolist() == [4] * 10
    assert data.y_train.tolist() != sorted(data.y_train.tolist())
    if kind == "PNG":
        first = torch.from_numpy(smooth(40, 0)[0].transpose(2, 0, 1).astype(np.float32))
        (where,) = (data.x_train == first).all((1, 2, 3)).nonzero()
        assert data.y_train[where] == 0


def test_jpeg_is_seen_in_the_pixels(tmp_path: Path) -> None:
    """A re-encoded copy in the original's own layout is labelled as what it is."""
    for quality, form in ((75, "JPEG copy"), (None, "CIFAR binary files")):
        for i, file in enumerate(FILES["cifar-10"]):
            images = smooth(12, i)
            if quality:
                images = np.stack(
                    [np.asarray(Image.open(io.BytesIO(encoded(x, "JPEG")))) for x in images]
                )
            rows = images.transpose(0, 3, 1, 2).reshape(12, -1)
            labels = (np.arange(12, dtype=np.uint8) % 10)[:, None]
            folder = tmp_path / str(quality)
            folder.mkdir(exist_ok=True)
            (folder / f"{file}.bin").write_bytes(np.hstack([labels, rows]).tobytes())
        assert describe("cifar-10", folder=folder).origin == f"60 + 12 images, {form}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"train/class0/0000.jpg": b"no image"}, "cannot identify image file"),
        (lambda f: f | {"train/class10/0.jpg": f["train/class0/0000.jpg"]}, "11 folders of images"),
        (lambda f: {k: v for k, v in f.items() if k[:2] != "te"}, "no images in test/CLASS/"),
        (
            lambda f: f | {"train/class0/0000.jpg": encoded(smooth(1, 0)[0][:31], "JPEG")},
            r"train/class0/0000.jpg has \(32, 31\) pixels",
        ),
        (lambda f: f | {"test/class0/0000.jpg": bytes(70_000)}, "70,000 bytes, too many"),
    ],
)
def test_wrong_class_folders(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cifar-10.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in change(class_folders("JPEG")).items():
            archive.writestr(name, raw)
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar-10", folder=tmp_path)
    assert str(path) in str(caught.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cifar-10.zip: "):
        load("cifar-10", folder=tmp_path)


def test_the_archive_of_the_hundred_is_not_taken_for_the_ten(tmp_path: Path) -> None:
    for file in ("cifar-100.zip", "cifar100-copy.zip"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"data set 'cifar-10': none of data_batch_1.bin"):
        load("cifar-10", folder=tmp_path)
    with pytest.raises(ValueError, match=r"cifar-100.zip: "):
        load("cifar-100", folder=tmp_path)
