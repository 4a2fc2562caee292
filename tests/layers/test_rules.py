# SPDX-License-Identifier: MIT
"""Every layer rule against autograd, and through the optimizer against the general rule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.layers import FALLBACK, RULES, LayerRule, register, registered
from ddpnopt.testing import check_layer
from oracles.common import assert_same

R = torch.randn


def indices(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


CASES: dict[str, tuple[nn.Module, Tensor | Sequence[Tensor]]] = {
    "dense": (nn.Linear(4, 3), R(6, 4)),
    "dense, positions": (nn.Linear(4, 3, bias=False), R(6, 2, 5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), R(4, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="circular"), R(4, 4, 5, 6)),
    "conv2d, no bias": (
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False, padding=1, padding_mode="reflect"),
        R(4, 4, 7, 6),
    ),
    "conv3d": (
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
        R(2, 2, 3, 4, 5),
    ),
    "transposed 1d": (
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        R(4, 4, 5),
    ),
    "transposed 2d": (
        nn.ConvTranspose2d(
            4, 2, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1)
        ),
        R(4, 4, 3, 4),
    ),
    "transposed 2d, output padding of the dilation": (
        nn.ConvTranspose2d(4, 2, 3, dilation=2, output_padding=1, padding=1, bias=False),
        R(4, 4, 3, 4),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), R(2, 2, 2, 3, 2)),
    "layer norm": (nn.LayerNorm((3, 6)), R(4, 2, 3, 6)),
    "layer norm, no bias": (nn.LayerNorm(6, bias=False), R(4, 3, 6)),
    "rms norm": (nn.RMSNorm(6), R(4, 3, 6)),
    "group norm": (nn.GroupNorm(3, 6), R(4, 6, 3, 2)),
    "group norm, flat": (nn.GroupNorm(2, 6), R(4, 6)),
    "instance norm 1d": (nn.InstanceNorm1d(6, affine=True), R(4, 6, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(6, affine=True), R(4, 6, 5, 3)),
    "prelu": (nn.PReLU(), R(4, 6, 3)),
    "prelu by channel": (nn.PReLU(6), R(4, 6, 3)),
    "batch norm in eval": (nn.BatchNorm2d(6).eval(), R(4, 6, 3, 3)),
    "embedding": (nn.Embedding(7, 5, padding_idx=2), indices(7, 4, 6)),
    "embedding, one index": (nn.Embedding(7, 5), indices(7, 4)),
    "bag, sum": (nn.EmbeddingBag(7, 5, mode="sum"), indices(7, 4, 6)),
    "bag, mean": (nn.EmbeddingBag(7, 5, mode="mean", padding_idx=1), indices(7, 4, 6)),
    "bag, offsets": (nn.EmbeddingBag(7, 5), (indices(7, 9), torch.tensor([0, 2, 2, 5]))),
    "bag, empty": (nn.EmbeddingBag(7, 5), (indices(7, 0), torch.tensor([0, 0]))),
    "bilinear": (nn.Bilinear(3, 4, 5), (R(6, 3), R(6, 4))),
    "bilinear, positions": (nn.Bilinear(3, 4, 5, bias=False), (R(6, 2, 3), R(6, 2, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_rule_equals_autograd(name: str) -> None:
    check_layer(*CASES[name])


@pytest.mark.parametrize(
    "name", [n for n, (_, x) in CASES.items() if isinstance(x, Tensor) and x.shape[0] % 2 == 0]
)
def test_rows_folded_into_the_batch(name: str) -> None:
    """Two consecutive rows belong to one sample."""
    layer, x = CASES[name]
    assert isinstance(x, Tensor)
    check_layer(layer, x, samples=x.shape[0] // 2)


@settings(deadline=None, max_examples=30)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
    bias=st.booleans(),
)
def test_convolutions_of_all_shapes(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool,
    bias: bool,
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(2, 4, kernel, stride, padding, groups=groups, dilation=dilation, bias=bias)
    check_layer(layer, R(2, 2, 6, 7))


MUTANTS = {
    "function": lambda rule: lambda m, x: 2 * type(rule).function(rule, m, x),
    "push": lambda rule: lambda m, x, dx: 2 * type(rule).push(rule, m, x, dx),
    "pull": lambda rule: lambda m, x, V: 2 * type(rule).pull(rule, m, x, V),
    "gradient": lambda rule: (
        lambda m, x, V: {n: -g for n, g in type(rule).gradient(rule, m, x, V).items()}
    ),
    "squares": lambda rule: (
        lambda m, x, V, n: {k: 2 * g for k, g in type(rule).squares(rule, m, x, V, n).items()}
    ),
    "gram": lambda rule: lambda *a: 2 * type(rule).gram(rule, *a),
    "bias_gradient": lambda rule: lambda m, V: 2 * type(rule).bias_gradient(rule, m, V),
    "sample_gradients": lambda rule: (
        lambda *a: {n: g + 1 for n, g in type(rule).sample_gradients(rule, *a).items()}
    ),
}


@pytest.mark.parametrize("method", MUTANTS)
@pytest.mark.parametrize("name", ["dense", "conv2d", "layer norm"])
def test_check_layer_finds_a_wrong_rule(name: str, method: str) -> None:
    layer, x = CASES[name]
    found = registered(layer)
    assert found is not None
    rule = copy.copy(found)
    setattr(rule, method, MUTANTS[method](rule))
    with pytest.raises(AssertionError, match=rf"\.{method}"):
        check_layer(layer, x, rule=rule)


@pytest.mark.parametrize("method", ["input_products", "output_products", "rotated_squares"])
@pytest.mark.parametrize("name", ["dense", "conv2d"])
def test_check_layer_finds_wrong_statistics(name: str, method: str) -> None:
    layer, x = CASES[name]
    rule = copy.copy(registered(layer))
    right = getattr(rule, method)

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return (2 * found[0], found[1]) if method == "output_products" else 2 * found

    setattr(rule, method, wrong)
    with pytest.raises(AssertionError, match=rf"\.{method}"):
        check_layer(layer, x, rule=rule)


def test_check_layer_needs_a_rule() -> None:
    with pytest.raises(ValueError, match="no rule is registered for Scale"):
        check_layer(Scale(3), R(4, 3))
    with pytest.raises(ValueError, match="max_norm"):
        check_layer(nn.Embedding(3, 2, max_norm=1.0), indices(3, 4))


class Scale(nn.Module):
    """A user's own layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * self.weight + self.shift


