# SPDX-License-Identifier: MIT
"""Every optimizer and every other part of a training resumes to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpnopt import VanillaDDP
from ddpnopt.experiments.optimizers import OPTIMIZERS
from experiments.train_program import SMALL, check_resume

pytestmark = pytest.mark.filterwarnings("ignore::ddpnopt.errors.DDPNOptWarning")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    if name.startswith("dadapt"):
        pytest.importorskip("dadaptation")
    lr = 0.01 if "adam" in name else 0.05
    check_resume(SMALL.model_copy(update={"optimizer": name, "lr": lr}), tmp_path)


OTHERS: dict[str, dict[str, Any]] = {
    "buffers of BatchNorm": {"architecture": "mlp-8x2-relu-bn", "optimizer": "ddpnopt-rmsprop"},
    "sketched Gram, cosine": {
        "architecture": "cnn-4",
        "options": {"gram": "sketch"},
        "schedule": "cosine",
    },
    "curvature older than a checkpoint, one cycle": {
        "optimizer": "ddpnopt-ekfac",
        "options": {"curvature.update_every": 5},
        "schedule": "one-cycle",
    },
    "momentum, no weight gradients, linear": {
        "options": {"weight_gradients": False, "momentum": 0.9},
        "schedule": "linear",
    },
    "feedback around Adam, cosine": {"optimizer": "feedback-adam", "schedule": "cosine"},
    "clipping, norms of updates": {
        "options": {"grad_clip": 0.1, "feedback": "open_loop"},
        "record_updates": True,
    },
    "MMC": {"loss": "mmc", "lr": 0.01},
    "random numbers in the forward pass": {
        "dataset": "digits-binary",
        "architecture": "vae-8",
        "loss": "elbo",
        "lr": 1e-3,
    },
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_parts_resume_to_the_bit(case: str, tmp_path: Path) -> None:
    update = {"dataset": "digits", "train_samples": 142, "test_samples": 40} | OTHERS[case]
    check_resume(SMALL.model_copy(update=update), tmp_path)


def test_vanilla_ddp_keeps_what_its_search_found() -> None:
    def made() -> tuple[nn.Sequential, VanillaDDP]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        return model, VanillaDDP(model, lr=0.1)

    def step(model: nn.Module, opt: VanillaDDP, y: torch.Tensor) -> None:
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()

    x = torch.randn(6, 4)
    model, opt = made()
    step(model, opt, torch.tensor([0, 1, 2, 0, 1, 2]))
    opt._search.alpha, opt._search.rejected = 0.25, 3
    with torch.no_grad():
        # So sure of all samples that the gradient shows no loss any more.
        model[2].weight.mul_(1e4)
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    assert (resumed.alpha, resumed.rejected) == (0.25, 3)
    assert resumed.engine.outputs.main.terminal == "cross_entropy"
    sure = model(x).argmax(1)
    step(model, opt, sure)
    step(other, resumed, sure)
    assert (resumed.alpha, resumed.rejected) == (opt.alpha, opt.rejected)
    broken = resumed.state_dict()
    del broken["ddpnopt"]["search"]
    with pytest.raises(ValueError, match="no 'search'"):
        resumed.load_state_dict(broken)
