# SPDX-License-Identifier: MIT
"""Which losses are recognised from the output's gradient, and which are not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.errors import DDPNOptWarning, TerminalError
from oracles.common import assert_same, assert_unchanged, dense_chain, input_for, snapshot

Loss = Callable[[Tensor], Tensor]
B, C = 8, 4
Y = torch.tensor([0, 1, 2, 3, 1, 2, 0, 3])
IGNORED = torch.tensor([0, 1, -100, 3, 1, -100, 0, 3])
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
TARGETS = (torch.randn(B, C, generator=torch.Generator().manual_seed(0)) > 0).double()
SOFT = torch.rand(B, C, generator=torch.Generator().manual_seed(1)).double().softmax(1)
MIXED = 0.7 * F.one_hot(Y, C) + 0.3 * F.one_hot(Y.flip(0), C)


def mixup(z: Tensor) -> Tensor:
    return 0.7 * F.cross_entropy(z, Y) + 0.3 * F.cross_entropy(z, Y.roll(1))


def focal(z: Tensor) -> Tensor:
    p = z.softmax(1)[torch.arange(B), Y]
    return ((1 - p) ** 2 * -p.log()).mean()


CROSS_ENTROPY: dict[str, Loss] = {
    "mean": lambda z: F.cross_entropy(z, Y),
    "sum": lambda z: F.cross_entropy(z, Y, reduction="sum"),
    "smoothing": lambda z: F.cross_entropy(z, Y, label_smoothing=0.1),
    "weights": lambda z: F.cross_entropy(z, Y, WEIGHTS.to(z)),
    "ignored": lambda z: F.cross_entropy(z, IGNORED),
    "ignored_weights": lambda z: F.cross_entropy(z, IGNORED, WEIGHTS.to(z)),
    "quarter": lambda z: F.cross_entropy(z, Y) / 4,
    "scaled": lambda z: F.cross_entropy(z, Y) * 13107,
    "smoothing_scaled": lambda z: F.cross_entropy(z, Y, label_smoothing=0.1) * 13107,
    "nll": lambda z: F.nll_loss(F.log_softmax(z, 1), Y),
    "nll_weights": lambda z: F.nll_loss(F.log_softmax(z, 1), Y, WEIGHTS.to(z)),
    "by_hand": lambda z: (z.logsumexp(1) - z[torch.arange(B), Y]).mean(),
}
LOGISTIC: dict[str, Loss] = {
    "mean": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS),
    "sum": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS, reduction="sum"),
    "scaled": lambda z: F.binary_cross_entropy_with_logits(z, TARGETS) * 13107,
}
UNRECOGNISED: dict[str, Loss] = {
    "focal": focal,
    "temperature": lambda z: F.cross_entropy(z / 2, Y),
    "sharp_temperature": lambda z: F.cross_entropy(3 * z, Y),
    "mixup": mixup,
    "distillation": lambda z: F.kl_div(F.log_softmax(z, 1), SOFT.to(z), reduction="batchmean"),
    "soft_temperature": lambda z: F.kl_div(
        F.log_softmax(z / 3, 1), SOFT.to(z), reduction="batchmean"
    ),
    "distilled_labels": lambda z: (
        0.5 * F.cross_entropy(z, Y) + 0.5 * F.cross_entropy(z, SOFT.to(z))
    ),
    "multi_margin": lambda z: F.multi_margin_loss(z, Y),
    "mse": lambda z: F.mse_loss(z, F.one_hot(Y, C).to(z)),
    "l1": lambda z: F.l1_loss(z, SOFT.to(z)),
    "smooth_l1": lambda z: F.smooth_l1_loss(z, MIXED.to(z)),
    "logit_penalty": lambda z: F.cross_entropy(z, Y) + 1e-2 * z.pow(2).mean(),
    "small_penalty": lambda z: F.cross_entropy(z, Y) + 1e-4 * z.pow(2).mean(),
    "confidence_penalty": lambda z: (
        F.cross_entropy(z, Y) + 0.05 * (z.softmax(1) * F.log_softmax(z, 1)).sum(1).mean()
    ),
    "sample_weights": lambda z: (
        F.cross_entropy(z, Y, reduction="none") * torch.linspace(0.5, 1.5, B).to(z)
    ).mean(),
    "soft_bce": lambda z: F.binary_cross_entropy_with_logits(z, SOFT.to(z)),
    "poisson": lambda z: F.poisson_nll_loss(z, MIXED.to(z)),
}


def net(classes: int = C) -> nn.Module:
    return dense_chain([5, 6, classes], "tanh")


def one_step(loss: Loss, model: nn.Module | None = None, **options: object) -> DDPNOpt:
    model = net() if model is None else model
    opt = DDPNOpt(model, lr=0.5, **options)  # type: ignore[arg-type]
    opt.zero_grad()
    x = torch.randn(B, 5, generator=torch.Generator().manual_seed(3))
    loss(model(x.to(next(model.parameters()).dtype))).backward()
    opt.step()
    return opt


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", CROSS_ENTROPY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_cross_entropy(name: str, feedback: object, dtype: torch.dtype) -> None:
    opt = one_step(CROSS_ENTROPY[name], net().to(dtype), feedback=feedback)
    assert opt.last_step.terminal in ("cross_entropy", "nll")


@pytest.mark.parametrize("name", LOGISTIC)
@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_logistic(name: str) -> None:
    assert one_step(LOGISTIC[name]).last_step.terminal == "bce_with_logits"


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_one_logit() -> None:
    y = (Y % 2).double()[:, None]
    opt = one_step(lambda z: F.binary_cross_entropy_with_logits(z, y), net(1))
    assert opt.last_step.terminal == "bce_with_logits"


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_two_classes() -> None:
    opt = one_step(lambda z: F.cross_entropy(z, Y % 2), net(2))
    assert opt.last_step.terminal == "cross_entropy"


@pytest.mark.parametrize("kind", ["two_classes", "one_logit"])
def test_two_classes_with_other_losses(kind: str) -> None:
    """Any gradient fits two classes: only the constancy of the weight tells."""
    w = torch.linspace(0.5, 1.5, B).double()
    if kind == "two_classes":
        model = net(2)
        loss: Loss = lambda z: (F.cross_entropy(z, Y % 2, reduction="none") * w).mean()  # noqa: E731
    else:
        model = net(1)
        loss = lambda z: F.mse_loss(z, (Y % 2).double()[:, None])  # noqa: E731
    with pytest.warns(DDPNOptWarning, match="terminal"):
        one_step(loss, model)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_log_softmax_at_the_end_of_the_model() -> None:
    model = nn.Sequential(net(), nn.LogSoftmax(1))
    opt = one_step(lambda z: F.nll_loss(z, Y), model)
    assert opt.last_step.terminal in ("cross_entropy", "nll")
    twin = net()
    other = one_step(lambda z: F.cross_entropy(z, Y), twin)
    assert other.last_step.terminal == "cross_entropy"
    assert_same(model[0], twin, 1e-12)


class LossInside(nn.Module):
    """A model that returns its loss, as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.net(x)
        return F.cross_entropy(z, y), z


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_loss_inside_the_model(feedback: object) -> None:
    model, twin = LossInside(), net()
    x = input_for(twin, B)
    opt = DDPNOpt(model, lr=0.5, feedback=feedback)
    other = DDPNOpt(twin, lr=0.5, feedback=feedback)
    for _ in range(3):
        opt.zero_grad()
        model(x, y=Y)[0].backward()
        opt.step()
        other.zero_grad()
        F.cross_entropy(twin(x), Y).backward()
        other.step()
    assert opt.last_step.terminal == "cross_entropy"
    assert_same(model.net, twin, 1e-13)


