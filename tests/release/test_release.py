# SPDX-License-Identifier: MIT
"""Learning curves stay what they were at the last release; its states load and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpnopt import formats
from ddpnopt.formats import FORMAT_VERSION, UPGRADES
from release.record import (
    AFTER,
    CASES,
    CURVES,
    FEATURES,
    HERE,
    OPTIMIZERS,
    SAVED,
    curve,
    dense,
    losses,
    name_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.DDPNOptWarning")
STORED = json.loads(CURVES.read_text())
#: Other kernels and orders of summation disturb every step, the recording only the first weights.
MARGIN, FLOOR = 20.0, 2e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_learning_curves(case: tuple[str, bool]) -> None:
    stored = STORED[name_of(*case)]
    bound = max(FLOOR, MARGIN * stored["noise"])
    assert bound < 0.02  # else the comparison says nothing
    assert curve(*case) == pytest.approx(stored["losses"], rel=0, abs=bound)
    assert min(stored["losses"][-5:]) < 0.7 * stored["losses"][0]


def test_the_curves_tell_the_optimizers_apart() -> None:
    last = [tuple(round(v, 3) for v in one["losses"][5:]) for one in STORED.values()]
    assert len(set(last)) == len(last)


@pytest.mark.parametrize("path", sorted(HERE.glob("format*.pt")), ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_of_every_format_load_and_go_on(kind: str, path: Path) -> None:
    saved = torch.load(path, weights_only=True)[kind]
    model = dense(10, 8)
    opt = OPTIMIZERS[kind](model)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["state"])
    found = losses(model, opt, range(SAVED, SAVED + AFTER), FEATURES)
    assert found == pytest.approx(saved["losses"], rel=0, abs=FLOOR)


def test_each_format_has_its_states_and_its_upgrade() -> None:
    formats_stored = {int(path.stem.removeprefix("format")) for path in HERE.glob("format*.pt")}
    assert formats_stored == set(range(1, FORMAT_VERSION + 1))
    assert set(UPGRADES) == set(range(1, FORMAT_VERSION))


def test_an_older_format_is_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two releases had come since: an entry renamed, then another added."""
    model = dense(10, 8)
    opt = OPTIMIZERS["ddpnopt"](model)
    state: Any = opt.state_dict()
    state["ddpnopt"]["r"] = state["ddpnopt"].pop("rescale")
    before = {key: value for key, value in state["ddpnopt"].items()}

    def renamed(entry: dict[str, Any]) -> dict[str, Any]:
        entry["rescale"] = 2 * entry.pop("r")
        return entry

    monkeypatch.setattr(formats, "FORMAT_VERSION", 3)
    monkeypatch.setattr(formats, "UPGRADES", {1: renamed, 2: lambda entry: {**entry, "skipped": 7}})
    opt.load_state_dict(state)
    assert opt.engine.rescale == 2.0 and opt.skipped == 7
    assert state["ddpnopt"] == before


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1", True])
def test_formats_that_are_not_known(version: Any) -> None:
    opt = OPTIMIZERS["ddpnopt"](dense(10, 8))
    state: Any = opt.state_dict()
    state["ddpnopt"]["version"] = version
    words = "update ddpnopt" if version == FORMAT_VERSION + 1 else "expected the state_dict of a"
    with pytest.raises(ValueError, match=words):
        opt.load_state_dict(state)
