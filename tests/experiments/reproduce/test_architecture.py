# SPDX-License-Identifier: MIT
"""The paper's convolutional network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddpnopt.experiments.models import build_model, wants_images


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_conv4_has_four_convolutions_of_32_channels_and_two_dense_layers(shape) -> None:
    model = build_model("conv4-32", shape, 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32] * 4
    assert all(c.kernel_size == (3, 3) for c in convolutions)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 2
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    assert wants_images("conv4-32")


def test_conv4_refuses_flat_inputs_and_odd_sides() -> None:
    for shape in ((13,), (1, 30, 28)):
        with pytest.raises(ValueError, match="divisible by 4"):
            build_model("conv4-32", shape, 10)
