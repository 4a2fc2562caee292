# SPDX-License-Identifier: MIT
"""The benchmark runs, and its figures mean what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from ddpnopt.experiments.bench import cases, document, large, measure, sheets
from ddpnopt.experiments.bench.cases import BASELINE, NETS, VARIANTS, Net, Variant, chosen
from ddpnopt.experiments.bench.growth import measure_growth
from ddpnopt.experiments.commands import app
from ddpnopt.experiments.reproduce import step_cost
from ddpnopt.testing import Operations

FOLDER = Path(__file__).parents[1] / "benchmarks"
MIB = 2**20
TINY = Net("4-3-2", lambda: cases.dense_net((4, 3, 10), nn.Tanh), (4,), 2)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measure, "CHUNK_SECONDS", 1e-4)
    monkeypatch.setattr(step_cost, "CHUNK_SECONDS", 1e-4)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Time ---------------------------------------------------------------------------------------


def test_nets_run_in_bfloat16(tmp_path: Path) -> None:
    kinds = []
    job = measure.Job(replace(TINY, autocast=True), VARIANTS["DDPNOpt closed loop"])
    job.model[-1].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    job.step()
    assert set(kinds) == {torch.bfloat16}
    out = tmp_path / "bench.json"
    done = bench("--net", "1", "--quick", "--autocast", "--part", "time", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "by autocast" in done.output and "targets met" not in done.output
    assert "--autocast" in document.read(out).command


def test_times_are_ratios_to_sgd(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    wanted = ["--only", "ddpnopt closed loop", "--only", "Adam", "--json", str(out), "--markdown"]
    done = bench("--nets", "1", "--rounds", "3", "--threads", "1", "--part", "time", *wanted)
    assert done.exit_code == 0, done.output
    (net,) = json.loads(out.read_text())["nets"]
    assert set(net["variants"]) == {"SGD", "Adam", "DDPNOpt closed loop"}
    for entry in net["variants"].values():
        assert entry["milliseconds"] > 0 and entry["low"] <= entry["ratio"] <= entry["high"]
        assert entry["tensor_mib"] is None
    assert "| DDPNOpt closed loop: time | net 1 | – | 2.50 |" in done.output


class Drifting:
    """A job on a machine that slows down steadily; "slow" takes twice the baseline's time."""

    calls = 0

    def __init__(self, net: Net, variant: Variant, device: str = "cpu") -> None:
        self.factor = 2.0 if variant.clip is not None else 1.0

    def remember(self) -> None: ...

    def seconds(self, steps: int) -> float:
        Drifting.calls += 1
        return self.factor * (1 + 0.1 * Drifting.calls)


def test_a_machine_that_slows_down_does_not_change_the_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "Job", Drifting)
    slow = Variant(lambda m: torch.optim.SGD(m.parameters()), clip=1.0)
    timings, errors = measure.time_steps(TINY, {BASELINE: VARIANTS[BASELINE], "slow": slow}, 4)
    assert not errors
    assert timings["slow"].ratio == pytest.approx(2) and timings["slow"].high == pytest.approx(2)
    assert timings[BASELINE].ratio == pytest.approx(1)


class Counting(torch.optim.SGD):
    """SGD that counts its steps, fails on demand, and hoards memory."""

    def __init__(self, model: nn.Module, hoard: int = 0, fails_at: int = -1) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.count, self.fails_at = 0, fails_at
        self.hidden = torch.zeros(hoard)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.count == self.fails_at:
            raise ValueError("out of luck")
        self.count += 1
        super().step(closure)


@pytest.mark.parametrize("chunk", [1e-9, 0.02])
def test_chunks_cover_whole_periods(monkeypatch: pytest.MonkeyPatch, chunk: float) -> None:
    monkeypatch.setattr(measure, "CHUNK_SECONDS", chunk)
    clock = measure._Clock(TINY, Variant(Counting, period=10), "cpu")
    before = clock.job.optimizer.count
    clock.chunk()
    steps = clock.job.optimizer.count - before
    assert steps >= 10 and steps % 10 == 0


# Memory and operations ----------------------------------------------------------------------


