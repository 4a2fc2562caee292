# SPDX-License-Identifier: MIT
"""A cross-entropy that an earlier pass has shown is confirmed, however confident the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpnopt import recognition, rows
from ddpnopt.recognition import Recogniser

SAMPLES, CLASSES = 8, 5


def logits(confidence: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Scores whose label is far ahead of the others, and the labels."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLES, CLASSES, generator=generator, dtype=dtype)
    y = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return z + confidence * F.one_hot(y, CLASSES), y


def gradient(z: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Of the mean cross-entropy."""
    z = z.requires_grad_()
    (G,) = torch.autograd.grad(scale * F.cross_entropy(z, y), z)
    z.detach_()
    return G


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs that had to be fitted."""
    seen: list[Tensor] = []
    fit = recognition.fit_softmax

    def counting(z: Tensor, *others: object) -> object:
        seen.append(z)
        return fit(z, *others)

    monkeypatch.setattr(recognition, "fit_softmax", counting)
    return seen


@pytest.mark.parametrize("terminal", ["auto", "cross_entropy", "nll"])
@pytest.mark.parametrize("confidence", [0.0, 12.0, 25.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_loss_is_not_fitted_again(
    terminal: str, confidence: float, dtype: torch.dtype, fits: list[Tensor]
) -> None:
    """And its numbers are those of a fit."""
    recogniser = Recogniser(terminal)
    z, y = logits(0.0, dtype)
    recogniser(z, gradient(z, y), -1, SAMPLES)
    assert len(fits) == 1
    z, y = logits(confidence, dtype)
    G = gradient(z, y)
    known = recogniser(z, G, -1, SAMPLES)
    assert len(fits) == 1
    fitted = Recogniser("cross_entropy")(z, G, -1, SAMPLES)
    assert known is not None and fitted is not None
    torch.testing.assert_close(known.w, torch.full((SAMPLES,), 1 / SAMPLES, dtype=dtype))
    torch.testing.assert_close(known.kappa, fitted.kappa, rtol=1e-3, atol=0)
    p = torch.softmax(z, -1, dtype=torch.float64)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / SAMPLES
    columns = known.hessian_factor().double()
    torch.testing.assert_close(columns @ columns.mT, hessian, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("terminal", ["auto", "cross_entropy"])
@pytest.mark.parametrize("large", [False, True])
def test_a_batch_of_ignored_labels_tells_nothing(
    terminal: str, large: bool, fits: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known stays, and the batch has a cost."""
    if large:
        monkeypatch.setitem(rows.CHUNK, "cpu", SAMPLES * CLASSES // 2)
    recogniser = Recogniser(terminal)
    z, y = logits(0.0)
    recogniser(z, gradient(z, y), -1, SAMPLES)
    known = recogniser.state_dict()
    assert known["common"] == pytest.approx(1 / SAMPLES)
    cost = recogniser(z, gradient(z, torch.full_like(y, -100)), -1, SAMPLES)
    assert cost is not None and bool(torch.isfinite(cost.kappa).all())
    assert recogniser.state_dict() == known
    del fits[:]
    y[3:] = -100  # fewer rows are still a mean
    assert recogniser(z, gradient(z, y), -1, SAMPLES) is not None
    assert bool(fits) == large


@pytest.mark.parametrize("terminal", ["auto", "cross_entropy"])
@pytest.mark.parametrize("confidence", [0.0, 12.0, 25.0])
@pytest.mark.parametrize("scale", [1.01, 0.5, 512.0])
def test_rescaled_loss_is_noticed(
    terminal: str, confidence: float, scale: float, fits: list[Tensor]
) -> None:
    """By confident rows, too, whose targets p - G / w look like labels for any w."""
    recogniser = Recogniser(terminal)
    z, y = logits(0.0)
    recogniser(z, gradient(z, y), -1, SAMPLES)
    z, y = logits(confidence)
    cost = recogniser(z, gradient(z, y, scale), -1, SAMPLES)
    assert len(fits) == 2
    if cost is not None:  # "auto" may have to wait for clearer rows
        torch.testing.assert_close(
            cost.w, torch.full((SAMPLES,), scale / SAMPLES), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("terminal", ["auto", "cross_entropy"])
def test_other_loss_of_confident_rows_is_noticed(terminal: str, fits: list[Tensor]) -> None:
    """A focal loss, of which confident rows show next to nothing."""
    recogniser = Recogniser(terminal)
    z, y = logits(0.0)
    recogniser(z, gradient(z, y), -1, SAMPLES)
    z, y = logits(12.0)
    z.requires_grad_()
    log_p = z.log_softmax(-1).gather(1, y[:, None])[:, 0]
    (G,) = torch.autograd.grad(-((1 - log_p.exp()) ** 0.1 * log_p).mean(), z)
    recogniser(z.detach(), G, -1, SAMPLES)
    assert len(fits) == 2


def test_class_weights_are_fitted_every_time(fits: list[Tensor]) -> None:
    """No one w is known of them."""
    recogniser = Recogniser("cross_entropy")
    weight = torch.linspace(0.5, 2.0, CLASSES)
    for count in (1, 2):
        z, y = logits(0.0)
        z.requires_grad_()
        (G,) = torch.autograd.grad(F.cross_entropy(z, y, weight), z)
        cost = recogniser(z.detach(), G, -1, SAMPLES)
        assert len(fits) == count and cost is not None
        torch.testing.assert_close(cost.w, weight[y] / weight[y].sum())
