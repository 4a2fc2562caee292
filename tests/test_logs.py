# SPDX-License-Identifier: MIT
"""What steps did, in a folder: read back by csv, by TensorBoard's own reader, and by `watch`."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt import DDPNOpt, Feedback, StepLog, open_loop, scalars

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.DDPNOptWarning")
LR = 0.25


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers)


def train(
    folder: Path, steps: int = 3, make: Any = None, **options: Any
) -> list[tuple[float, Any]]:
    """Some logged steps; each loss with the record that belongs to it."""
    model = network()
    opt = DDPNOpt(model, lr=LR) if make is None else make(model)
    opt.diagnose = True
    seen = []
    with StepLog(folder, **options) as log:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 6, generator=generator), torch.arange(8) % 4
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            log(opt, loss, accuracy=0.5)
            seen.append((float(loss), opt.last_step))
    return seen


def table(folder: Path) -> dict[tuple[int, str], float]:
    with (folder / "steps.csv").open(newline="") as file:
        return {(int(r["step"]), r["scalar"]): float(r["value"]) for r in csv.DictReader(file)}


def test_csv_holds_each_step(tmp_path: Path) -> None:
    seen = train(tmp_path / "deep" / "folder")
    found = table(tmp_path / "deep" / "folder")
    for step, (loss, report) in enumerate(seen, 1):
        assert found[step, "loss"] == loss
        assert found[step, "lr"] == LR and found[step, "accuracy"] == 0.5
        assert found[step, "samples"] == 8
        for layer in report.layers:
            assert found[step, f"coefficient/{layer.name}"] == float(layer.coefficient.mean())
            assert found[step, f"coefficient_min/{layer.name}"] == float(layer.coefficient.min())
            share = (layer.coefficient < 0.5).double().mean()
            assert found[step, f"bounded/{layer.name}"] == pytest.approx(float(share))
            assert found[step, f"S/{layer.name}"] == float(layer.S.mean())
            assert found[step, f"k/{layer.name}"] == float(layer.k)
            assert found[step, f"Kdx/{layer.name}"] == float(layer.Kdx)
    assert {name for _, name in found if name.startswith("Kdx/")} == {"Kdx/0", "Kdx/2", "Kdx/4"}


def test_tensorboards_reader(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, tensorboard=True)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    found = table(tmp_path)
    assert set(reader.Tags()["scalars"]) == {name for _, name in found}
    for name in reader.Tags()["scalars"]:
        for event in reader.Scalars(name):
            assert event.value == pytest.approx(found[event.step, name], rel=1e-6)
        assert [event.step for event in reader.Scalars(name)] == [1, 2, 3]


def test_a_resumed_run_is_one_curve_and_a_line_cut_off_is_gone(tmp_path: Path) -> None:
    train(tmp_path, 2)
    path = tmp_path / "steps.csv"
    path.write_bytes(path.read_bytes() + b"2,coeffic")
    train(tmp_path, 2)
    found = table(tmp_path)
    assert sorted({step for step, _ in found}) == [1, 2, 3, 4]
    assert path.read_text().count("scalar") == 1


def test_back_to_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with StepLog(tmp_path / "killed", tensorboard=True) as log:
        for log.step, loss in enumerate((4.0, 3.0, 99.0, 98.0), 1):
            log.write({"loss": loss, "coefficient/a,b": 0.5})
        log.rewind(2)
        assert log.step == 2
        log.step = 3
        log.write({"loss": 2.0})
    found = {place: one for place, one in table(tmp_path / "killed").items() if place[1] == "loss"}
    assert found == {(1, "loss"): 4.0, (2, "loss"): 3.0, (3, "loss"): 2.0}
    assert table(tmp_path / "killed")[2, "coefficient/a,b"] == 0.5
    reader = EventAccumulator(str(tmp_path / "killed"))
    reader.Reload()
    assert [event.value for event in reader.Scalars("loss")] == [4.0, 3.0, 2.0]


def test_every_other_step(tmp_path: Path) -> None:
    train(tmp_path, 5, every=2)
    assert sorted({step for step, _ in table(tmp_path)}) == [2, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Feedback(model, torch.optim.AdamW(model.parameters(), LR)),
        lambda model: DDPNOpt(model, lr=LR, feedback="open_loop"),
    ],
)
def test_other_optimizers(tmp_path: Path, make: Any) -> None:
    train(tmp_path, 2, make)
    assert table(tmp_path)[2, "coefficient/0"] <= 1.0


def test_the_handle_of_open_loop_and_a_plain_optimizer(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    handle = open_loop(model, optimizer)
    F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 4).backward()
    optimizer.step()
    with StepLog(tmp_path) as log:
        log(handle, 1.0)
        log(optimizer, 2.0)
    found = table(tmp_path)
    assert (1, "coefficient/4") in found and found[2, "lr"] == LR and found[2, "loss"] == 2.0


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    with StepLog(tmp_path) as log:
        log.write({"loss": math.nan, "other": -math.inf})
    assert math.isnan(table(tmp_path)[0, "loss"]) and table(tmp_path)[0, "other"] == -math.inf


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_out_of_range(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="every"):
        StepLog(tmp_path, every=every)


def test_a_foreign_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text("epoch,accuracy\n1,0.5\n")
    with pytest.raises(ValueError, match="no log of steps"):
        StepLog(tmp_path)
    assert (tmp_path / "steps.csv").read_text() == "epoch,accuracy\n1,0.5\n"


def test_no_step_yet() -> None:
    assert scalars(None) == {}
    assert scalars(DDPNOpt(network()).last_step) == {}
