# SPDX-License-Identifier: MIT
"""Heads written as functions of another layer's weight: as a tied nn.Linear, step by step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, explain
from ddpnopt.curvature import RMSprop
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.common import assert_same
from oracles.graph_cases import compare_low_rank, compare_moreau
from oracles.graph_nets import Case, net
from oracles.graph_parts import linear

pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

VOCABULARY = 5


class Model(nn.Module):
    """A small language model; a subclass writes its head."""

    bias = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(VOCABULARY, 4, dtype=torch.float64)
        self.a, self.b = linear(4, 4), linear(4, 4)
        self.offset = nn.Parameter(0.1 * torch.randn(VOCABULARY, dtype=torch.float64))
        self.offset.requires_grad_(self.bias)

    def body(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) to features (B, T, 4), each position seeing those before it."""
        h = self.embed(tokens).cumsum(1)
        h = h + self.b(torch.tanh(self.a(h)))
        return torch.tanh(h)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, V)."""
        raise NotImplementedError


class Module(Model):
    """The usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.head = linear(4, VOCABULARY, bias=self.bias)
        self.head.weight = self.embed.weight
        if self.bias:
            self.head.bias = self.offset

    def forward(self, tokens: Tensor) -> Tensor:
        """By a module."""
        made: Tensor = self.head(self.body(tokens))
        return made


class ModuleWithBias(Module):
    """With a bias."""

    bias = True


class Function(Model):
    """F.linear."""

    def forward(self, tokens: Tensor) -> Tensor:
        """By the weight."""
        return F.linear(self.body(tokens), self.embed.weight)


class FunctionWithBias(Model):
    """With a bias of the model itself."""

    bias = True

    def forward(self, tokens: Tensor) -> Tensor:
        """By keywords."""
        return F.linear(self.body(tokens), bias=self.offset, weight=self.embed.weight)


class Product(Model):
    """The transpose."""

    def forward(self, tokens: Tensor) -> Tensor:
        """By an operator."""
        return self.body(tokens) @ self.embed.weight.T


class Transposed(Model):
    """Another way to write it."""

    def forward(self, tokens: Tensor) -> Tensor:
        """By a function."""
        return torch.matmul(self.body(tokens), self.embed.weight.transpose(0, 1))


FORMS = [(Function, Module), (FunctionWithBias, ModuleWithBias), (Product, Module)]
FORMS += [(Transposed, Module)]
#: Weight, and a rate at which the step is neither tiny nor wild.
CURVATURES: dict[str, tuple[object, float]] = {
    "identity": ("identity", 0.5),
    "rmsprop": (RMSprop(eps=1e-3), 0.02),
    "kfac": ("kfac", 0.1),
}


def iterate(model: nn.Module, passes: int = 1, steps: int = 3, **options: object) -> DDPNOpt:
    """The plain loop."""
    opt = DDPNOpt(model, gram="exact", **{"lr": 0.5, **options})  # type: ignore[arg-type]
    for seed in range(steps):
        opt.zero_grad()
        for part in range(passes):
            generator = torch.Generator().manual_seed(10 * seed + part)
            tokens = torch.randint(VOCABULARY, (4, 7), generator=generator)
            z = model(tokens[:, :-1])
            (F.cross_entropy(z.flatten(0, 1), tokens[:, 1:].flatten()) / passes).backward()
        opt.step()
    return opt


def compare(mine: Model, theirs: Model, **options: object) -> DDPNOpt:
    """Both train alike."""
    opt = iterate(mine, **options)  # type: ignore[arg-type]
    iterate(theirs, **options)  # type: ignore[arg-type]
    others = dict(theirs.named_parameters())
    for name, p in mine.named_parameters():
        torch.testing.assert_close(p, others[name], rtol=1e-11, atol=1e-12)
    return opt


