# SPDX-License-Identifier: MIT
"""The benchmark's figures as one JSON document, and the targets they are compared with."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ddpnopt.experiments.bench.cases import BASELINE
from ddpnopt.experiments.bench.large import LargeCost

Quantity = Literal["time", "memory", "flops"]
#: Key of a net's figure by quantity; a ratio is its quotient by the baseline's.
FIELDS = {"memory": "tensor_mib", "flops": "gflop"}


class DocumentError(ValueError):
    """A file is no benchmark document."""


class Entry(BaseModel):
    """Figures of one optimizer on one net; None: not measured.

    Attributes:
        milliseconds: See `Timing`.
        ratio: See `Timing`.
        low: See `Timing`.
        high: See `Timing`.
        tensor_mib: See `Footprint`.
        steady_mib: See `Footprint`.
        held_mib: See `Footprint`.
        gflop: See `Footprint`.
        error: Why it could not be measured.
    """

    model_config = ConfigDict(extra="ignore")

    milliseconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    tensor_mib: float | None = None
    steady_mib: float | None = None
    held_mib: float | None = None
    gflop: float | None = None
    error: str = ""


class NetFigures(BaseModel):
    """Figures of one net.

    Attributes:
        net: Its number.
        title: What it is.
        batch: Samples in a step.
        variants: Figures by optimizer.
        missing: Optimizers whose package is not installed, and the package.
    """

    net: int
    title: str
    batch: int
    variants: dict[str, Entry]
    missing: dict[str, str] = {}

    def over_baseline(self, name: str, field: str) -> float | None:
        """A figure as a ratio to the baseline's; None where one of them lacks."""
        own, base = self.variants.get(name), self.variants.get(BASELINE)
        if own is None or base is None:
            return None
        value, unit = getattr(own, field), getattr(base, field)
        return None if value is None or not unit else float(value / unit)


class Exponent(BaseModel):
    """How a cost grows with a size: cost = c size^measured.

    Attributes:
        method: The optimizer.
        cost: "time" or "memory".
        size: "B", "X" or "L".
        measured: Least-squares exponent; None: not measured.
        last_two: Exponent between the two largest sizes.
        sizes: The sizes, separated by blanks.
        costs: The costs, likewise.
        unit: Of the costs.
    """

    method: str
    cost: str
    size: str
    measured: float | None
    last_two: float | None
    sizes: str
    costs: str
    unit: str


