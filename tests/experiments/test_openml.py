# SPDX-License-Identifier: MIT
"""Downloads, against a stand-in of the OpenML service on this machine; nothing leaves it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import _openml as client

from ddpnopt.experiments.data import load
from ddpnopt.experiments.loaders import openml

Pixels = NDArray[np.float64]


@dataclass
class Service:
    """What the stand-in serves, and how it misbehaves."""

    address: str = ""
    asked: list[str] = field(default_factory=list)
    tables: dict[int, bytes] = field(default_factory=dict)
    features: dict[int, int] = field(default_factory=dict)
    checksum: str | None = None
    fail_at: str = ""
    truncate: int = 0

    def offer(self, number: int, pixels: Pixels, labels: list[object]) -> None:
        classes = ",".join(str(label) for label in sorted({str(label) for label in labels}))
        lines = [f"@RELATION d{number}"]
        lines += [f"@ATTRIBUTE p{i} REAL" for i in range(pixels.shape[1])]
        lines += [f"@ATTRIBUTE class {{{classes}}}", "@DATA"]
        lines += [
            ",".join(f"{value:g}" for value in row) + f",{label}"
            for row, label in zip(pixels, labels, strict=True)
        ]
        self.tables[number] = "\n".join(lines).encode()
        self.features[number] = pixels.shape[1]

    def answer(self, path: str) -> bytes | None:
        number = int(path.rstrip("/").split("/")[-1].removesuffix(".arff"))
        if number not in self.tables:
            return None
        if path.endswith(".arff"):
            return self.tables[number]
        if "/features/" in path:
            names = [*(f"p{i}" for i in range(self.features[number])), "class"]
            listed = [
                {
                    "index": str(i),
                    "name": name,
                    "data_type": "nominal" if name == "class" else "numeric",
                    "is_target": "true" if name == "class" else "false",
                    "is_ignore": "false",
                    "is_row_identifier": "false",
                    "number_of_missing_values": "0",
                }
                for i, name in enumerate(names)
            ]
            return json.dumps({"data_features": {"feature": listed}}).encode()
        if "/qualities/" in path:
            rows = self.tables[number].split(b"@DATA")[1].strip().count(b"\n") + 1
            quality = [{"name": "NumberOfInstances", "value": str(rows)}]
            return json.dumps({"data_qualities": {"quality": quality}}).encode()
        described = {
            "id": str(number),
            "name": f"d{number}",
            "version": "1",
            "description": "stand-in",
            "format": "ARFF",
            "status": "active",
            "url": f"{self.address}/data/v1/download/{number}.arff",
            "file_id": str(number),
            "md5_checksum": self.checksum or hashlib.md5(self.tables[number]).hexdigest(),
        }
        return json.dumps({"data_set_description": described}).encode()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.answer(self.path)
            if content is None or (state.fail_at and state.fail_at in self.path):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            cut = state.truncate if self.path.endswith(".arff") else 0
            self.wfile.write(content[: len(content) - cut])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("_DATA_INFO", "_DATA_FEATURES", "_DATA_QUALITIES"):
        path = getattr(client, name).split("org", 1)[1]
        monkeypatch.setattr(client, name, state.address + path)
    monkeypatch.setattr(client.time, "sleep", lambda _: None)
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def pixels(rows: int, features: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (rows, features)).astype(np.float64)


def photographs(rows: int) -> Pixels:
    """Smooth colour images, shape (rows, 3, 32, 32)."""
    coarse = np.random.default_rng(1).integers(0, 256, (rows, 3, 4, 4))
    return np.kron(coarse, np.ones((1, 1, 8, 8)))


def test_first_rows_train_last_rows_test(service: Service, tmp_path: Path) -> None:
    rows = pixels(70, 784)
    service.offer(554, rows, [i % 10 for i in range(70)])
    data = load("mnist", cache=tmp_path / "cache", scale="none", images=True)
    assert data.x_train.shape == (60, 1, 28, 28) and data.x_test.shape == (10, 1, 28, 28)
    everything = torch.from_numpy(rows.astype(np.float32)).reshape(-1, 1, 28, 28)
    assert torch.equal(torch.cat([data.x_train, data.x_test]), everything)
    assert data.y_train.tolist() == [i % 10 for i in range(60)]
    assert data.label == "MNIST, 60 + 10 images, OpenML 554"


def test_standard_splits() -> None:
    """Of the sets' full sizes, the parts are the ones that everybody uses."""
    sizes = {name: (remote.train, remote.test) for name, remote in openml.REMOTES.items()}
    assert sizes == {
        "mnist": (60_000, 10_000),
        "fashion-mnist": (60_000, 10_000),
        "svhn": (73_257, 26_032),
        "cifar-10": (50_000, 10_000),
        "cifar-100": (50_000, 10_000),
    }
    for train, test in sizes.values():
        assert round((train + test) * test / (train + test)) == test


def test_a_second_load_asks_nobody(service: Service, tmp_path: Path) -> None:
    service.offer(554, pixels(14, 16), [i % 10 for i in range(14)])
    first = load("mnist", cache=tmp_path)
    service.asked.clear()
    openml_files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert openml_files == [openml.cached_file("mnist", tmp_path)]
    assert torch.equal(load("mnist", cache=tmp_path).x_train, first.x_train)
    assert not service.asked


