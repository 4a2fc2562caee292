# SPDX-License-Identifier: MIT
"""On a GPU: the same steps as on the CPU. Skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ddpnopt
from ddpnopt.experiments.models import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NETS = {
    "mlp-20x4-tanh": (64,),
    "cnn-8": (1, 8, 8),
    "resnet-8x2-gn": (1, 8, 8),
    "resnet-8x1-bn": (1, 8, 8),
    "encoder-16x1": (1, 8, 8),
    "gru-16": (1, 8, 8),
    "inception-4": (1, 8, 8),
    "text-16x1": (12,),
}
LAYERS = ("identity", "rmsprop", "adamw", "kfac", "ekfac", "low_rank", "Feedback")
RATES = {"rmsprop": 1e-2, "adamw": 1e-2}


def _optimizer(name: str, model: nn.Module, feedback: bool | str) -> torch.optim.Optimizer:
    if name == "Feedback":
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return ddpnopt.Feedback(model, inner, feedback=feedback)
    if name == "low_rank":
        return ddpnopt.DDPNOpt(model, lr=0.1, value="low_rank", feedback=feedback)
    lr = RATES.get(name, 0.3)
    return ddpnopt.DDPNOpt(model, lr=lr, curvature=name, feedback=feedback)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("architecture", NETS)
@pytest.mark.filterwarnings("ignore:each sample is weighted once")
def test_five_steps_equal_the_cpus(architecture: str, name: str, feedback: bool | str) -> None:
    shape = NETS[architecture]
    torch.manual_seed(0)
    model = build_model(architecture, shape, 4).double()
    text = architecture.startswith("text")
    x = torch.randint(28, (16, *shape)) if text else torch.randn(16, *shape).double()
    y = torch.randint(4, (16,))
    found = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        optimizer = _optimizer(name, twin, feedback)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(x.to(device)), y.to(device)).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().cpu().flatten() for p in twin.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-8)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((found[0] - start).abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler_train(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build_model("cnn-8", (1, 8, 8), 4).cuda()
    optimizer, scaler = ddpnopt.DDPNOpt(model, lr=0.1), torch.amp.GradScaler()
    x, y = torch.randn(16, 1, 8, 8, device="cuda"), torch.randint(4, (16,), device="cuda")
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert optimizer.last_step is not None and optimizer.last_step.depth == "closed_loop"
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.3},
        {"lr": 0.3, "feedback": "open_loop"},
        {"lr": 0.3, "weight_gradients": False},
        {"lr": 1e-2, "curvature": "adamw"},
        {"lr": 0.3, "value": "low_rank"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())),
)
@pytest.mark.parametrize("architecture", ["mlp-20x4-tanh", "cnn-8", "resnet-8x1-bn"])
@pytest.mark.filterwarnings("ignore:each sample is weighted once")
def test_a_cuda_graph_is_the_code(
    architecture: str, options: dict[str, Any], compiled: bool
) -> None:
    if compiled and architecture != "mlp-20x4-tanh":
        pytest.skip("compiling takes half a minute each")
    shape = NETS[architecture]
    torch.manual_seed(0)
    net = build_model(architecture, shape, 4).double().cuda()
    twin = copy.deepcopy(net)
    opt, other = ddpnopt.DDPNOpt(net, **options), ddpnopt.DDPNOpt(twin, **options)
    step = ddpnopt.capture(
        other, lambda x, y: nn.functional.cross_entropy(twin(x), y), compile=compiled
    )
    for _ in range(20):
        x, y = torch.randn(16, *shape).double().cuda(), torch.randint(4, (16,)).cuda()
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        torch.testing.assert_close(step(x, y), loss.detach(), rtol=1e-8, atol=1e-10)
        for group in (*opt.param_groups, *other.param_groups):
            group["lr"] *= 0.95
    assert step.reason == ""
    assert step.replayed > 0
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)
