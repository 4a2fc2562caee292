# SPDX-License-Identifier: MIT
"""One weight looked up and multiplied by: all products against each sample's own gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from ddpnopt.layers import rule_for
from ddpnopt.layers import tied as layer
from ddpnopt.layers.tied import Tied, refusal, tied
from ddpnopt.positions import Gain
from ddpnopt.stages import Stage
from ddpnopt.testing import check_layer

SAMPLES = 4
Net = tuple[list[Stage], int]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def use(module: nn.Module, x: Tensor, columns: int = 2, **known: Any) -> Stage:
    """An execution with random gradients, as it is recorded."""
    h = module(x).detach()
    Z = torch.randn(columns, *h.shape, dtype=h.dtype) if columns else None
    return Stage(
        "layer", module, rule_for(module), x, (x,), (0,), len(h),
        **{"G": torch.randn_like(h), "Z_h": Z} | known,
    )  # fmt: skip


def pair(bias: bool = False, rows: int = 7, width: int = 5, **options: Any) -> list[nn.Module]:
    """An embedding and a head with its weight."""
    embedding, head = nn.Embedding(rows, width, **options), nn.Linear(width, rows, bias=bias)
    head.weight = embedding.weight
    return [embedding.double(), head.double()]


def uneven() -> list[Stage]:
    """Five lookups at three places: one stays empty."""
    E, L = pair(True)
    return [use(E, drawn(7, SAMPLES, 5)), use(L, torch.randn(SAMPLES, 3, 5).double())]


def drawn(rows: int, *shape: int) -> Tensor:
    return torch.randint(rows, shape)


def language_model(bias: bool, positions: int = 3, **options: Any) -> list[Stage]:
    E, L = pair(bias, **options)
    x = torch.randn(SAMPLES, positions, E.weight.shape[1]).double()
    return [use(E, drawn(E.weight.shape[0], SAMPLES, positions)), use(L, x)]


def several() -> list[Stage]:
    """An encoder's and a decoder's lookups, two heads, some with two rows a sample."""
    E, L = pair(True, padding_idx=2)
    other = nn.Embedding(7, 5, padding_idx=4)
    other.weight = E.weight
    rows = 2 * SAMPLES
    return [
        use(E, drawn(7, rows, 3)),
        use(L, torch.randn(SAMPLES, 5).double()),
        use(other, drawn(7, SAMPLES, 2, 2)),
        use(L, torch.randn(rows, 2, 5).double()),
    ]


def bag() -> list[Stage]:
    E, L = nn.EmbeddingBag(7, 5, mode="mean", padding_idx=1).double(), pair(True)[1]
    L.weight = E.weight
    return [use(E, drawn(7, SAMPLES, 6)), use(L, torch.randn(SAMPLES, 5).double())]


def last_position() -> list[Stage]:
    """More lookups than places; every row is looked up twice."""
    E, L = pair(True)
    index = torch.arange(7).repeat(SAMPLES, 2)
    return [use(E, index), use(L, torch.randn(SAMPLES, 1, 5).double())]


CASES: dict[str, Callable[[], list[Stage]]] = {
    "no bias": lambda: language_model(False),
    "bias": lambda: language_model(True),
    "padding": lambda: language_model(True, 6, padding_idx=3),
    "more positions than width": lambda: language_model(True, 9, rows=30, width=5),
    "two rows": lambda: language_model(False, 8, rows=2),
    "several executions": several,
    "uneven": uneven,
    "bag": bag,
    "last position": last_position,
    "lookups alone": lambda: language_model(False)[:1],
    "heads alone": lambda: [language_model(True)[1]] * 2,
}


def own_gradients(parts: list[Stage], samples: int) -> dict[str, Tensor]:
    """(1 + r, B, *shape) by name: one sample and column at a time, through the modules."""
    params = {n: p.detach() for part in parts for n, p in part.module.named_parameters()}

    def one(sample: int, column: int) -> dict[str, Tensor]:
        def along(params: dict[str, Tensor]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for part in parts:
                own = {n: params[n] for n, _ in part.module.named_parameters()}
                x = part.x.reshape(samples, -1, *part.x.shape[1:])[sample]
                v = part.G if column == 0 else part.Z_h[column - 1]  # type: ignore[index]
                h = functional_call(part.module, own, (x,))
                v = v.reshape(samples, -1, *v.shape[1:])[sample]  # type: ignore[union-attr]
                total = total + (h * v).sum()
            return total

        return grad(along)(params)

    r = 1 if parts[0].Z_h is None else 1 + len(parts[0].Z_h)
    found = [[one(i, k) for i in range(samples)] for k in range(r)]
    return {n: torch.stack([torch.stack([s[n] for s in k]) for k in found]) for n in params}


class Case:
    """The joined layer and its oracle, for one column or three."""

    def __init__(self, name: str, columns: int) -> None:
        torch.manual_seed(1)
        parts = CASES[name]()
        if columns == 1:
            for part in parts:
                part.Z_h = None
        assert not refusal(parts)
        self.parts, self.samples = parts, SAMPLES
        self.rule, self.module, self.x, G, Z = tied(parts, SAMPLES)
        assert (Z is None) == (columns == 1)
        self.V = G[None] if Z is None else torch.cat([G[None], Z])
        self.own = own_gradients(parts, SAMPLES)
        self.params = {n: p.detach() for n, p in self.module.named_parameters()}
        self.args = self.module, self.x, self.V

    def gram(self, gain: dict[str, Gain]) -> Tensor:
        total = self.V.new_zeros(self.samples, len(self.V), len(self.V))
        for name, P in gain.items():
            G = self.own[name]
            total += torch.einsum("rbi,sbi->brs", (G * P).flatten(2), G.flatten(2))
        return total

    def gains(self) -> Iterator[dict[str, Gain]]:
        number: dict[str, Gain] = dict.fromkeys(self.params, 0.7)
        diagonal: dict[str, Gain] = {n: torch.rand_like(p) for n, p in self.params.items()}
        yield from (number, diagonal, {"weight": diagonal["weight"]}, {})
        if "bias" in self.params:
            yield {"weight": 0.3, "bias": diagonal["bias"]}
            yield {"bias": 0.2}


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=1e-11)


@cache
def made(name: str, columns: int) -> Case:
    return Case(name, columns)


@pytest.fixture(params=[(name, columns) for name in CASES for columns in (1, 3)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return made(*request.param)


def test_parameters_are_named_once(case: Case) -> None:
    heads = [part for part in case.parts if isinstance(part.module, nn.Linear)]
    names = ["weight", "bias"] if heads and heads[0].module.bias is not None else ["weight"]
    assert [name for name, _ in case.module.named_parameters()] == names
    assert case.module.weight is case.parts[0].module.weight


def test_gradients(case: Case) -> None:
    (module, x, V), rule = case.args, case.rule
    total = {name: g[0].sum(0) for name, g in case.own.items()}
    start = {name: torch.randn_like(g) for name, g in total.items()}
    kept = {name: g.clone() for name, g in start.items()}
    found, onto = rule.gradient(module, x, V[0]), rule.onto(module, x, V[0], start, -0.3)
    assert found.keys() == onto.keys() == total.keys()
    for name, g in total.items():
        close(found[name], g)
        close(onto[name], kept[name] - 0.3 * g)
        close(start[name], kept[name])
        assert rule.onto(module, x, V[0], {name: g}, 1.0).keys() == {name}
    if "bias" in total:
        close(rule.bias_gradient(module, V[0]), total["bias"])
    each = rule.sample_gradients(*case.args, case.samples)
    assert each.keys() == case.own.keys()
    for name, g in case.own.items():
        close(each[name], g)


def test_gram(case: Case) -> None:
    for gain in case.gains():
        close(case.rule.gram(*case.args, gain, case.samples), case.gram(gain))


def test_squares(case: Case) -> None:
    found = case.rule.squares(case.module, case.x, case.V[0], case.samples)
    assert found.keys() == case.own.keys()
    for name, g in case.own.items():
        close(found[name], g[0].square().sum(0))


def test_along(case: Case) -> None:
    change = {name: torch.randn_like(p) for name, p in case.params.items()}
    for names in (list(change), *[[name] for name in change], []):
        du = {name: change[name] for name in names}
        expected = case.V.new_zeros(case.samples, len(case.V))
        for name in names:
            expected += (case.own[name] * change[name]).flatten(2).sum(2).T
        close(case.rule.along(*case.args, du, case.samples), expected)


def test_each_execution_along_the_change(case: Case) -> None:
    """What still comes is the sum over executions; one alone may know nothing of the bias."""
    change = {name: torch.randn_like(p) for name, p in case.params.items()}
    total = case.V.new_zeros(case.samples, len(case.V))
    for part in case.parts:
        rule, module, x, G, Z = tied([part], case.samples)
        V = G[None] if Z is None else torch.cat([G[None], Z])
        total += rule.along(module, x, V, change, case.samples)
    close(total, case.rule.along(*case.args, change, case.samples))


def test_few_rows_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "FEWEST", 2)
    monkeypatch.setattr(layer, "chunk_size", lambda G: 1)
    chunks = list(layer._chunks(*case.rule.heads(*case.args, case.samples)))
    assert len(chunks) == (len(case.params["weight"]) + 1) // 2
    test_gram(case)
    test_squares(case)


@pytest.mark.parametrize("name", ["bias", "last position"])
def test_curvature_contains_every_gram(name: str) -> None:
    case = made(name, 3)
    for gain in case.gains():
        D = case.rule.curvature(case.module, case.x, case.V[0], gain, case.samples)
        V = case.V.flatten(2).transpose(0, 1)
        close(V @ D @ V.mT, case.gram(gain))


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES // 2])
@pytest.mark.parametrize("name", CASES)
def test_the_packed_layer_equals_autograd(name: str, samples: int) -> None:
    """Its maps of the state, too; bias aside, of which `check_layer` expects h's own width."""
    case = made(name, 1)
    check_layer(Tied(case.module.weight, None), case.x, rule=case.rule, samples=samples)


