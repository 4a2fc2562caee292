# SPDX-License-Identifier: MIT
"""Outputs that are made of the last layer's alone, against the rules on the explicit state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, VanillaDDP
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.returned import remade
from oracles.graph import Net, Program
from oracles.graph_cases import compare_low_rank, compare_moreau
from oracles.graph_nets import Case
from oracles.graph_parts import add, conv, linear, noise, tanh

# Feedback that is quietly off would be a warning.
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

PRIOR = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)


def soft_cap(z: Tensor) -> Tensor:
    """Logits that stay between -2 and 2."""
    return 2 * torch.tanh(z / 2)


def cosines(z: Tensor) -> Tensor:
    """Logits of one length."""
    return 3 * F.normalize(z, dim=-1)


#: What comes between the last layer's output and the softmax.
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature": lambda z: z / 0.7,
    "soft cap": soft_cap,
    "cosines": cosines,
    "prior": lambda z: z + PRIOR,
    "shape": lambda z: z[:, None].flatten(1),
}
#: What comes between it and a squared error, besides.
ANY: dict[str, Callable[[Tensor], Tensor]] = {
    **LOGITS,
    "sigmoid": torch.sigmoid,
    "softmax": lambda z: z.softmax(-1),
    "softplus": F.softplus,
}


def case(end: Callable[[Tensor], Tensor], branched: bool) -> Case:
    """A chain, or a net with a skip, whose output is a function of its last layer's."""
    torch.manual_seed(0)
    p = Program()
    h = p(tanh, p("a", 0))
    deep = p(tanh, p("b", h))
    p(end, p("head", p(add, h, deep) if branched else deep))
    return Net({"a": linear(4, 4), "b": linear(4, 4), "head": linear(4, 3)}, p), (noise(4),)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", LOGITS)
def test_softmax_of_what_is_returned(name: str, branched: bool, feedback: object) -> None:
    compare_moreau(case(LOGITS[name], branched), feedback=feedback)
    compare_low_rank(case(LOGITS[name], branched), feedback=feedback)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("name", ANY)
def test_squared_error_of_what_is_returned(name: str, branched: bool) -> None:
    compare_moreau(case(ANY[name], branched), terminal="mse")
    compare_low_rank(case(ANY[name], branched), terminal="mse")


def test_mean_over_positions() -> None:
    def pooled() -> Case:
        torch.manual_seed(0)
        p = Program()
        p(lambda z: z.relu().mean((2, 3)), p("head", p(tanh, p("a", 0))))
        return Net({"a": conv(2, 4), "head": conv(4, 3, 1)}, p), (noise(2, 4, 4),)

    compare_moreau(pooled())
    compare_low_rank(pooled())


@pytest.mark.parametrize(
    ("end", "criterion"),
    [
        (lambda z: F.log_softmax(z, -1), F.nll_loss),
        (lambda z: z - z.logsumexp(-1, keepdim=True), F.nll_loss),
        (torch.sigmoid, lambda p, y: F.binary_cross_entropy(p, F.one_hot(y, 3).to(p))),
    ],
)
def test_the_normalisation_of_a_loss_is_the_loss(
    end: Callable[[Tensor], Tensor], criterion: Callable[[Tensor, Tensor], Tensor]
) -> None:
    net, (x,) = case(end, branched=True)
    opt = DDPNOpt(net, lr=0.1)
    criterion(net(x), torch.arange(len(x)) % 3).backward()
    opt.step()
    assert opt.last_step.terminal in ("cross_entropy", "bce_with_logits")


class WithLoss(nn.Module):
    """Returns its loss and its logits, as language models do; the loss is of one of the two."""

    def __init__(self, net: nn.Module, capped: bool) -> None:
        super().__init__()
        self.net, self.capped = net, capped

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the capped logits."""
        z = self.net(x)
        return F.cross_entropy(soft_cap(z) if self.capped else z, y), soft_cap(z)

    def both(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same with one call of the cap."""
        logits = soft_cap(self.net(x))
        return F.cross_entropy(logits, y), logits


def test_a_loss_inside_tells_which_of_two_it_is_of() -> None:
    (net, (x,)), y = case(lambda z: z, branched=True), torch.arange(8) % 3
    y = y[: len(x)]
    model = WithLoss(net, capped=False)
    opt = DDPNOpt(model, lr=0.1)
    model(x, y)[0].backward()
    opt.step()
    assert opt.last_step.terminal == "cross_entropy"
    model.forward = model.both  # type: ignore[method-assign]
    opt.zero_grad()
    model(x, y)[0].backward()
    opt.step()
    assert opt.last_step.terminal == "cross_entropy"


def test_vanilla_ddp_does_not_search_by_another_loss() -> None:
    (net, (x,)), y = case(torch.sigmoid, branched=False), torch.rand(6, 3, dtype=torch.float64)
    opt = VanillaDDP(net, terminal="mse")
    F.mse_loss(net(x), y[: len(x)]).backward()
    with pytest.warns(DDPNOptWarning, match=r"give step\(closure\)"):
        opt.step()


def test_only_what_is_certain_is_taken() -> None:
    """Of logits, known functions alone; and no loss is taken for an output."""
    z = (noise(3).requires_grad_() * 1).clone()
    end = {z.grad_fn} - {None}
    for name, f in ANY.items():
        out = f(z)
        assert (remade([out], end, True) is out) == (name in LOGITS and name != "shape"), name
        assert (remade([out], end, False) is out) == (name != "shape"), name
    assert remade([F.mse_loss(z, z.detach() + 1, reduction="none")], end, False) is None
    assert remade([F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))], end, True) is None