class Document(BaseModel):
    """All figures of a run of the benchmark.

    Attributes:
        torch: Torch's version.
        device: Torch device.
        machine: Processor, or the GPU's name.
        cores: Cores of the machine.
        threads: Torch's threads.
        rounds: Timed rounds.
        quick: Made with `--quick`: no result.
        autocast: Nets were run in bfloat16 by `torch.autocast`: no target is for that.
        nets: Figures of each net.
        growth: Exponents.
        growth_figure: File of the log-log figure.
        large: Large nets.
        failures: What could not be measured, and why.
        command: How to measure again.
    """

    torch: str
    device: str
    machine: str
    cores: str = ""
    threads: int
    rounds: int
    quick: bool = False
    autocast: bool = False
    nets: list[NetFigures] = []
    growth: list[Exponent] = []
    growth_figure: str = ""
    large: list[LargeCost] = []
    failures: list[str] = []
    command: str = ""

    def net(self, number: int) -> NetFigures | None:
        """Figures of a net; None where it was not measured."""
        return next((n for n in self.nets if n.net == number), None)

    def large_ratio(self, net: str, variant: str, field: str) -> float | None:
        """A large net's figure as a ratio to the baseline's; None where one of them lacks."""
        found = {c.variant: getattr(c, field) for c in self.large if c.net == net}
        base = found.get(BASELINE)
        return found[variant] / base if base and variant in found else None

    def write(self, path: Path) -> None:
        """Write it as JSON; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=2) + "\n")


def read(path: Path) -> Document:
    """Read a document.

    Raises:
        DocumentError: There is no such file, or it is none.
    """
    try:
        return Document.model_validate_json(path.read_text())
    except OSError as error:
        raise DocumentError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DocumentError(
            f"{path}: not a file that `ddpnopt bench` wrote ({where}: {first['msg']})"
        ) from error


def joined(documents: Sequence[Document]) -> Document:
    """The figures of several runs in one document; what two have measured is the later one's.

    Growth and large nets are all of one run, the latest that has any.

    Raises:
        DocumentError: They are not of one machine, torch, device and number of threads.
    """
    whole = documents[0].model_copy(deep=True)
    for more in documents[1:]:
        for field in ("torch", "device", "machine", "threads", "autocast"):
            own, other = getattr(whole, field), getattr(more, field)
            if own != other:
                raise DocumentError(f"{own} and {other}: runs of different {field} stay apart")
        known = {figures.net: figures for figures in whole.nets}
        for figures in more.nets:
            known[figures.net] = _completed(known.get(figures.net, figures), figures)
        timed = any(e.ratio is not None for n in more.nets for e in n.variants.values())
        whole = whole.model_copy(
            update={
                "nets": [known[number] for number in sorted(known)],
                "rounds": more.rounds if timed else whole.rounds,
                "quick": whole.quick or more.quick,
                "growth": more.growth or whole.growth,
                "growth_figure": more.growth_figure or whole.growth_figure,
                "large": more.large or whole.large,
                "failures": [*(f for f in whole.failures if not _mended(f, more)), *more.failures],
                "command": "\n".join(filter(None, (whole.command, more.command))),
            }
        )
    return whole


def _mended(failure: str, later: Document) -> bool:
    """Whether what could not be measured has been measured by a later run."""
    return any(
        failure.startswith(f"{name} on net {figures.net}:") and entry.ratio is not None
        for figures in later.nets
        for name, entry in figures.variants.items()
    )


def _completed(earlier: NetFigures, later: NetFigures) -> NetFigures:
    if earlier.batch != later.batch:
        raise DocumentError(
            f"net {later.net}: runs of batches {earlier.batch} and {later.batch} stay apart"
        )
    variants = dict(earlier.variants)
    for name, entry in later.variants.items():
        before = variants.get(name, Entry()).model_dump()
        now = {field: value for field, value in entry.model_dump().items() if value is not None}
        if entry.ratio is None:  # what went wrong with the times did so
            now["error"] = entry.error or before["error"]
        variants[name] = Entry(**before | now)
    missing = {
        name: p for name, p in {**earlier.missing, **later.missing}.items() if name not in variants
    }
    return later.model_copy(update={"variants": variants, "missing": missing})


class Target(BaseModel):
    """What a ratio is to stay below.

    Attributes:
        variant: The optimizer.
        quantity: Which ratio.
        limit: Highest ratio by net.
        floor: Ratio of the method's own multiply-accumulates by net.
        large: Highest ratio by large net.
        device: Kind of device it is for.
        batch: Samples in a step; None: the net's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: str
    quantity: Quantity
    limit: dict[int, float] = {}
    floor: dict[int, float] = {}
    large: dict[str, float] = {}
    device: Literal["cpu", "cuda"] = "cpu"
    batch: int | None = None


class Targets(BaseModel):
    """The file `targets.toml`.

    Attributes:
        growth_tolerance: By how much an exponent of the default may exceed SGD's.
        target: The targets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    growth_tolerance: float
    target: tuple[Target, ...]


@cache
def targets() -> Targets:
    """The targets."""
    text = files(__package__).joinpath("targets.toml").read_text()
    return Targets.model_validate(tomllib.loads(text))


def figure_of(found: NetFigures, target: Target) -> tuple[float | None, str]:
    """A target's measured ratio and its spread, as text, on a net."""
    entry = found.variants.get(target.variant, Entry())
    if target.quantity == "time":
        spread = "" if entry.low is None else f"{entry.low:.2f} to {entry.high:.2f}"
        return entry.ratio, spread
    return found.over_baseline(target.variant, FIELDS[target.quantity]), ""


def applies(target: Target, document: Document, found: NetFigures, standard: int) -> bool:
    """Whether a target is one for these figures.

    Args:
        target: The target.
        document: What was measured.
        found: The net's figures.
        standard: The net's own batch.
    """
    if document.autocast:
        return False
    batch = standard if target.batch is None else target.batch
    # Operations do not depend on the device; all other targets are for their own kind.
    device = target.quantity == "flops" or document.device.startswith(target.device)
    return device and found.net in target.limit and (document.quick or found.batch == batch)