def test_memory_and_operations_are_those_of_the_step() -> None:
    sgd = measure.footprint(NETS[1], VARIANTS["SGD"])
    adam = measure.footprint(NETS[1], VARIANTS["Adam"])
    # Weights and gradients of 5,578 parameters in float32; two moments in Adam's case.
    weights = 4 * 5578 / MIB
    assert 2 * weights <= sgd.held_mib < 2.05 * weights
    assert 4 * weights <= adam.held_mib < 4.1 * weights
    assert sgd.held_mib < sgd.steady_mib <= sgd.tensor_mib < 3 * weights
    assert sgd.gflop == adam.gflop
    # 2 operations a product; three products a weight and sample, less the first input gradient.
    products = 64 * 32 + 3 * 32 * 32 + 32 * 10
    assert sgd.gflop * 1e9 == pytest.approx(2 * 32 * (3 * products - 64 * 32), abs=1e-3)


def test_memory_that_an_optimizer_keeps_out_of_its_state_counts() -> None:
    plain = measure.footprint(TINY, Variant(Counting))
    hoarding = measure.footprint(TINY, Variant(lambda m: Counting(m, hoard=MIB)))
    for field in ("tensor_mib", "steady_mib", "held_mib"):
        assert getattr(hoarding, field) - getattr(plain, field) == pytest.approx(4)


