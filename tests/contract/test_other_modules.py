# SPDX-License-Identifier: MIT
"""Sample mixing and parametrised modules without a rule: plain steps, said once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.layers import RULES, LayerRule
from ddpnopt.value import Dense, LowRank
from oracles.common import (
    assert_params,
    assert_same,
    cross_entropy,
    distance,
    identity,
    input_for,
    iterate,
    mlp,
    steps,
)
from oracles.dense_ddp import DenseDDP
from oracles.flat import Chain, Inner
from oracles.moreau_scalar import softmax_line
from oracles.moreau_step import MoreauStep

LR = 0.7
quiet = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
FEEDBACKS = [True, "open_loop"]


def softmax_lines(y: Tensor) -> object:
    target = F.one_hot(y, 3).numpy()
    return lambda z: [softmax_line(a, b) for a, b in zip(z.numpy(), target, strict=True)]


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, DDPNOptWarning)]


class Refusing(LayerRule):
    """Leaves a type of modules without a rule."""

    parameters = ("weight", "bias", "factor", "matrix")

    def refusal(self, module: nn.Module) -> str:
        return "it is left out"


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, embeddings and this file's own modules take the plain step."""
    for kind in (nn.LayerNorm, nn.Embedding, Scale, Affine):
        monkeypatch.setitem(RULES, kind, Refusing())


