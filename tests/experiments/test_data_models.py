# SPDX-License-Identifier: MIT
"""Data, networks and the registry of optimizers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ddpnopt.curvature import CURVATURES
from ddpnopt.experiments.data import canonical, describe, load
from ddpnopt.experiments.models import build_model
from ddpnopt.experiments.optimizers import OPTIMIZERS, build_optimizer, label_of
from ddpnopt.experiments.scaling import SCALES


@pytest.mark.parametrize(
    ("name", "features", "classes", "total"), [("digits", 64, 10, 1797), ("wine", 13, 3, 178)]
)
def test_split_is_stratified_and_standardised_by_the_training_part(
    name: str, features: int, classes: int, total: int
) -> None:
    data = load(name, seed=3)
    assert data.input_shape == (features,) and data.classes == classes
    assert len(data.y_train) + len(data.y_test) == total
    share_train = torch.bincount(data.y_train, minlength=classes) / len(data.y_train)
    share_test = torch.bincount(data.y_test, minlength=classes) / len(data.y_test)
    assert torch.allclose(share_train, share_test, atol=0.03)
    assert data.x_train.mean(0).abs().max() < 1e-5
    std = data.x_train.std(0, correction=0)
    # Features that are constant over the training part stay constant.
    assert bool(((std - 1).abs() < 1e-4).logical_or(std == 0).all())
    # The test part is scaled with the training part's numbers, not with its own.
    assert data.x_test.mean(0).abs().max() > 1e-3


def test_one_seed_one_split() -> None:
    first, again, other = load("wine", seed=1), load("wine", seed=1), load("wine", seed=2)
    assert torch.equal(first.x_train, again.x_train) and torch.equal(first.y_test, again.y_test)
    assert not torch.equal(first.y_train, other.y_train)


def test_spellings_and_origin() -> None:
    assert canonical("CIFAR10") == canonical("cifar_10") == canonical("cifar-10") == "cifar-10"
    assert canonical("Fashion MNIST") == canonical("FashionMNIST") == "fashion-mnist"
    assert load("Wine").name == "wine" and load("wine").label == "WINE, scikit-learn"
    assert describe("digits").origin == "scikit-learn"
    assert len(load("digits", test_samples=11).y_test) == 11


@pytest.mark.parametrize("scale", list(SCALES))
def test_bytes_are_scaled_as_numbers_are(scale: str) -> None:
    generator = np.random.default_rng(0)
    # More rows and columns than a block has; one column is constant.
    pixels = generator.integers(3, 250, (5000, 300), dtype=np.uint8)
    pixels[:, 7] = 9
    numbers = pixels.astype(np.float64)
    std = np.where(np.arange(300) == 7, 1, numbers.std(0))
    expected = {
        "standard": (numbers - numbers.mean(0)) / std,
        "pooled": (numbers - numbers.mean()) / numbers.std(),
        "unit": (numbers - 3) / 246,
        "none": numbers,
    }[scale]
    scaled = SCALES[scale](pixels)(pixels)
    assert scaled.dtype == torch.float32
    assert torch.equal(scaled, SCALES[scale](numbers)(numbers))
    assert torch.allclose(scaled, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


def test_scales() -> None:
    pooled = load("digits", scale="pooled")
    assert abs(float(pooled.x_train.mean())) < 1e-5
    unit = load("digits", scale="unit")
    assert float(unit.x_train.min()) == 0.0 and float(unit.x_train.max()) == 1.0
    assert float(load("digits", scale="none").x_train.max()) == 16.0


def test_images_keep_the_pixels() -> None:
    flat, images = load("digits", seed=0), load("digits", seed=0, images=True)
    assert images.input_shape == (1, 8, 8)
    assert torch.equal(images.x_test.flatten(1), flat.x_test)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("digit"), r"unknown data set 'digit'; known: .*digits, .*wine.*Did you mean"),
        (lambda: load("wine", scale="x"), "known: none, pooled, standard, unit"),
        (lambda: load("wine", images=True), "with images: digits, mnist"),
        (lambda: build_model("vgg", (64,), 10), "unknown architecture 'vgg'; known: mlp-"),
        (lambda: build_model("mlp-8x2-relu-gn", (64,), 10), "unknown architecture"),
        (lambda: build_model("resnet", (64,), 10), "resnet needs images"),
        (lambda: load("wine", train_samples=500), "142 training samples, 500 asked for"),
        (lambda: build_model("mlp-0x2-tanh", (64,), 10), "unknown architecture"),
        (lambda: build_model("mlp-8x2-softsign", (64,), 10), "known: gelu, relu, sigmoid, tanh"),
        (lambda: build_model("cnn", (64,), 10), "cnn needs images"),
    ],
)
def test_bad_names_are_answered_with_the_known_ones(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "shape", "layers"),
    [("mlp-20x4-tanh", (64,), 5), ("mlp-7x0-relu", (13,), 1), ("linear", (13,), 1)],
)
def test_dense_networks(name: str, shape: tuple[int, ...], layers: int) -> None:
    model = build_model(name, shape, 10)
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == layers
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


def test_small_cnn() -> None:
    model = build_model("cnn", (1, 8, 8), 10)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16] * 4
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 2
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "shape", "norm", "count"),
    [
        ("mlp-8x3-relu-bn", (5,), torch.nn.BatchNorm1d, 3),
        ("mlp-8x3-tanh-ln", (5,), torch.nn.LayerNorm, 3),
        ("cnn-4-bn", (1, 8, 8), torch.nn.BatchNorm2d, 4),
        ("cnn-4-gn", (1, 8, 8), torch.nn.GroupNorm, 4),
        ("resnet-4x2", (1, 7, 5), torch.nn.BatchNorm2d, 0),
        ("resnet-4x2-bn", (1, 7, 5), torch.nn.BatchNorm2d, 5),
        ("resnet-4x1-gn", (1, 8, 8), torch.nn.GroupNorm, 3),
    ],
)
def test_norms(name: str, shape: tuple[int, ...], norm: type, count: int) -> None:
    model = build_model(name, shape, 10)
    assert sum(isinstance(m, norm) for m in model.modules()) == count
    assert model(torch.randn(3, *shape)).shape == (3, 10)


TORCH_NAMES = ["sgd", "sgd-clip", "momentum", "rmsprop", "adam", "adamw"]
#: Those that find their own rate, and the optional packages that they are of.
SELF_TUNED = {
    "prodigy": "prodigyopt",
    "dadapt-sgd": "dadaptation",
    "dadapt-adam": "dadaptation",
}


def test_every_curvature_has_a_twin_closed_and_open() -> None:
    for name in set(CURVATURES) - {"identity"}:
        assert {f"ddpnopt-{name}", f"ddpnopt-{name}-open-loop"} <= set(OPTIMIZERS)


def test_both_sides_of_a_comparison_decay_alike() -> None:
    model = torch.nn.Linear(3, 2)
    for name in ("adamw", "ddpnopt-adamw"):
        assert build_optimizer(name, model, 0.1).optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_optimizers_are_built_with_their_defaults(name: str) -> None:
    built = build_optimizer(name, torch.nn.Linear(3, 2), 0.25)
    assert built.optimizer.param_groups[0]["lr"] == 0.25
    assert built.grad_clip == (1.0 if name == "sgd-clip" else None)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(TORCH_NAMES)))
def test_own_optimizers_take_a_step(name: str) -> None:
    if name in SELF_TUNED:
        pytest.importorskip(SELF_TUNED[name])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    before = [p.detach().clone() for p in model.parameters()]
    built = build_optimizer(name, model, 1.0 if name in SELF_TUNED else 0.1)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(5, 3)), torch.arange(5) % 3)
    loss.backward()
    built.optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("name", "package"), SELF_TUNED.items())
def test_a_missing_package_is_named_with_the_way_out(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"needs `pip install {package}`"):
        build_optimizer(name, torch.nn.Linear(3, 2), 1.0)


def test_options_reach_the_optimizer() -> None:
    model = torch.nn.Linear(3, 2)
    built = build_optimizer("sgd-clip", model, 0.1, {"grad_clip": 0.5, "momentum": 0.3})
    assert built.grad_clip == 0.5 and built.optimizer.param_groups[0]["momentum"] == 0.3
    assert label_of("sgd-clip", {"grad_clip": 0.5}) == "SGD + clip (grad_clip=0.5)"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgdd", {}, "unknown optimizer 'sgdd'; known: adam, .*Did you mean 'sgd'"),
        ("sgd", {"beta": 1}, "SGD has no option beta; known: momentum"),
        ("sgd", {"grad_clip": -1}, "grad_clip must be a positive number"),
        ("sgd", {"grad_clip": "big"}, "grad_clip must be a positive number"),
        (
            "ddpnopt",
            {"value": "riccati"},
            "known: augmented, dense, gauss_newton, low_rank, moreau",
        ),
        ("ddpnopt", {"curvature": "kfac2"}, "known: .*identity.*rmsprop"),
        ("ddpnopt", {"value.rank": 2}, "Moreau has no option rank; known: own_layer"),
        ("ddpnopt-paper", {"value.clip": 2}, "value=paper has fixed options"),
    ],
)
def test_bad_options(name: str, options: dict[str, str | float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(name, torch.nn.Linear(3, 2), 0.1, dict(options))