class Slow(Counting):
    """Needs MIB numbers in its first step alone."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        scratch = torch.empty(MIB if self.count == 0 else 1)
        super().step(closure)
        del scratch


def test_what_the_first_steps_need_is_in_the_peak() -> None:
    plain, slow = (measure.footprint(TINY, Variant(kind)) for kind in (Counting, Slow))
    assert slow.tensor_mib - plain.tensor_mib == pytest.approx(4, abs=0.01)
    assert slow.steady_mib - plain.steady_mib == pytest.approx(0, abs=0.01)


def test_the_first_steps_checks_are_not_in_the_operations() -> None:
    cost = measure.footprint(NETS[1], VARIANTS["DDPNOpt closed, no weight grads"])
    assert cost.steady_mib <= cost.tensor_mib
    variant = VARIANTS["DDPNOpt closed, no weight grads"]
    job = measure.Job(NETS[1], variant)
    assert measure.operations(job, 1) > 1e9 * cost.gflop
    for _ in range(variant.settle):
        job.step()
    with Operations() as own:
        job.step()
    assert own.total == pytest.approx(1e9 * cost.gflop)
    # Both counters see the same operators. (The standard one's module hooks ask for nodes of the
    # graph, so that the pass counts as one with branches, and is probed anew.)
    with FlopCounterMode(display=False) as standard, Operations() as both:
        job.step()
    assert standard.get_total_flops() == both.total > 0


@pytest.mark.parametrize("net", [1, 2])
@pytest.mark.parametrize("target", [t for t in document.targets().target if t.quantity == "flops"])
def test_operations_stay_within_their_targets(net: int, target: document.Target) -> None:
    sgd, own = (measure.footprint(NETS[net], VARIANTS[n]) for n in (BASELINE, target.variant))
    assert own.gflop / sgd.gflop <= target.limit[net]


def test_operations_of_a_step_that_takes_inner_gradients_are_counted() -> None:
    assert measure.footprint(TINY, VARIANTS["E-MSA"]).gflop > 0


# Peers and failures -------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cases.VARIANTS, "ghost", Variant(Counting, package="no_such_package"))
    options = ["--only", "ghost", "--part", "memory", "--out", str(tmp_path), "--markdown"]
    done = bench("--nets", "1", "--threads", "1", *options)
    assert done.exit_code == 0, done.output
    assert "ghost: not installed (no_such_package)" in done.output


@pytest.mark.parametrize("package, code", [(None, 1), ("torch", 0)])
def test_one_that_fails_does_not_cost_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str | None, code: int
) -> None:
    broken = Variant(lambda m: Counting(m, fails_at=2), package=package)
    monkeypatch.setitem(cases.VARIANTS, "broken", broken)
    options = ["--only", "broken", "--rounds", "1", "--out", str(tmp_path)]
    done = bench("--nets", "1", "--part", "time", "--part", "memory", *options)
    assert done.exit_code == code, done.output
    found = document.read(tmp_path / "bench.json")
    assert found.nets[0].variants["SGD"].gflop and "out of luck" in found.failures[0]


def test_names_and_patterns() -> None:
    assert list(chosen(["adam*"], 1)) == ["SGD", "Adam", "AdamW", "AdamW fused"]
    assert "DDPNOpt dense" not in chosen([], 2) and "DDPNOpt dense" in chosen(["*dense"], 1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "no such"], "RMSprop"),
        (["--nets", "7"], "784-512x4-10"),
        (["--part", "no such"], "growth"),
        (["--device", "no such"], "--device"),
        (["--from", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and said in done.output, done.output


# Documents, targets, pages ------------------------------------------------------------------


def figures(ratio: float, gflop: float = 1.5) -> document.Document:
    entries = {
        "SGD": document.Entry(ratio=1.0, low=0.9, high=1.1, tensor_mib=2.0, gflop=1.0),
        "DDPNOpt closed loop": document.Entry(ratio=ratio, low=1.0, high=9.0, gflop=gflop),
    }
    net = document.NetFigures(net=2, title="two", batch=128, variants=entries)
    return document.Document(
        torch="2", device="cpu", machine="m", threads=1, rounds=1, nets=[net], command="ddpnopt"
    )


def line(text: str, name: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(f"| {name} |"))


def test_targets_are_judged_and_stand_beside_earlier_figures() -> None:
    name = "DDPNOpt closed loop: time"
    for ratio, said in ((1.9, "met"), (1.91, "missed")):
        row = line(sheets.markdown(figures(ratio), figures(3.3)), name)
        assert (
            row == f"| {name} | net 2 | 1.75 | 1.90 | 3.30 | {ratio:.2f} | 1.00 to 9.00 | {said} |"
        )
    text = sheets.markdown(figures(1.9, gflop=1.81))
    assert line(text, "DDPNOpt closed loop: flops").endswith("| 1.80 | 1.81 | – | missed |")
    assert line(text, "DDPNOpt open loop: time").endswith("| 1.45 | – | – | not measured |")
    other = figures(1.0)
    other.nets[0].batch = 64  # another setting than the targets'
    assert "Targets" not in sheets.markdown(other)


def test_figures_are_published_into_a_page(tmp_path: Path) -> None:
    source, page = tmp_path / "bench.json", tmp_path / "page.md"
    figures(1.9).write(source)
    page.write_text("before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n")
    done = bench("--from", str(source), "--publish", str(page))
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| DDPNOpt closed loop: time | net 2 |" in text
    page.write_text("no marks")
    done = bench("--from", str(source), "--publish", str(page))
    assert done.exit_code == 2 and page.read_text() == "no marks"
    source.write_text("{}")
    assert "not a file that" in bench("--from", str(source)).output.replace("\n", " ")


def test_runs_are_put_together(tmp_path: Path) -> None:
    first, second = figures(3.0, gflop=1.5), figures(1.9)
    for entry in second.nets[0].variants.values():
        entry.gflop = None
    first.failures = ["DDPNOpt closed loop on net 2: RuntimeError: no", "other on net 2: no"]
    whole = document.joined([first, second])
    name = "DDPNOpt closed loop"
    assert whole.nets[0].variants[name].ratio == 1.9  # the later one's
    assert whole.nets[0].over_baseline(name, "gflop") == 1.5  # not measured again
    assert whole.failures == ["other on net 2: no"] and whole.command == "ddpnopt\nddpnopt"
    assert first.nets[0].variants[name].ratio == 3.0
    for path, one in ((tmp_path / "1.json", first), (tmp_path / "2.json", second)):
        one.write(path)
    done = bench("--from", f"{tmp_path}/1.json", "--from", f"{tmp_path}/2.json", "--markdown")
    assert "| 1.90 |" in line(done.output, f"{name}: time")
    assert "| 1.50 |" in line(done.output, f"{name}: flops")
    second.threads = 2
    with pytest.raises(document.DocumentError, match="1 and 2: runs of different threads"):
        document.joined([first, second])
    second.threads, second.nets[0].batch = 1, 64
    with pytest.raises(document.DocumentError, match="net 2: runs of batches 128 and 64"):
        document.joined([first, second])


# Growth and large nets ----------------------------------------------------------------------

GROWTH = """
rounds = 1
tolerance = 0.4
published = {}
"""
SIZES = "{ batch = [2, 4], width = [8, 16], depth = [1, 2], base = [2, 8, 1] }"


def test_growth_is_fitted_drawn_and_compared_with_sgds(tmp_path: Path) -> None:
    settings = tmp_path / "growth.toml"
    methods = (("SGD", "sgd"), ("DDPNOpt", "ddpnopt"))
    settings.write_text(
        GROWTH
        + "".join(
            f'[[method]]\nname = "{n}"\noptimizer = "{o}"\ntime = {SIZES}\nmemory = {SIZES}\n'
            for n, o in methods
        )
    )
    console = sheets.Console(quiet=True)
    rows, picture = measure_growth(tmp_path, False, console, settings)
    assert len(rows) == 12 and picture.read_bytes().startswith(b"\x89PNG")
    width = next(e for e in rows if (e.method, e.cost, e.size) == ("SGD", "memory", "X"))
    small, big = map(float, width.costs.split())
    assert width.measured == pytest.approx(math.log2(big / small), abs=0.01)
    found = figures(1.0)
    for e in rows:
        e.measured = 1.0
    found.growth = rows
    assert line(sheets.markdown(found), "DDPNOpt").endswith("| met |")
    rows[-1].measured = 1.31
    assert line(sheets.markdown(found), "DDPNOpt").endswith("| missed: memory in L |")


def test_large_nets_are_measured_in_processes_of_their_own() -> None:
    cost = large.measure_apart("chain", "SGD", "cpu", 1, quick=True)
    parameters = 49 * (32 * 32 + 32) + 32 * 10 + 10
    assert cost.parameters == parameters
    assert cost.tensor_mib >= 2 * 4 * parameters / MIB and cost.process_mib > 0
    assert cost.losses[1] < cost.losses[0]
    found = figures(1.0)
    own = cost.model_copy(
        update={"variant": "DDPNOpt closed loop", "tensor_mib": 2.6 * cost.tensor_mib}
    )
    found.large = [cost, own]
    text = sheets.markdown(found)
    assert "| DDPNOpt closed loop: memory | chain | – | 2.50 | 2.60 | – | missed |" in text
    with pytest.raises(RuntimeError, match="no such"):
        large.measure_apart("chain", "no such", "cpu", 1, quick=True)


# Programs of the folder ---------------------------------------------------------------------


def test_the_script_is_the_command() -> None:
    assert "--publish" in script("step_cost.py", "--help")


def test_many_classes_and_few_columns() -> None:
    text = script("many_classes.py", "--classes", "10", "--ranks", "3")
    assert "9 (exact)" in text


def test_vanilla_ddps_cost_grows_with_the_batch_and_the_width(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    text = script("vanilla_ddp.py", "--quick", "--out", str(out))
    assert "theory" in text
    found = json.loads(out.read_text())
    costs = {(c["form"], c["batch"], c["width"]): c for c in found["costs"]}
    assert len(costs) == 9 and all(c["milliseconds"] > 0 for c in costs.values())
    measured = {(e["form"], e["cost"], e["in"]): e["measured"] for e in found["exponents"]}
    assert len(measured) == 8
    for form in ("low_rank", "dense"):
        small, big = costs[form, 4, 16]["mib"], costs[form, 8, 16]["mib"]
        assert big > small > costs["sgd", 4, 16]["mib"]
        exponent = math.log2(big / small)
        assert measured[form, "memory", "B"] == pytest.approx(exponent) and 0.5 < exponent < 2.5


def test_the_cost_of_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual step of a chain is an unwatched one in the end, and the table has all cells."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import graph_cost

    monkeypatch.setattr(graph_cost, "WARM", 2)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 10)]
    for kind in (graph_cost.Chain, graph_cost.Alternating):
        cells = graph_cost.measure(lambda kind=kind: kind(layers), (3, 4), 3)
        assert list(cells) == ["unwatched", "usual", "watched"]
        assert all(float(text.split()[0]) > 0 for text in cells.values())