@pytest.mark.parametrize("name", ["no bias", "bias", "uneven", "last position", "heads alone"])
def test_the_packed_function_is_the_layers(name: str) -> None:
    parts = [use(p.module, p.x, 0, G=p.module(p.x).detach()) for p in made(name, 1).parts]
    rule, module, x, h, _ = tied(parts, SAMPLES)
    close(module(x), h)
    close(rule.function(module, x), h)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    """Those of the heads' product alone."""
    case = made(name, 1)
    (module, x, V), rule = case.args, case.rule
    rows, width = module.weight.shape
    dx = torch.randn_like(x)
    found = rule.mixed(module, x, dx, V[0])
    close(found["weight"], torch.einsum("bko,bki->oi", V[0, ..., :rows], dx[..., :width]))
    assert "bias" not in found or not found["bias"].any()
    bend = rule.state_curvature(module, x, V[0], SAMPLES)
    assert bend is not None and not bend.any()


def test_the_gradient_is_autograds() -> None:
    """Of a language model whose embedding is its head, a use as a function among them."""
    E, L = pair(padding_idx=0)
    index, y = drawn(7, SAMPLES, 6), drawn(7, SAMPLES, 6)
    e = E(index)
    state = torch.tanh(e.cumsum(1))
    h = L(state)
    nn.functional.cross_entropy(h.flatten(0, 1), y.flatten()).backward(inputs=[e, h, E.weight])
    pass_ = [use(E, index, 0, G=e.grad), use(L, state.detach(), 0, G=h.grad)]
    pass_[1].module = E  # F.linear(state, E.weight)
    pass_[1].rule = rule_for(L)
    rule, module, x, G, _ = tied(pass_, SAMPLES)
    assert E.weight.grad is not None
    close(rule.gradient(module, x, G)["weight"], E.weight.grad)


