# SPDX-License-Identifier: MIT
"""Coverage-guided fuzzing of everything that reads a file.

    pip install atheris
    python benchmarks/fuzz.py [--targets idx,pickle,...] [--seconds 120] [--corpus DIR]

Each target runs in a process of its own: libFuzzer mutates files that are whole, keeps what reaches
new branches of the reader, and stops at the first input that does not end as a content or as a
`ValueError` that names the file; also at one that takes longer than 10 s or more than 2 GB. That
input is written to the corpus and shown. Prints inputs tried and branches reached of each target.
"""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

#: Seconds and megabytes that one input may take.
PATIENCE, MEMORY = 10, 2048
#: Beside the path, what an error may be known by: the name a text was given.
NAME = "fuzzed"


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: Makes inputs that are read without an error.
        read: Reads one, with a folder of its own; the first byte chooses between ways.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


def outcome(target: Target, data: bytes, folder: Path) -> bool:
    """Read one input.

    Returns:
        Whether it had a content.

    Raises:
        AssertionError: An error that does not name the file.
        Exception: Any error that is no `ValueError`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(data, folder)
        except ValueError as error:
            named = str(folder) in str(error) or NAME in str(error)
            assert named, f"an error without the file's name: {error!r}"
            return False
    return True


def _pixels() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)


# Data sets ---------------------------------------------------------------------------------------


def _idx(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.loaders import idx

    way, content = data[:1] or b"\0", data[1:]
    path = folder / ("images.gz" if way[0] & 3 else "images")
    path.write_bytes(gzip.compress(content, 1) if way[0] & 3 == 1 else content)
    return idx.read_idx(path, 3 if way[0] & 4 else 1)


def _idx_seeds() -> list[bytes]:
    images = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 1)) + bytes(range(6))
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3))
    return [
        b"\0" + labels,
        b"\1" + labels,
        b"\2" + gzip.compress(labels),
        b"\4" + images,
        b"\6" + gzip.compress(images),
    ]


def _read_cifar(data: bytes, folder: Path, ten: str, hundred: str) -> object:
    from ddpnopt.experiments.loaders import cifar

    name = "cifar-100" if data[:1] >= b"\x80" else "cifar-10"
    files = cifar.LAYOUTS[name].binary if ten.endswith(".bin") else cifar.LAYOUTS[name].python
    for file in files:
        (folder / file).write_bytes(data[1:])
    assert {ten, hundred} & set(files)
    return cifar.read(cifar.find(folder, name), name)


def _binary(data: bytes, folder: Path) -> object:
    return _read_cifar(data, folder, "test_batch.bin", "test.bin")


def _binary_seeds() -> list[bytes]:
    pixels = bytes(_pixels()[0])
    return [b"\0\x07" + pixels, b"\0\x07" + pixels + b"\x03" + pixels, b"\x80\x01\x63" + pixels]


def _pickle(data: bytes, folder: Path) -> object:
    return _read_cifar(data, folder, "test_batch", "test")


def _pickles(key: bytes) -> list[bytes]:
    # One sample: short files are mutated best.
    content = {b"data": _pixels()[:1], key: [7], b"batch_label": b"one"}
    return [pickle.dumps(content, protocol) for protocol in (0, 1, 2, 3, 4, 5)]


def _pickle_seeds() -> list[bytes]:
    return [b"\0" + one for one in _pickles(b"labels")] + [
        b"\x80" + one for one in _pickles(b"fine_labels")
    ]


def _archive(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.loaders import cifar

    path = folder / "cifar-100-python.tar.gz"
    zipped = data[:1] >= b"\x80"
    path.write_bytes(gzip.compress(data[1:], 1) if zipped else data[1:])
    return cifar.read(cifar.find(folder, "cifar-100"), "cifar-100")


def _archive_seeds() -> list[bytes]:
    found = []
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name in ("train", "test"):
                content = _pickles(b"fine_labels")[2 + number]
                member = tarfile.TarInfo(f"{'long/' * 30 * (number == 2)}cifar-100-python/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        found += [b"\x80" + buffer.getvalue(), b"\0" + gzip.compress(buffer.getvalue())]
    return found


def _folders(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.loaders import class_folders

    path = folder / "cifar-10.zip"
    path.write_bytes(data)
    return class_folders.read(path, 2)


def _folders_seeds() -> list[bytes]:
    from PIL import Image

    found = []
    for kind, packed in (("png", 0), ("png", 8), ("jpeg", 0)):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", packed) as archive:
            for number, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
                image = io.BytesIO()
                pixels = _pixels()[number % 2].reshape(32, 32, 3) // 64 * 64
                Image.fromarray(pixels).save(image, kind)
                archive.writestr(f"{name}/1.{kind}", image.getvalue())
        found.append(buffer.getvalue())
    return found


def _mat(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.loaders import svhn

    for name in svhn.FILES:
        content = data[1:]
        if data[:1] >= b"\x80":  # behind the compression, which mutations rarely survive
            packed = zlib.compress(content[128:], 1)
            tag = (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little")
            content = content[:128] + tag + packed
        (folder / name).write_bytes(content)
    return svhn.read(svhn.find(folder, "svhn"), "svhn")


def _mat_seeds() -> list[bytes]:
    import numpy as np
    from scipy.io import savemat

    found = []
    pixels = _pixels()[:1].reshape(1, 32, 32, 3).transpose(1, 2, 3, 0)
    for packed, extra in ((False, {}), (True, {}), (False, {"note": "text", "z": np.array([1j])})):
        buffer = io.BytesIO()
        savemat(
            buffer,
            {"y": np.array([[10]], np.uint8), "X": pixels, **extra},
            do_compression=packed,
        )
        found.append(b"\0" + buffer.getvalue())
        if not packed:
            found.append(b"\x80" + buffer.getvalue())
    return found


# Files of the experiments ------------------------------------------------------------------------


def _settings_of(data: bytes) -> tuple[str, Any]:
    from ddpnopt.experiments.reproduce.ablation_settings import AblationSettings
    from ddpnopt.experiments.reproduce.cost_settings import Table4
    from ddpnopt.experiments.reproduce.policy_settings import Policies
    from ddpnopt.experiments.reproduce.table3_settings import Table3Settings
    from ddpnopt.experiments.reproduce.vanishing_settings import Vanishing

    known = (
        ("table6", AblationSettings),
        ("table3", Table3Settings),
        ("fig5", Policies),
        ("fig6", Vanishing),
        ("table4", Table4),
    )
    return known[(data[0] if data else 0) % len(known)]


def _settings(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.reproduce import schema

    path = folder / "my.toml"
    path.write_bytes(data[1:])
    name, model = _settings_of(data)
    return schema.load(model, name, path)


def _settings_seeds() -> list[bytes]:
    from ddpnopt.experiments.reproduce import schema

    return [
        bytes([way]) + schema.packaged(_settings_of(bytes([way]))[0]).encode() for way in range(5)
    ]


def _options(data: bytes, folder: Path) -> object:
    """An optimizer as the command line takes it: `name:key=value,key=value`."""
    import torch

    from ddpnopt.experiments.optimizers import build_optimizer
    from ddpnopt.experiments.specs import parse_optimizer

    try:
        name, options = parse_optimizer(data.decode("utf-8", "replace"))
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
        return build_optimizer(name, model, 0.1, options)
    except ValueError as error:
        assert len(str(error)) > 10, error
        raise ValueError(f"{NAME}: {error}") from error


def _options_seeds() -> list[bytes]:
    texts = (
        "sgd:momentum=0.9,weight_decay=1e-4,nesterov=true",
        "ddpnopt-rmsprop:curvature.alpha=0.9,curvature.eps=1e-6,value=gauss_newton",
        "ddpnopt:curvature=kfac,curvature.damping=0.1,value=low_rank,value.rank=2",
        "ddpnopt:feedback=open_loop,terminal=cross_entropy,nonfinite=skip",
        "feedback-adamw:weight_decay=0.1,mode=brake",
        "sgd-clip:grad_clip=0.5",
    )
    return [text.encode() for text in texts]


def _store(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.records import RunConfig, RunResult
    from ddpnopt.experiments.store import SqliteStore

    path = folder / "store.sqlite"
    path.write_bytes(data)
    store = SqliteStore(path, code="c")
    config = RunConfig(dataset="wine", optimizer="sgd")
    found = store.results(all_versions=True), store.results(), store.keys(), store.crashed()
    store.get(store.key(config))
    store.get_record("cost", "a")
    store.claim("b")
    store.append(RunResult.crash(config.model_copy(update={"seed": 9}), "E: e"))
    store.release()
    return found


def _store_seeds() -> list[bytes]:
    from ddpnopt.experiments.records import RunConfig, RunResult
    from ddpnopt.experiments.store import SqliteStore

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.sqlite"
        store = SqliteStore(path, code="c")
        store.append(RunResult.crash(RunConfig(dataset="wine", optimizer="sgd"), "E: e"))
        store.put_record("cost", "a", {"ms": [1.5]})
        store.claim("b")
        return [path.read_bytes()]


def _record(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.selection import read_runs

    (folder / "result.json").write_bytes(data)
    return read_runs(folder)


def _record_seeds() -> list[bytes]:
    from ddpnopt.experiments.records import Epoch, RunConfig, RunResult

    epoch = Epoch(epoch=1, train_loss=0.5, test_accuracy=0.75, seconds=1.0)
    config = RunConfig(options={"momentum": 0.9, "eps": float("inf")}, train_samples=5)
    crash = RunResult.crash(config, "ValueError: what")
    return [
        crash.model_dump_json().encode(),
        crash.model_copy(update={"epochs": (epoch,)}).model_dump_json().encode(),
    ]


def _sealed(content: bytes) -> bytes:
    return content + f"\nddpnopt checkpoint, sha256 {sha256(content).hexdigest()}\n".encode()


def _checkpoint(data: bytes, folder: Path) -> object:
    from ddpnopt.experiments.checkpoints import read_checkpoint

    path = folder / "step-000000001.pt"
    # A checksum that fits takes what was mutated to torch's own reader.
    path.write_bytes(_sealed(data[1:]) if data[:1] >= b"\x80" else data[1:])
    return read_checkpoint(path)


def _checkpoint_seeds() -> list[bytes]:
    import torch

    from ddpnopt.experiments.checkpoints import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000000001.pt"
        state = {"a": torch.arange(3.0), "b": [1, None, "c", torch.float16], "d": {1: (2.0, b"e")}}
        write_checkpoint(path, state)
        whole = path.read_bytes()
    return [b"\0" + whole, b"\x80" + whole[: -len(_sealed(b""))]]


TARGETS = {
    "idx": Target(_idx_seeds, _idx),
    "binary": Target(_binary_seeds, _binary),
    "pickle": Target(_pickle_seeds, _pickle),
    "archive": Target(_archive_seeds, _archive),
    "folders": Target(_folders_seeds, _folders),
    "mat": Target(_mat_seeds, _mat),
    "settings": Target(_settings_seeds, _settings),
    "options": Target(_options_seeds, _options),
    "store": Target(_store_seeds, _store),
    "record": Target(_record_seeds, _record),
    "checkpoint": Target(_checkpoint_seeds, _checkpoint),
}


# Running -----------------------------------------------------------------------------------------


def fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz one target; the process ends here."""
    import atheris  # type: ignore[import-not-found]

    target = TARGETS[name]
    with (
        tempfile.TemporaryDirectory() as first,
        atheris.instrument_imports(include=["ddpnopt.experiments", "tomllib"]),
    ):
        # The readers are imported where they are used.
        for seed in target.seeds():
            outcome(target, seed, Path(first))
    import torch

    torch.set_num_threads(1)
    place = corpus / name
    place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (place / f"seed-{number}").write_bytes(seed)
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))

    def one(data: bytes) -> None:
        for left in folder.iterdir():
            left.unlink()
        outcome(target, data, folder)

    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={PATIENCE}",
        f"-rss_limit_mb={MEMORY}",
        f"-malloc_limit_mb={MEMORY}",
        "-max_len=65536",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus}/{name}-",
        str(place),
    ]
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the targets that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--corpus", type=Path, default=Path("results/fuzz"))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = asked.targets.split(",")
    if asked.alone:
        fuzz(names[0], asked.seconds, asked.corpus)
    failed = False
    for name in names:
        options = ["--targets", name, "--seconds", str(asked.seconds), "--corpus", asked.corpus]
        command = [sys.executable, __file__, "--alone", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        tried = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
        branches = re.findall(r"cov: (\d+)", done.stderr)
        print(name, *tried[-1:], "inputs", *branches[-1:], "branches", sep="\t", flush=True)
        if done.returncode:
            failed = True
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