@pytest.mark.parametrize("scale", [1.0, 1 / 4, 13107.0])
def test_scale_is_fitted(scale: float) -> None:
    """lr / scale times a loss times scale is the same step: nothing assumes 1/B."""
    models = []
    for factor in (1.0, scale):
        model = net()
        opt = DDPNOpt(model, lr=0.5 / factor)
        opt.zero_grad()
        (factor * F.cross_entropy(model(input_for(model, B)), Y)).backward()
        opt.step()
        models.append(model)
    assert_same(models[0], models[1], 1e-11)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", UNRECOGNISED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unrecognised_trains_plainly(name: str, feedback: object, dtype: torch.dtype) -> None:
    model, twin = net().to(dtype), net().to(dtype)
    opt = DDPNOpt(model, lr=0.3, momentum=0.5, feedback=feedback)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.3, momentum=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(4):
            x = input_for(model, B, seed).to(dtype)
            for m, o in ((model, opt), (twin, sgd)):
                o.zero_grad()
                UNRECOGNISED[name](m(x)).backward()
                o.step()
    said = [w for w in caught if issubclass(w.category, DDPNOptWarning)]
    assert len(said) == 1 and "terminal" in str(said[0].message)
    assert "cross_entropy" not in opt.last_step.terminal
    assert "unrecognised" in opt.last_step.terminal
    assert_same(model, twin, 1e-15 if dtype is torch.float64 else 1e-6)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize(
    ("terminal", "loss"),
    [
        ("cross_entropy", CROSS_ENTROPY["mean"]),
        ("cross_entropy", CROSS_ENTROPY["weights"]),
        ("mse", UNRECOGNISED["mse"]),
        ("bce_with_logits", LOGISTIC["mean"]),
    ],
)
@pytest.mark.parametrize("value", ["moreau", "gauss_newton", "low_rank", "dense"])
def test_explicit_terminal(terminal: str, loss: Loss, value: str) -> None:
    model, twin = net(), net()
    opt = one_step(loss, model, terminal=terminal, value=value)
    assert opt.last_step.terminal == terminal
    one_step(loss, twin, feedback=False)
    assert not torch.equal(model.layers[0].weight, twin.layers[0].weight)


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
def test_explicit_nll_on_log_probabilities() -> None:
    model = nn.Sequential(net(), nn.LogSoftmax(1))
    opt = one_step(lambda z: F.nll_loss(z, Y), model, terminal="nll")
    assert opt.last_step.terminal == "nll"