def test_passes_of_different_lengths_have_one_rule() -> None:
    """A step reads all its passes with the first one's rule and module."""
    long = language_model(True, 5)
    E, L = (part.module for part in long)
    short = [use(E, drawn(7, 3, 4)), use(L, torch.randn(3, 2, 5).double())]
    rule, module = tied(long, SAMPLES)[:2]
    _, _, x, G, _ = tied(short, 3)
    for name, g in own_gradients(short, 3).items():
        close(rule.sample_gradients(module, x, G[None], 3)[name], g[:1])


def test_one_execution_that_no_column_reaches() -> None:
    parts, twins = several(), []
    for part in parts:
        twins.append(use(part.module, part.x, G=part.G, Z_h=part.Z_h))
    parts[1].Z_h, twins[1].Z_h = None, torch.zeros_like(twins[1].Z_h)  # type: ignore[arg-type]
    for ours, theirs in zip(tied(parts, SAMPLES)[2:], tied(twins, SAMPLES)[2:], strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


def test_executions_without_a_gradient_are_left_out() -> None:
    parts = several()
    idle = use(parts[1].module, parts[1].x, G=None)
    for ours, theirs in zip(
        tied([idle, *parts], SAMPLES)[2:], tied(parts, SAMPLES)[2:], strict=True
    ):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_indices_are_exact_beside_coarse_states(dtype: torch.dtype) -> None:
    E, L = pair(rows=3001, width=2)
    E.to(dtype)
    index = torch.arange(1, 3001).reshape(SAMPLES, -1)
    parts = [use(E, index), use(L, torch.randn(SAMPLES, 3, 2, dtype=dtype))]
    rule, module, x, G, _ = tied(parts, SAMPLES)
    assert x.dtype == torch.float32 and G.dtype == dtype
    assert torch.equal(rule.places(module, x, G[None], SAMPLES)[0], index)
    assert module(x).dtype == dtype


def test_uses_that_cancel_have_no_negative_squares() -> None:
    """The head's gradient undoes the lookups': what is left is rounding."""
    samples, positions = 50, 6
    E, L = (module.float() for module in pair(rows=9, width=8))
    index = drawn(9, samples, positions)
    u = torch.randn(samples, positions, 8)
    G = -nn.functional.one_hot(index, 9).float()
    parts = [use(E, index, 0, G=u), use(L, u, 0, G=G)]
    rule, module, x, v, _ = tied(parts, samples)
    gram = rule.gram(module, x, v[None], {"weight": torch.rand(9, 8)}, samples)
    number = rule.gram(module, x, v[None], {"weight": 0.5}, samples)
    for square in (gram, number, rule.squares(module, x, v, samples)["weight"]):
        assert 0 <= float(square.min()) and float(square.max()) < 1e-4


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is computed (views and expansions apart)."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().size() // t.element_size())
        return out


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("columns", [1, 3])
def test_no_gradient_of_the_weight_for_each_sample(columns: int, positions: int) -> None:
    rows, width, samples = 20_000, 64, 4
    E, L = (module.float() for module in pair(True, rows=rows, width=width))
    index = drawn(rows, samples, positions)
    parts = [
        use(E, index, columns - 1),
        use(L, torch.randn(samples, positions, width), columns - 1),
    ]
    change = {n: torch.randn_like(p) for n, p in L.named_parameters()}
    diagonal = {n: torch.rand_like(p.detach()) for n, p in L.named_parameters()}
    with torch.no_grad(), Largest() as seen:
        rule, module, x, G, Z = tied(parts, samples)
        V = G[None] if Z is None else torch.cat([G[None], Z])
        rule.gradient(module, x, G)
        rule.onto(module, x, G, change, 0.1)
        rule.along(module, x, V, change, samples)
        rule.squares(module, x, G, samples)
        for gain in (diagonal, dict.fromkeys(diagonal, 0.1)):
            rule.gram(module, x, V, gain, samples)
    assert seen.elements <= max(rows * width, V.numel()) < samples * rows * width
    with Largest() as seen:
        rule.sample_gradients(module, x, G[None], samples)
    assert seen.elements >= samples * rows * width  # the mode sees them where they are formed


@pytest.mark.parametrize("option", ["max_norm", "sparse", "scale_grad_by_freq"])
def test_options_of_the_embedding_are_refused(option: str) -> None:
    E, L = pair(**{option: 1.0 if option == "max_norm" else True})
    parts = [use(E, drawn(7, SAMPLES, 3)), use(L, torch.randn(SAMPLES, 5).double())]
    assert option in refusal(parts)
    with pytest.raises(ValueError, match=option):
        tied(parts, SAMPLES)


def normed() -> nn.Module:
    return weight_norm(nn.Linear(5, 7).double())


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (normed, "Linear computes the weight"),
        (lambda: nn.Linear(5, 7), "Linear has another weight"),
        (lambda: nn.PReLU(7), "PReLU shares its weight, and only"),
        (lambda: nn.Linear(5, 7), "different biases"),
    ],
)
def test_uses_that_are_no_embedding_or_head_are_refused(
    other: Callable[[], nn.Module], why: str
) -> None:
    parts, module = language_model(False), other().double()
    if "another" not in why and "computes" not in why:
        module.weight = parts[0].module.weight  # type: ignore[assignment]
    x = torch.randn(SAMPLES, 5).double()
    parts.append(Stage("other", module, rule_for(module), x, (x,), (0,), SAMPLES))
    assert why in refusal(parts)


def test_indices_that_the_state_could_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not refusal(language_model(True))
    monkeypatch.setattr(layer, "LARGEST", 6)
    assert "7 rows, more than 6" in refusal(language_model(True))


def test_it_is_no_parameter_of_its_own() -> None:
    E, L = pair(True)
    module = Tied(E.weight, L.bias)  # type: ignore[arg-type]
    assert {id(p) for p in module.parameters()} == {id(p) for p in (E.weight, L.bias)}
