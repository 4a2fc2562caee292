# SPDX-License-Identifier: MIT
"""Torch's attention equals two dense layers with functions between them, whatever its options."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt
from ddpnopt.curvature import RMSprop
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import GaussNewton, LowRank, Moreau
from oracles.attention import Attention, ByHand, Encoder, EncoderByHand
from oracles.graph_parts import linear

#: Both nets say the same, or something is wrong with the comparison.
pytestmark = pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")

BATCH = 6
CURVATURES = {"identity": "identity", "rmsprop": RMSprop(eps=1e-3), "kfac": "kfac"}
LR = {"identity": 0.5, "rmsprop": 0.02, "kfac": 0.1}
#: Lengths: the batch size itself, one that divides it, one that it divides, and none of these.
LENGTHS = [6, 3, 12, 4]


def sequences(length: int) -> tuple[Tensor, Tensor]:
    """(B, T, 3) and labels."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(BATCH, length, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    batch_first: bool = True,
    parts: Sequence[slice] = (slice(None),),
    **options: object,
) -> list[float]:
    """Two steps of the plain loop; the losses."""
    opt = DDPNOpt(net, gram="exact", **{"lr": 0.5, **options})  # type: ignore[arg-type]
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        opt.zero_grad()
        for rows in parts:
            inputs = x[rows] if batch_first else x[rows].transpose(0, 1).contiguous()
            loss = F.cross_entropy(net(inputs), y[rows], reduction="sum") / len(y)
            loss.backward()
            losses.append(loss.item())
        opt.step()
    return losses


