# SPDX-License-Identifier: MIT
"""Value functions agree with each other where the theory says so: properties over shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import Identity, RMSprop
from ddpnopt.value import Dense, GaussNewton, LowRank, Moreau
from oracles.common import (
    assert_same,
    chains,
    cross_entropy,
    dense_chain,
    input_for,
    rank_one,
    squared,
    steps,
)
from oracles.flat import Chain

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

quick = settings(max_examples=25, deadline=None, derandomize=True)
Example = tuple[Chain, Tensor, int]


@st.composite
def quadratic_options(draw: st.DrawFn) -> dict[str, object]:
    return {
        "backup": draw(st.sampled_from(["proximal", "closed_loop", "riccati"])),
        "own_layer": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, 0.1, 1.0])),
        "statistics": draw(st.sampled_from(["value", "plain"])),
    }


@st.composite
def optimizers(draw: st.DrawFn) -> dict[str, object]:
    if draw(st.booleans()):
        inner: dict[str, object] = {"curvature": Identity(), "lr": 0.2}
    else:
        inner = {"curvature": RMSprop(alpha=0.9, eps=1e-2), "lr": 0.02}
    inner["momentum"] = draw(st.sampled_from([0.0, 0.5]))
    inner["weight_decay"] = draw(st.sampled_from([0.0, 0.01]))
    return inner


def run(example: Example, value: object, loss: object, count: int = 2, **options: object) -> Chain:
    chain, x, _ = example
    model = copy.deepcopy(chain)
    steps(model, x, loss, count, value=value, gram="exact", **options)  # type: ignore[arg-type]
    return model


@quick
@given(chains(), quadratic_options(), optimizers())
def test_low_rank_is_dense(
    example: Example, value: dict[str, object], inner: dict[str, object]
) -> None:
    _, loss, _ = cross_entropy(example[1], example[2])
    options = {"terminal": "cross_entropy", **inner}
    low_rank = run(example, LowRank(**value), loss, **options)
    dense = run(example, Dense(**value), loss, **options)
    assert_same(low_rank, dense, 1e-10)


@quick
@given(chains(), quadratic_options(), optimizers())
def test_gauss_newton_is_both_for_rank_one(
    example: Example, value: dict[str, object], inner: dict[str, object]
) -> None:
    factor, loss, _ = rank_one(example[1], example[2])
    options = {"terminal": factor, **inner}
    models = [run(example, f(**value), loss, **options) for f in (GaussNewton, LowRank, Dense)]
    assert_same(models[0], models[1], 1e-10)
    assert_same(models[0], models[2], 1e-10)


@quick
@given(chains(), optimizers(), st.booleans())
def test_quadratic_moreau_is_proximal_gauss_newton(
    example: Example, inner: dict[str, object], named: bool
) -> None:
    _, loss, _ = squared(example[1], example[2])

    def factor(z: Tensor) -> Tensor:
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        return (2 / z.numel()) ** 0.5 * eye.expand(len(z), -1, -1)

    options = {"terminal": "mse" if named else factor, **inner}
    moreau = Moreau(line="quadratic", coupling=False, strength=1.0)
    newton = GaussNewton(own_layer=True, statistics="plain")
    assert_same(run(example, moreau, loss, **options), run(example, newton, loss, **options), 1e-10)


def test_quadratic_line_is_what_mse_gets_anyway() -> None:
    chain = dense_chain([3, 4, 2])
    example = (chain, input_for(chain, 4), 2)
    _, loss, _ = squared(example[1], 2)
    options = {"terminal": "mse", "lr": 0.3}
    assert_same(
        run(example, Moreau(line="auto"), loss, **options),
        run(example, Moreau(line="quadratic"), loss, **options),
    )


@quick
@given(chains())
def test_one_layer_of_quadratic_line_matters_for_cross_entropy(example: Example) -> None:
    """The logistic and the quadratic line differ where the step is large (no vacuous equality)."""
    _, loss, _ = cross_entropy(example[1], example[2])
    options = {"terminal": "cross_entropy", "lr": 2.0}
    auto = run(example, Moreau(), loss, count=1, **options)
    quadratic = run(example, Moreau(line="quadratic"), loss, count=1, **options)
    pairs = zip(auto.parameters(), quadratic.parameters(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-6


@pytest.mark.parametrize("coupling", [False, True])
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.parametrize("own_layer", [False, True])
def test_open_loop_is_closed_loop_on_one_layer(
    coupling: bool, curvature: str, own_layer: bool
) -> None:
    chain = dense_chain([4, 3])
    x = input_for(chain, 5)
    _, loss, _ = cross_entropy(x, 3)
    models = []
    for feedback in (True, "open_loop"):
        model = copy.deepcopy(chain)
        steps(
            model,
            x,
            loss,
            3,
            lr=0.5 if curvature == "identity" else 0.05,
            curvature=curvature,
            value=Moreau(coupling=coupling, own_layer=own_layer),
            terminal="cross_entropy",
            feedback=feedback,
        )
        models.append(model)
    assert_same(models[0], models[1], 1e-12)
    plain = copy.deepcopy(chain)
    steps(plain, x, loss, 3, lr=0.5, curvature=curvature, feedback=False)
    if own_layer and curvature == "identity":
        difference = (plain.layers[0].weight - models[0].layers[0].weight).abs().max()
        assert float(difference) > 1e-3


def test_many_classes_rank() -> None:
    """The bounded factor tends to the exact one; C - 1 columns are exact."""
    classes = 12
    widths, batch = [5, 6, classes], 8
    y = torch.arange(batch) % classes
    x = input_for(dense_chain(widths), batch)

    def weights(rank: int | None, value: object = None) -> Tensor:
        model = dense_chain(widths)
        opt = DDPNOpt(model, lr=1.5, value=value or LowRank(rank=rank))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    exact = weights(None)
    torch.testing.assert_close(weights(None, "dense"), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights(classes - 1), exact, rtol=1e-10, atol=1e-10)
    errors = [float((weights(rank) - exact).norm()) for rank in (1, 3, 5, 8, 10)]
    assert errors[0] > 0
    assert errors[-1] < 0.5 * errors[0]
    assert all(b <= 1.25 * a for a, b in zip(errors, errors[1:], strict=False)), errors
