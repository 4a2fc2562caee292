# SPDX-License-Identifier: MIT
"""Sums of the products of a convolution's patches, against the patches themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt.layers import MatrixRule, conv, patches, rule_for
from ddpnopt.testing import Operations

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def by_patches(module: Any, x: Tensor, bias: bool) -> Tensor:
    rule = rule_for(module)
    assert isinstance(rule, MatrixRule)
    U = rule.inputs(module, x, len(x))
    if bias:
        U = torch.cat([U, torch.ones_like(U[..., :1])], -1)
    return torch.einsum("bgti,bgtj->gij", U, U)


@settings(max_examples=150, deadline=None)
@given(
    axes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    ),
    groups=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "replicate"]),
    bias=st.booleans(),
    at_once=st.sampled_from([1, 200, 2**21]),
    seed=st.integers(0, 99),
)
def test_sums_of_all_shapes(
    axes: list[tuple[int, int, int, int]],
    groups: int,
    mode: str,
    bias: bool,
    at_once: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kernel, dilation, stride, padding = (list(one) for one in zip(*axes, strict=True))
    stride[0] = 1
    sizes = [d * (k - 1) + 1 + seed % 4 for k, d in zip(kernel, dilation, strict=True)]
    assume(all(p < size for p, size in zip(padding, sizes, strict=True)))
    module: Any = KINDS[len(axes)](
        2 * groups,
        2 * groups,
        tuple(kernel),
        dilation=tuple(dilation),
        stride=tuple(stride),
        padding=tuple(padding),
        padding_mode=mode,
        groups=groups,
    ).double()
    x = torch.randn(3, 2 * groups, *sizes, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "AT_ONCE", at_once)
        found = patches.products(module, conv.padded(module, x), bias)
    torch.testing.assert_close(found, by_patches(module, x, bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_third_of_the_operations(bias: bool) -> None:
    module = nn.Conv2d(4, 3, 3, padding=1)
    x = torch.randn(2, 4, 32, 32)
    rule = rule_for(module)
    assert isinstance(rule, MatrixRule)
    with Operations() as own:
        found = rule.input_products(module, x, 2, bias)
    with Operations() as other:
        expected = MatrixRule.input_products(rule, module, x, 2, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert 0.3 < own.total / other.total < 0.4


def test_small_images_keep_their_patches() -> None:
    module = nn.Conv2d(4, 3, 3, padding=1)
    assert patches.pays(module, torch.randn(2, 4, 34, 34))
    assert not patches.pays(module, torch.randn(2, 4, 4, 34))
    assert not patches.pays(nn.Conv2d(4, 3, (1, 3)), torch.randn(2, 4, 34, 34))
    assert not patches.pays(nn.Conv2d(4, 3, 3, stride=(2, 1)), torch.randn(2, 4, 34, 34))