def compare(
    net: Attention | Encoder,
    written: ByHand | EncoderByHand,
    length: int,
    **options: object,
) -> None:
    """Both train alike, and do move."""
    x, y = sequences(length)
    before = [mine.detach().clone() for mine, _ in written.pairs(net)]  # type: ignore[arg-type]
    first = train(net, x, y, batch_first=net.batch_first, **options)  # type: ignore[arg-type]
    second = train(written, x, y, **options)  # type: ignore[arg-type]
    assert first == pytest.approx(second, rel=1e-11)
    for (mine, its), old in zip(written.pairs(net), before, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(its, mine, rtol=1e-11, atol=1e-12)
        assert float((mine - old).detach().abs().max()) > 1e-5


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_attention(length: int, batch_first: bool, value: object, feedback: object) -> None:
    net = Attention(batch_first)
    compare(net, ByHand(net), length, value=value, feedback=feedback)


@pytest.mark.parametrize("curvature", ["rmsprop", "kfac"])
@pytest.mark.parametrize("value", [Moreau(), LowRank(), GaussNewton()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_curvatures(curvature: str, value: object, feedback: object) -> None:
    net = Attention(False)
    options = {"curvature": CURVATURES[curvature], "lr": LR[curvature], "value": value}
    compare(net, ByHand(net), 4, feedback=feedback, **options)


@pytest.mark.parametrize("value", [Moreau(coupling=False), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("bias", [True, False])
def test_no_weight_gradients(value: object, feedback: object, bias: bool) -> None:
    net = Attention(batch_first=bias, bias=bias)
    options = {"value": value, "feedback": feedback, "weight_gradients": False}
    compare(net, ByHand(net), 4, **options)
    assert net.attention.in_proj_weight.grad is None


def padded(length: int) -> Tensor:
    """Some sequences are shorter."""
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, -1] = mask[4, 1:] = True
    return mask


#: Options of the attention's call, by the length.
MASKS = {
    "attn_mask": lambda n: {"mask": torch.randn(n, n, dtype=torch.float64)},
    "is_causal": lambda n: {
        "mask": nn.Transformer.generate_square_subsequent_mask(n, dtype=torch.float64),
        "call": {"is_causal": True, "need_weights": False},
    },
    "padding": lambda n: {"padding": padded(n)},
    "padding, no weights": lambda n: {"padding": padded(n), "call": {"need_weights": False}},
    "no weights": lambda n: {"call": {"need_weights": False}},
    "weights of each head": lambda n: {"call": {"average_attn_weights": False}},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks(mask: str, batch_first: bool) -> None:
    net = Attention(batch_first, **MASKS[mask](6))
    compare(net, ByHand(net), 6, value=LowRank() if batch_first else Moreau())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("fused", [True, False])
def test_dropout(batch_first: bool, value: object, fused: bool) -> None:
    """The rollout draws what the pass drew."""
    net = Attention(batch_first, call={"need_weights": not fused}, dropout=0.3)
    compare(net, ByHand(net, fused), 4, value=value)


@pytest.mark.parametrize("batch_first", [True, False])
def test_rollout_drops_the_same(batch_first: bool) -> None:
    net = Attention(batch_first, call={"average_attn_weights": False}, dropout=0.3)
    dropped: list[Tensor] = []
    net.attention.register_forward_hook(lambda *found: dropped.append(found[2][1] == 0))
    train(net, *sequences(4), batch_first=batch_first)
    assert len(dropped) == 4
    for first, again in zip(dropped[::2], dropped[1::2], strict=True):
        assert bool(first.any())
        assert torch.equal(first, again)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("length", [2, 4])
def test_accumulation(batch_first: bool, value: object, length: int) -> None:
    """Passes of different sizes; one has as many samples as positions."""
    net = Attention(batch_first, dropout=0.2)
    parts = [slice(0, 2), slice(2, 6)]
    compare(net, ByHand(net), length, value=value, parts=parts)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_encoder(batch_first: bool, norm_first: bool, value: object) -> None:
    net = Encoder(batch_first, norm_first)
    compare(net, EncoderByHand(net), 6 if norm_first else 3, value=value, lr=0.3)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
def test_encoder_with_dropout(norm_first: bool, feedback: object) -> None:
    net = Encoder(True, norm_first, 0.2)
    compare(net, EncoderByHand(net), 6, feedback=feedback, lr=0.3)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("parts", [[slice(None)], [slice(0, 2), slice(2, 6)]])
def test_fine_tuning(norm_first: bool, value: object, pad: bool, parts: list[slice]) -> None:
    """In eval mode, without gradients, torch would run one fused function."""
    if pad and len(parts) > 1:
        pytest.skip("the mask is the whole batch's")
    net = Encoder(True, norm_first, 0.2, padded(4) if pad else None).eval()
    compare(net, EncoderByHand(net).eval(), 4, value=value, lr=0.3, parts=parts)
    assert torch.backends.mha.get_fastpath_enabled()


class Cross(nn.Module):
    """Queries of one input, keys and values of another, of some width."""

    def __init__(self, width: int = 4, **options: object) -> None:
        super().__init__()
        self.stem, self.other, self.head = linear(3, 4), linear(3, width), linear(4, 3)
        options = {"kdim": width, "vdim": width, "batch_first": True, **options}
        self.attention = nn.MultiheadAttention(4, 2, **options).double()  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Attention from a sequence to its reverse."""
        h, other = self.stem(x), torch.tanh(self.other(x.flip(1)))
        h = h + self.attention(h, other, other)[0]
        made: Tensor = self.head(torch.tanh(h).mean(1))
        return made


@pytest.mark.parametrize("value", [Moreau(), LowRank()])
@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("options", [{}, {"width": 5}, {"add_bias_kv": True}])
def test_cross_attention(value: object, feedback: object, options: dict[str, object]) -> None:
    """What has no rule takes the plain step, and is named; everything moves, the loss falls."""
    net = Cross(**options)  # type: ignore[arg-type]
    x, y = sequences(4)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.warns(DDPNOptWarning, match=r"'attention\.\w+_proj_weight'.* plain step"):
        losses = train(net, x, y, value=value, feedback=feedback)
    assert losses[-1] < losses[0]
    for name, p in net.named_parameters():
        assert not torch.equal(p, before[name]), name
