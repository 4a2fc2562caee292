# SPDX-License-Identifier: MIT
"""`explain` says what a step then does, and changes nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from ddpnopt import DDPNOpt, UnsupportedModelError, explain
from ddpnopt.experiments.commands import app
from ddpnopt.testing import Operations


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.spare = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = torch.relu(h + self.norm(self.conv(torch.relu(h))))
        return self.head(self.frozen(h.mean((2, 3))))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embed(x))).mean(1))


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x.square() * self.scale


MODELS = {
    "plain": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
        lambda: torch.randn(12, 6),
    ),
    "custom": (
        lambda: nn.Sequential(nn.Linear(6, 8), Square(), nn.Dropout(), nn.Linear(8, 5)),
        lambda: torch.randn(12, 6),
    ),
    "residual": (Residual, lambda: torch.randn(12, 3, 6, 6)),
    "tokens": (Tokens, lambda: torch.randint(9, (12, 7))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_it_says_what_a_step_does(kind: str) -> None:
    make, batch = MODELS[kind]
    model, x = make(), batch()
    found = explain(model, x)
    opt = DDPNOpt(model, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        F.cross_entropy(model(x), torch.randint(5, (12,))).backward()
        opt.step()
    report = opt.last_step
    assert report is not None and found.samples == report.samples == 12 and not found.refusal
    assert [r.name for r in found.rows if r.treatment == "feedback"] == [
        layer.name for layer in report.layers
    ]
    assert found.boundary == (report.front.name if report.front else "")
    for row in found.rows:
        assert bool(row.reason) == (row.treatment != "feedback")
    assert sum(row.parameters for row in found.rows) == sum(p.numel() for p in model.parameters())
    assert all(row.name in str(found) for row in found.rows)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_changed(kind: str) -> None:
    make, batch = MODELS[kind]
    model, x = make(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        explain(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_operations_of_a_dense_net() -> None:
    """A product of 12 x n x m counts twice that; three units in SGD, two more in a closed loop."""
    found = explain(MODELS["plain"][0](), MODELS["plain"][1]())
    first, last = 2 * 12 * 6 * 8, 2 * 12 * 8 * 5
    assert found.sgd_flops == 2 * first + 3 * last
    assert found.pass_flops == first + last  # the second forward pass
    units = (first, last)  # the re-weighted gradient; the Gram products are small
    assert all(unit <= row.flops < 2 * unit for row, unit in zip(found.rows, units, strict=True))
    assert 1.5 < found.ratio < 2.6


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight, self.head = self.first.weight, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", [*MODELS, "tied", "frozen", "evaluated"])
@pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")
def test_the_operations_of_a_real_step(kind: str) -> None:
    """SGD's to the last product, a closed-loop step's to a tenth."""
    if kind == "evaluated":
        model, x = Tokens().eval(), torch.randint(9, (12, 7))
    elif kind in MODELS:
        model, x = MODELS[kind][0](), MODELS[kind][1]()
    else:
        model, x = (
            (Tied(), torch.randn(12, 8)) if kind == "tied" else (frozen(), torch.randn(12, 6))
        )
    y = torch.randint(5, (12,))
    found = explain(model, x)
    with Operations() as plain:
        F.cross_entropy(model(x), y).backward()
    opt = DDPNOpt(model, lr=0.01)
    for _ in range(4):  # the first passes look at the model, too
        opt.zero_grad()
        with Operations() as closed:
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert found.sgd_flops == plain.total
    assert found.flops + found.sgd_flops == pytest.approx(closed.total, rel=0.1)


def test_refusals_and_bad_models() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.net(x))

    assert explain(Twice(), torch.randn(3, 4)).rows
    with pytest.raises(TypeError):
        explain(torch.relu, torch.randn(3))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="no trainable layer"):
        explain(nn.Linear(3, 2).requires_grad_(False), torch.randn(3, 3))


def test_the_command() -> None:
    run = CliRunner().invoke
    done = run(app, ["explain", "cnn-16-bn", "--input", "4,1,8,8"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "weighted" in done.output and "ConvRule" in done.output
    done = run(app, ["explain", "no-such-net"])
    assert done.exit_code == 2 and "unknown architecture" in done.output
    done = run(app, ["explain", "torch.nn:Flatten"])
    assert done.exit_code == 2 and "no parameters" in done.output
    assert "Example" in run(app, ["explain", "--help"]).output


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_layers_that_compute_their_weights_are_counted(parametrize: str) -> None:
    layer = getattr(nn.utils.parametrizations, parametrize)(nn.Linear(8, 8))
    found = explain(nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 5)), torch.randn(12, 6))
    row = found.rows[1]
    assert (row.name, row.rule, row.treatment) == ("1", "autograd", "feedback")
    assert row.flops > 0