class Centre(nn.Module):
    """Mixes samples without any parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if self.training else x


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("value", ["moreau", "low_rank"])
@pytest.mark.parametrize("kind", ["batch_norm", "centre"])
def test_samples_are_weighted_in_front_of_a_mixing_layer(
    feedback: object, value: str, kind: str
) -> None:
    base = mlp()
    mix = nn.BatchNorm1d(5).double() if kind == "batch_norm" else Centre()
    model = nn.Sequential(*base[:3], mix, *base[3:])
    twin, after = copy.deepcopy(model), copy.deepcopy(model)
    if feedback == "open_loop":
        value = "moreau"
    opt = DDPNOpt(model, lr=LR, value=value, feedback=feedback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iterate(model, opt, [0])
        once = model.state_dict()
        once = {k: v.clone() for k, v in once.items()}
        iterate(model, opt, [1, 2])
    messages = said(caught)
    assert messages and len(messages) == len(set(messages))  # each said once, not every step
    assert "'0'" in " ".join(messages) and "'2'" in " ".join(messages)
    assert opt.last_step is not None and opt.last_step.front is not None
    assert opt.last_step.front.name == "the input of '5'"
    assert [layer.name for layer in opt.last_step.layers] == ["5"]
    iterate(twin, torch.optim.SGD(twin.parameters(), LR), [0])
    for name, value in twin.named_parameters():
        moved = (once[name] - value.detach()).abs().max()
        if name != "2.bias":  # a bias in front of the norm does nothing
            assert float(moved) > 1e-7, name
    assert distance(model, after) > 0


@quiet
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_batch_norm_in_evaluation_mode_mixes_nothing(feedback: object) -> None:
    """Frozen statistics: feedback for every layer, as without the norm."""
    base, twin = mlp(), mlp()
    norm = nn.BatchNorm1d(5, affine=False, eps=0.0).double()
    model = nn.Sequential(*base[:3], norm, *base[3:])
    norm.eval()
    iterate(model, DDPNOpt(model, lr=LR, feedback=feedback), range(2))
    iterate(twin, DDPNOpt(twin, lr=LR, feedback=feedback), range(2))
    assert_same(base, twin, 1e-13)


class Scale(nn.Module):
    """A parametrised module without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((6,), 1.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.usefixtures("left_out")
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.parametrize("kind", ["layer_norm", "scale"])
def test_other_modules_take_the_plain_step(feedback: object, curvature: str, kind: str) -> None:
    base = mlp()
    other = nn.LayerNorm(6).double() if kind == "layer_norm" else Scale()
    model = nn.Sequential(base[0], other, *base[1:])
    twin = copy.deepcopy(model)
    lr = LR if curvature == "identity" else 0.02
    opt = DDPNOpt(model, lr=lr, curvature=curvature, momentum=0.5, feedback=feedback)
    inner = (
        torch.optim.SGD(twin.parameters(), lr, 0.5)
        if curvature == "identity"
        else torch.optim.RMSprop(twin.parameters(), lr, momentum=0.5)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iterate(model, opt, [0])
        once = copy.deepcopy(model)
        iterate(model, opt, [1])
    messages = said(caught)
    assert len(messages) == 1 and "1" in messages[0]
    iterate(twin, inner, [0])
    for a, b in zip(once[1].parameters(), twin[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    for k in (0, 3, 5):
        moved = (once[k].weight - twin[k].weight).detach().abs().max()
        assert float(moved) > 1e-7, k


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_frozen_other_module_is_transparent(feedback: object) -> None:
    """A norm with frozen parameters: the layers around it equal the oracle's with it between."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(4).double().requires_grad_(False)
    layers = [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)]
    twin = Chain(layers, [lambda h: torch.tanh(norm(h)), torch.tanh, identity]).double()
    model = nn.Sequential(layers[0], norm, nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    x = input_for(twin, 4)
    y, loss, _ = cross_entropy(x, 3)
    reference = MoreauStep(copy.deepcopy(twin), Inner(LR), feedback=feedback is True)
    for _ in range(2):
        reference.step(x, loss, torch.full((4,), 0.25).double(), softmax_lines(y))
    steps(model, x, loss, 2, lr=LR, feedback=feedback)  # type: ignore[arg-type]
    assert_params(twin, reference.params, 1e-9)


@pytest.mark.usefixtures("left_out")
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_embedding(feedback: object) -> None:
    """Integer inputs; the embedding itself takes the plain step."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double()

    model, twin, fixed = build(), build(), build()
    words = torch.randint(0, 7, (6, 3), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    fixed[0].requires_grad_(False)
    for m, o in (
        (model, DDPNOpt(model, lr=LR, feedback=feedback)),
        (twin, torch.optim.SGD(twin.parameters(), LR)),
        (fixed, DDPNOpt(fixed, lr=LR, feedback=feedback)),
    ):
        F.cross_entropy(m(words), y).backward()
        o.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-14, atol=1e-14)
    assert distance(model[2:], twin[2:]) > 1e-4
    if feedback == "open_loop":  # no rollout: the embedding's step is not seen by the others
        assert_same(model[2:], fixed[2:], 1e-13)


def normed() -> Chain:
    """Linear, LayerNorm with parameters, Linear, Linear."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)]
    return Chain(layers, [identity, torch.tanh, torch.tanh, identity]).double()


@pytest.mark.usefixtures("left_out")
@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("curvature", ["identity", "rmsprop"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_layers_around_a_plain_one_moreau(feedback: object, curvature: str) -> None:
    """The norm's own step moves the states behind it; S and rho leave it out."""
    model, lr = normed(), LR if curvature == "identity" else 0.05
    x = input_for(model, 4)
    y, loss, _ = cross_entropy(x, 3)
    reference = MoreauStep(
        copy.deepcopy(model),
        Inner(lr, curvature=curvature),
        feedback=feedback is True,
        plain=(1,),
    )
    for _ in range(2):
        reference.step(x, loss, torch.full((4,), 0.25).double(), softmax_lines(y))
    options = {"lr": lr, "curvature": curvature, "terminal": "cross_entropy"}
    steps(model, x, loss, 2, feedback=feedback, **options)
    assert_params(model, reference.params, 1e-9)


@pytest.mark.usefixtures("left_out")
@pytest.mark.parametrize("value", [LowRank(), Dense()])
@pytest.mark.parametrize("plain", [(1,), (0, 1), (0, 1, 2)])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_layers_around_a_plain_one_quadratic(value: object, plain: tuple[int, ...]) -> None:
    """Modules without a rule step plainly; feedback sees what their steps do to the states."""
    model = normed()
    x = input_for(model, 4)
    _, loss, hessian = cross_entropy(x, 3)
    for t in (k for k in plain if k != 1):
        model.layers[t] = Affine(model.layers[t])
    reference = DenseDDP(copy.deepcopy(model), Inner(LR), plain=plain)
    for _ in range(2):
        reference.step(x, loss, hessian)
    steps(model, x, loss, 2, lr=LR, value=value, terminal="cross_entropy")
    assert_params(model, reference.params)


class Affine(nn.Module):
    """A linear map that the library has no rule for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = nn.Parameter(linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T