@pytest.mark.parametrize(("form", "module"), FORMS)
@pytest.mark.parametrize("value", [Moreau(), LowRank(), GaussNewton()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_equals_a_tied_module(
    form: type[Model], module: type[Model], value: object, feedback: object
) -> None:
    opt = compare(form(), module(), value=value, feedback=feedback)
    assert opt.last_step is not None and len(opt.last_step.layers) == 3


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("passes", [1, 2])
def test_curvatures_and_accumulation(curvature: str, passes: int) -> None:
    choice, lr = CURVATURES[curvature]
    compare(FunctionWithBias(), ModuleWithBias(), curvature=choice, lr=lr, passes=passes)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_without_weight_gradients(feedback: object) -> None:
    value = Moreau(coupling=False)
    mine, theirs = Function(), Function()
    iterate(mine, value=value, feedback=feedback, weight_gradients=False)
    iterate(theirs, value=value, feedback=feedback)
    assert_same(mine, theirs, 1e-10)


@pytest.mark.parametrize("name", ["low_rank", "moreau"])
def test_the_dense_recursion(name: str) -> None:
    """On the explicit state, in which the moved weight is a part until the head has run."""
    compare_tied = {"low_rank": compare_low_rank, "moreau": compare_moreau}[name]
    case: Case = net("tied")
    written = copy.deepcopy(case[0])
    body, embed = written.layers, written.layers["embed"]

    class ByHand(nn.Module):
        """The net `tied`, its head a function."""

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.bare = nn.ModuleDict({"embed": embed, "a": body["a"]}), {}

        def forward(self, tokens: Tensor) -> Tensor:
            """As the list says."""
            h = self.layers["embed"](tokens).mean(1)
            return F.linear(h + torch.tanh(self.layers["a"](h)), self.layers["embed"].weight)

    compare_tied(case, written=ByHand())  # type: ignore[arg-type]


def test_explain_names_it() -> None:
    rows = {
        r.name: r for r in explain(FunctionWithBias(), torch.tensor([[0, 1, 2], [3, 4, 0]])).rows
    }
    head = rows["F.linear(embed.weight)"]
    assert head.treatment == "feedback" and head.type == "Linear"
    assert rows["embed"].treatment == "feedback" and "offset" not in rows


class Elsewhere(Model):
    """What is no head: the weight in another function."""

    def forward(self, tokens: Tensor) -> Tensor:
        """By an einsum."""
        return torch.einsum("btd,vd->btv", self.body(tokens), self.embed.weight)


class Computed(Model):
    """The bias is no parameter."""

    def forward(self, tokens: Tensor) -> Tensor:
        """A constant one."""
        return F.linear(self.body(tokens), self.embed.weight, torch.ones(VOCABULARY).double())


class Decoder(nn.Module):
    """A layer of its own kind, with a bias, that is given a weight or has it without saying so."""

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(VOCABULARY, dtype=torch.float64))
        self.known = [weight]

    def forward(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        """A dense layer."""
        return F.linear(h, weight if self.known[0] is None else self.known[0], self.bias)


class Given(Model):
    """The weight is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(None)

    def forward(self, tokens: Tensor) -> Tensor:
        """Of another module."""
        made: Tensor = self.decoder(self.body(tokens), self.embed.weight)
        return made


class Hidden(Model):
    """The weight is in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(self.embed.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Nobody sees it."""
        made: Tensor = self.decoder(self.body(tokens))
        return made


@pytest.mark.parametrize("form", [Elsewhere, Computed, Given, Hidden])
def test_what_is_not_followed_is_said(form: type[Model]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iterate(form(), steps=1)
    assert any("'embed'" in str(one.message) and "plain step" in str(one.message) for one in caught)


class OnlyFunctions(nn.Module):
    """Layers whose modules are never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c = linear(4, 5), linear(5, 4), linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Dense layers by their function."""
        h = torch.tanh(F.linear(x, self.a.weight, self.a.bias))
        h = torch.tanh(F.linear(h, self.b.weight, self.b.bias)) + x
        return F.linear(h, self.c.weight, self.c.bias)


class Called(OnlyFunctions):
    """The same by the modules."""

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        h = torch.tanh(self.a(x))
        made: Tensor = self.c(torch.tanh(self.b(h)) + x)
        return made


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_layers_that_never_run_as_modules(value: object, feedback: object) -> None:
    mine, theirs = OnlyFunctions(), Called()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    for model in (mine, theirs):
        opt = DDPNOpt(model, lr=0.5, value=value, feedback=feedback)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert_same(mine, theirs, 1e-12)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_a_head_that_comes_late(feedback: object) -> None:
    """Plain chains are watched no more after some passes; a head after that is said or followed."""

    class Late(Model):
        head = False

        def forward(self, tokens: Tensor) -> Tensor:
            """Once with, before that without."""
            h = self.body(tokens)
            return F.linear(h, self.embed.weight) if self.head else h @ torch.eye(4, 5).double()

    model = Late()
    opt = iterate(model, steps=10, feedback=feedback)
    model.head = True
    tokens = torch.randint(VOCABULARY, (4, 7))
    for _ in range(2):
        opt.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        if feedback is True:
            opt.step()
        else:
            with pytest.warns(DDPNOptWarning, match="'embed' take.* plain step"):
                opt.step()
            break
