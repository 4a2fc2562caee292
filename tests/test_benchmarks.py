# SPDX-License-Identifier: MIT
"""The benchmark runs, and its figures mean what they say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*arguments: str, script: str = "step_cost.py") -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_times_are_ratios_to_sgd(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    wanted = ["--only", "DDPNOpt closed loop", "--only", "Adam"]
    run("--nets", "1", "--rounds", "2", "--threads", "1", "--no-memory", *wanted, "--out", str(out))
    (net,) = json.loads(out.read_text())["nets"]
    assert set(net["variants"]) == {"SGD", "Adam", "DDPNOpt closed loop"}
    assert net["variants"]["SGD"]["ratio"] == 1
    assert all(v["milliseconds"] > 0 for v in net["variants"].values())
    table = run("markdown", str(out))
    assert table.splitlines()[2] == "| SGD | 1.00 |"


def test_memory_and_operations_are_those_of_the_step() -> None:
    sgd = json.loads(run("footprint", "1", "SGD", "--threads", "1"))
    adam = json.loads(run("footprint", "1", "Adam", "--threads", "1"))
    # Two moments of the 5,578 parameters, in float32, and a little scratch memory.
    moments = 2 * 4 * 5578 / 2**20
    assert moments <= adam["tensor_mib"] - sgd["tensor_mib"] < 2 * moments
    assert sgd["gflop"] == adam["gflop"]
    # 2 operations a product; three products a weight and sample, less the first input gradient.
    products = 64 * 32 + 3 * 32 * 32 + 32 * 10
    assert sgd["gflop"] * 1e9 == 2 * 32 * (3 * products - 64 * 32)


def test_vanilla_ddps_cost_grows_with_the_batch_and_the_width(tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    text = run("--quick", "--out", str(out), script="vanilla_ddp.py")
    assert "theory" in text
    document = json.loads(out.read_text())
    costs = {(c["form"], c["batch"], c["width"]): c for c in document["costs"]}
    assert len(costs) == 9 and all(c["milliseconds"] > 0 for c in costs.values())
    measured = {(e["form"], e["cost"], e["in"]): e["measured"] for e in document["exponents"]}
    assert len(measured) == 8
    for form in ("low_rank", "dense"):
        small, large = costs[form, 4, 16]["mib"], costs[form, 8, 16]["mib"]
        assert large > small > costs["sgd", 4, 16]["mib"]
        exponent = math.log2(large / small)
        assert measured[form, "memory", "B"] == pytest.approx(exponent) and 0.5 < exponent < 2.5