@pytest.mark.parametrize(
    ("terminal", "loss"),
    [
        ("cross_entropy", UNRECOGNISED["mse"]),
        ("cross_entropy", UNRECOGNISED["multi_margin"]),
        ("cross_entropy", LOGISTIC["mean"]),
        ("cross_entropy", UNRECOGNISED["logit_penalty"]),
        ("bce_with_logits", CROSS_ENTROPY["mean"]),
        ("bce_with_logits", UNRECOGNISED["mse"]),
        ("nll", UNRECOGNISED["mse"]),
    ],
)
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_contradicted_terminal(terminal: str, loss: Loss, feedback: object) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(TerminalError, match=terminal):
        one_step(loss, model, terminal=terminal, feedback=feedback)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "factor",
    [
        lambda z: z,
        lambda z: torch.zeros(3, C, 1, dtype=z.dtype),
        lambda z: torch.zeros(B, C + 1, 1, dtype=z.dtype),
        lambda z: torch.full((B, C, 1), torch.nan, dtype=z.dtype),
        lambda z: None,
    ],
    ids=["two_axes", "batch", "outputs", "nan", "none"],
)
def test_factor_of_wrong_shape(factor: Callable[[Tensor], Tensor]) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(TerminalError):
        one_step(CROSS_ENTROPY["mean"], model, terminal=factor, value="low_rank")
    assert_unchanged(model, before)


def test_callable_factor_is_the_exact_one() -> None:
    def factor(z: Tensor) -> Tensor:
        p = z.softmax(1)
        root = p.sqrt()
        return (torch.diag_embed(root) - p[:, :, None] * root[:, None]) / len(z) ** 0.5

    models = [net(), net()]
    one_step(CROSS_ENTROPY["mean"], models[0], terminal=factor, value="low_rank")
    one_step(CROSS_ENTROPY["mean"], models[1], value="low_rank")
    assert_same(models[0], models[1], 1e-11)


def test_undecided_output_keeps_the_last_decision() -> None:
    """All logits equal: every softmax loss looks alike there."""
    model = net()
    with torch.no_grad():
        model.layers[1].weight.zero_()
        model.layers[1].bias.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DDPNOptWarning)
        opt = DDPNOpt(model, lr=0.5)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(input_for(model, B)), Y).backward()
            opt.step()
    assert opt.last_step.terminal == "cross_entropy"


def test_all_samples_ignored_is_a_plain_step() -> None:
    model = net()
    before = copy.deepcopy(model)
    one_step(lambda z: F.cross_entropy(z, torch.full((B,), -100), reduction="sum"), model)
    assert_same(model, before)


@pytest.mark.parametrize("value", ["moreau", "gauss_newton", "low_rank"])
def test_ignored_samples_have_no_influence(value: str) -> None:
    keep = IGNORED != -100
    x = input_for(net(), B)
    models = []
    for inputs, y in ((x, IGNORED), (x[keep], IGNORED[keep])):
        model = net()
        opt = DDPNOpt(model, lr=0.5, value=value)
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(model(inputs), y).backward()
            opt.step()
        models.append(model)
    assert_same(models[0], models[1], 1e-12)
