# SPDX-License-Identifier: MIT
"""Feedback policies as images: against dense matrices; stored, missing and quick figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpnopt import DDPNOpt, feedback_gains
from ddpnopt.experiments.data import load as load_data
from ddpnopt.experiments.models import build_model
from ddpnopt.experiments.reproduce import policies
from ddpnopt.experiments.reproduce.gain_pictures import first_of_classes, pictures, trained
from ddpnopt.experiments.reproduce.outcome import QUICK, Request, markdown, write
from ddpnopt.experiments.reproduce.policy_settings import Policies
from ddpnopt.experiments.reproduce.schema import SettingsError, load, parse
from ddpnopt.experiments.store import SqliteStore

SETTINGS = """
architecture = "cnn-3"
scale = "pooled"
optimizer = "ddpnopt"
lr = 0.1
step = 0.1
samples = 2
vectors = 2
triplets = 9
[quick]
epochs = 1
train_samples = 40
samples = 1
[[problem]]
dataset = "digits"
epochs = 1
batch = 32
train_samples = 64
[[problem]]
dataset = "mnist"
epochs = 1
batch = 32
"""


def request(folder: Path, text: str = SETTINGS, **changes: object) -> Request:
    settings = folder / "settings.toml"
    settings.write_text(text)
    return Request(folder, SqliteStore(folder / "store.sqlite"), settings=settings, **changes)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", images=True, scale="pooled")


def test_pictures_are_the_gain_matrix_s_own(digits) -> None:
    torch.manual_seed(0)
    model = build_model("cnn-6", digits.input_shape, digits.classes)
    before = [p.detach().clone() for p in model.parameters()]
    (found,) = pictures(
        model, digits, [5], value="low_rank", step=0.1, triplets=9, vectors=2, seed=0
    )
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert found["label"] == int(digits.y_test[5])
    assert [layer["layer"] for layer in found["layers"]] == ["2", "5", "7"]  # convolutions only

    with DDPNOpt(model, lr=0.1, value="low_rank", terminal="cross_entropy") as opt:
        loss = torch.nn.functional.cross_entropy(model(digits.x_test[5:6]), digits.y_test[5:6])
        loss.backward()
        gain = feedback_gains(opt)["5"]
        K = gain.dense().double()
        assert torch.linalg.matrix_rank(K, rtol=1e-4) == digits.classes - 1
        _, s, vt = torch.linalg.svd(K, full_matrices=False)
        image = gain.to_input(vt[0]).double()
    layer = found["layers"][1]
    np.testing.assert_allclose(layer["values"], s[:9].numpy(), rtol=1e-3)
    shown = torch.tensor(layer["images"][0]).double()
    assert shown.shape == digits.input_shape
    cosine = torch.nn.functional.cosine_similarity(shown.flatten(), image.flatten(), dim=0)
    assert abs(float(cosine)) > 0.999
    assert float(shown.flatten()[shown.flatten().abs().argmax()]) > 0  # the sign is fixed


def test_a_gain_of_zero_is_shown_as_such(digits) -> None:
    torch.manual_seed(0)
    model = build_model("cnn-2", digits.input_shape, digits.classes)
    with torch.no_grad():
        model[7].bias.fill_(-100.0)  # dead: nothing in front has feedback
    (found,) = pictures(
        model, digits, [0], value="low_rank", step=0.1, triplets=3, vectors=1, seed=0
    )
    assert all(layer["values"] == [0.0] * 3 for layer in found["layers"])


def test_training_is_repeatable_and_leaves_no_hooks(digits) -> None:
    state = torch.get_rng_state()
    models = [
        trained(digits, "cnn-2", "ddpnopt", 0.1, {}, epochs=1, batch=256, seed=1)[0]
        for _ in range(2)
    ]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in models[0].modules())


def test_samples_come_one_from_each_class(digits) -> None:
    chosen = first_of_classes(digits, 4)
    assert digits.y_test[chosen].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "values, share, number",
    [([2.0, 1.0], 0.8, 2), ([3.0, 1.0], 0.9, 1), ([0.0, 0.0], math.nan, 0)],
)
def test_energy(values, share, number) -> None:
    found = policies.energy(values)
    assert found == pytest.approx((share, number), nan_ok=True)


def test_figure_is_made_once_and_missing_data_are_named(tmp_path, monkeypatch) -> None:
    first = policies.fig5(request(tmp_path))
    rows = first.rows
    assert list(rows["dataset"]) == ["digits"] * 6 + ["mnist"]  # two samples, three convolutions
    assert rows["published"].isna().all()
    assert math.isnan(rows["measured"].iloc[-1]) and "--data" in rows["verdict"].iloc[-1]
    assert any("Missing: mnist" in note for note in first.notes)
    assert "64 training samples: test accuracy" in first.settings

    monkeypatch.setattr(policies, "trained", lambda *a, **k: pytest.fail("trained again"))
    again = policies.fig5(request(tmp_path, run=False))
    assert list(again.rows["measured"][:-1]) == list(rows["measured"][:-1])
    files = write(again, tmp_path / "out")
    assert [f.name for f in files] == ["fig5.csv", "fig5.md", "fig5.png"]


def test_wrong_folder_and_empty_store_leave_visible_gaps(tmp_path) -> None:
    found = policies.fig7(request(tmp_path, run=False))
    assert found.rows["verdict"].iloc[0] == "Not measured yet." and found.summary.startswith("0 of")
    assert len(write(found, tmp_path / "out")) == 3
    only = SETTINGS.replace('dataset = "digits"', 'dataset = "fashion-mnist"')
    found = policies.fig7(request(tmp_path, only, data=tmp_path))
    assert str(tmp_path) in found.rows["verdict"].iloc[0]


def test_quick_is_smaller_and_says_so(tmp_path) -> None:
    found = policies.fig5(request(tmp_path, quick=True))
    assert len(found.rows) == 3 + 1 and "40 training samples" in found.settings
    assert QUICK in markdown(found)


def test_settings() -> None:
    for name in ("fig5", "fig7"):
        assert load(Policies, name).problem[0].dataset == "digits"
    with pytest.raises(
        SettingsError, match="line 6: step = -1.0: allowed is a number, more than 0"
    ):
        parse(Policies, SETTINGS.replace("step = 0.1", "step = -1.0"), "my.toml")
    with pytest.raises(SettingsError, match="unknown key 'epoch'"):
        parse(Policies, SETTINGS.replace("epochs = 1\nbatch", "epoch = 1\nbatch", 1), "my.toml")