class Net(nn.Module):
    """Two inputs where the layer wants them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.inner: nn.Module = {
            "layer norm": lambda: nn.LayerNorm(6),
            "rms norm": lambda: nn.RMSNorm(6),
            "group norm": lambda: nn.GroupNorm(2, 6),
            "prelu": lambda: nn.PReLU(6),
            "bilinear": lambda: nn.Bilinear(6, 6, 6),
            "custom": lambda: Scale(6),
            "embedding": lambda: nn.Embedding(9, 6),
            "bag": lambda: nn.EmbeddingBag(9, 6, mode="mean"),
            "conv1d": lambda: nn.Conv1d(2, 2, 3, padding=1),
            "transposed": lambda: nn.ConvTranspose1d(2, 2, 3, padding=1),
            "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        }[kind]()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bag":
            h = self.first(self.inner(x))
        elif self.kind == "embedding":
            h = self.first(self.inner(x).mean(1))
        else:
            h = torch.tanh(self.first(x))
            if self.kind == "bilinear":
                h = self.inner(h, h.sin())
            elif self.kind in ("conv1d", "transposed"):
                h = self.inner(h.reshape(-1, 2, 3)).flatten(1)
            else:
                h = self.inner(h)
        return self.last(torch.tanh(h))


KINDS = [
    "layer norm", "rms norm", "group norm", "prelu", "bilinear", "custom", "embedding", "bag",
    "conv1d", "transposed", "weight norm",
]  # fmt: skip


def batches(kind: str, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    lookup = kind in ("embedding", "bag")
    return [(indices(9, 8, 4) if lookup else R(8, 6).double(), indices(3, 8)) for _ in range(count)]


def train(model: nn.Module, kind: str, **options: object) -> DDPNOpt:
    opt = DDPNOpt(model, lr=0.3, **options)  # type: ignore[arg-type]
    for x, y in batches(kind):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return opt


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("value", ["moreau", "gauss_newton", "low_rank", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_feedback_through_the_layer(
    kind: str, value: str, feedback: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer takes part, and the general rule by torch.func takes the same steps."""
    model, twin, plain = Net(kind), Net(kind), Net(kind)
    opt = train(model, kind, value=value, feedback=feedback)
    assert opt.last_step is not None and not opt.last_step.plain
    assert {layer.name for layer in opt.last_step.layers} == {"first", "inner", "last"}
    train(plain, kind, feedback=False)
    assert max(float((a - b).abs().max()) for a, b in zip(
        model.inner.parameters(), plain.inner.parameters(), strict=True)) > 1e-5  # fmt: skip
    if kind in ("bilinear", "embedding", "bag", "prelu"):
        # The general rule takes one floating-point input, and torch.func's PReLU, differentiated
        # in a batch, is not autograd's: it is refused. Their own check is above.
        return
    monkeypatch.delitem(RULES, type(twin.inner), raising=False)
    assert registered(twin.inner) is None
    train(twin, kind, value=value, feedback=feedback)
    assert_same(model, twin, 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_without_feedback_it_is_sgd(kind: str) -> None:
    model, twin = Net(kind), Net(kind)
    train(model, kind, feedback=False)
    sgd = torch.optim.SGD(twin.parameters(), 0.3)
    for x, y in batches(kind):
        sgd.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        sgd.step()
    assert_same(model, twin)


class Called(nn.Module):
    """A layer that is called with more than its input, and a head."""

    def __init__(self, inner: nn.Module, width: int, option: str) -> None:
        super().__init__()
        self.inner, self.head, self.option = inner, nn.Linear(width, 3), option
        self.double()

    def forward(self, x: Tensor, given: object) -> Tensor:
        return self.head(torch.tanh(self.inner(x, **{self.option: given})).flatten(1))


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("option", ["per_sample_weights", "output_size"])
def test_calls_without_a_rule_take_the_plain_step(option: str, weight_gradients: bool) -> None:
    torch.manual_seed(0)
    if option == "output_size":
        model = Called(nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), 18, option)
        x, given = R(8, 2, 3).double(), [6]
    else:
        model = Called(nn.EmbeddingBag(9, 6, mode="sum"), 6, option)
        x, given = indices(9, 8, 4), torch.rand(8, 4).double()  # type: ignore[assignment]
    twin, y = copy.deepcopy(model), indices(3, 8)
    opt = DDPNOpt(model, lr=0.3, weight_gradients=weight_gradients)
    sgd = torch.optim.SGD(twin.parameters(), 0.3)
    for net, each in ((model, opt), (twin, sgd)):
        F.cross_entropy(net(x, given), y).backward()
        each.step()
    assert opt.last_step is not None
    ((name, reason),) = opt.last_step.plain
    assert name == "inner" and option in reason
    assert_same(model.inner, twin.inner, 1e-12)


@pytest.mark.parametrize("kind", ["layer norm", "embedding", "conv1d", "transposed", "bilinear"])
def test_without_weight_gradients(kind: str) -> None:
    model, twin = Net(kind), Net(kind)
    from ddpnopt.value import Moreau

    train(model, kind, value=Moreau(coupling=False))
    train(twin, kind, value=Moreau(coupling=False), weight_gradients=False)
    assert_same(model, twin, 1e-12)


def test_own_layers_are_registered() -> None:
    """A user's rule is used in place of the general one."""
    calls = []

    @register(Scale)
    class ScaleRule(LayerRule):
        parameters = ("weight", "shift")

        def sample_gradients(
            self, module: nn.Module, x: Tensor, V: Tensor, samples: int
        ) -> dict[str, Tensor]:
            calls.append(samples)
            shape = (V.shape[0], samples, -1, V.shape[-1])
            weight = (V * x.sin()).reshape(shape).sum(2)
            return {"weight": weight, "shift": V.reshape(shape).sum(2)}

    try:
        check_layer(Scale(6), R(4, 6))
        assert registered(Scale(6)) is not FALLBACK
        train(Net("custom"), "custom")
        assert 8 in calls
    finally:
        del RULES[Scale]