def test_default_cache_is_scikit_learns(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "home"))
    service.offer(40996, pixels(14, 16), [i % 10 for i in range(14)])
    load("fashion-mnist")
    assert [p.name for p in (tmp_path / "home" / "ddpnopt").iterdir()] == [
        "fashion-mnist-openml-40996.npz"
    ]


@pytest.mark.parametrize(
    ("name", "number", "last", "unit"),
    [
        ("cifar-10", 40927, False, 1.0),
        ("cifar-10", 40927, False, 255.0),
        ("cifar-100", 41983, False, 1.0),
        ("svhn", 41081, True, 1.0),
    ],
)
def test_colour_images_in_both_layouts(
    name: str, number: int, last: bool, unit: float, service: Service, tmp_path: Path
) -> None:
    images = photographs(14)
    rows = (images.transpose(0, 2, 3, 1) if last else images).reshape(14, -1)
    labels: list[object] = [1 + i % 10 for i in range(14)] if name == "svhn" else [9] * 14
    service.offer(number, np.round(rows / unit, 5), labels)
    data = load(name, cache=tmp_path, scale="none", images=True)
    together = torch.cat([data.x_train, data.x_test])
    assert torch.equal(together, torch.from_numpy(images.astype(np.float32)))
    expected = [label % 10 for label in labels if isinstance(label, int)]
    assert torch.cat([data.y_train, data.y_test]).tolist() == expected
    assert data.classes == (100 if name == "cifar-100" else 10)


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"fail_at": ".arff"}, r"download/554.arff .*HTTP Error 404"),
        ({"fail_at": "/features/"}, r"data/features/554 .*HTTP Error 404"),
        ({"fail_at": "data/554"}, r"json/data/554 .*HTTP Error 404"),
        ({"truncate": 100}, "md5 checksum"),
        ({"checksum": "0" * 32}, "md5 checksum"),
    ],
)
def test_a_failed_download_leaves_nothing(
    trouble: dict[str, object], message: str, service: Service, tmp_path: Path
) -> None:
    service.offer(554, pixels(14, 16), [i % 10 for i in range(14)])
    for key, value in trouble.items():
        setattr(service, key, value)
    with pytest.raises(ValueError, match=message) as caught:
        load("mnist", cache=tmp_path)
    text = str(caught.value)
    assert "data set 'mnist'" in text and "--data DIR" in text and "IDX files" in text
    assert str(tmp_path / "ddpnopt") in text and "mnist-openml-554.npz" in text
    assert not leftovers(tmp_path)
    for key in trouble:
        setattr(service, key, getattr(Service(), key))
    assert len(load("mnist", cache=tmp_path).y_train) == 12


def test_nobody_answers(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of this machine: refused at once.
    monkeypatch.setattr(client, "_DATA_INFO", "http://127.0.0.1:9/json/data/{}")
    with pytest.raises(ValueError, match=r"download of http://127.0.0.1:9/json/data/40927 .*URLE"):
        load("cifar-10", cache=tmp_path)
    assert not leftovers(tmp_path)


def test_an_interrupt_leaves_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.offer(554, pixels(14, 16), [i % 10 for i in range(14)])

    def interrupt(*_: object) -> None:
        assert leftovers(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(openml.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("mnist", cache=tmp_path)
    assert [path.name for path in leftovers(tmp_path)] in ([], ["ddpnopt"])


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (pixels(14, 15), range(14), "15 features are no square image"),
        (pixels(14, 16) + 200, range(14), "no pixels between 0 and 255"),
        (pixels(14, 16) + 0.5, range(14), "no pixels between 0 and 255"),
        (pixels(14, 16), range(14), "a label is not in 0 to 9"),
        (pixels(14, 16), "abcdefghijklmn", "could not convert"),
    ],
)
def test_a_data_set_that_is_not_the_one(
    rows: Pixels, labels: list[object], message: str, service: Service, tmp_path: Path
) -> None:
    service.offer(554, rows, list(labels))
    with pytest.raises(ValueError, match=message):
        load("mnist", cache=tmp_path)
    assert not leftovers(tmp_path)


def test_a_damaged_cache_is_fetched_anew(service: Service, tmp_path: Path) -> None:
    service.offer(554, pixels(14, 16), [i % 10 for i in range(14)])
    first = load("mnist", cache=tmp_path)
    path = openml.cached_file("mnist", tmp_path)
    content = path.read_bytes()
    middle = len(content) // 4
    for damaged in (content[:-40], b"", content[:middle] + b"\0\0\0\0" + content[middle + 4 :]):
        path.write_bytes(damaged)
        assert torch.equal(load("mnist", cache=tmp_path).x_train, first.x_train)
    service.fail_at = ".arff"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="HTTP Error 404"):
        load("mnist", cache=tmp_path)
    assert not path.exists()


def test_labels_in_quotes(service: Service, tmp_path: Path) -> None:
    service.offer(554, pixels(14, 16), [f"'{i % 10}'" for i in range(14)])
    data = load("mnist", cache=tmp_path)
    assert data.y_train.tolist() == [*range(10), 0, 1]


def test_too_few_rows(service: Service, tmp_path: Path) -> None:
    service.offer(554, pixels(2, 16), [0, 1])
    with pytest.raises(ValueError, match="holds no sample"):
        load("mnist", cache=tmp_path)
