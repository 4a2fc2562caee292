# SPDX-License-Identifier: MIT
"""The closed loop in PyTorch Lightning, unmodified: the plain loop's weights, batch for batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt, Feedback
from frameworks.digits import SIZE, accuracy, digits, network, plain_loop, weights

lightning = pytest.importorskip("lightning")
# What Lightning itself warns of: few workers, no logger.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def around_adamw(model: nn.Module) -> Feedback:
    return Feedback(model, torch.optim.AdamW(model.parameters(), 1e-2))


def ddpnopt(model: Any) -> DDPNOpt:
    return DDPNOpt(model, lr=0.5, momentum=0.5)


class Classifier(lightning.LightningModule):
    def __init__(self, make: Any, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.make = make

    def training_step(self, given: Any, _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(given[0]), given[1])

    def configure_optimizers(self) -> Any:
        return self.make(self)


def trainer(folder: Path, epochs: int = 2, **options: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )


def fitted(make: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    module = Classifier(make)
    with torch.random.fork_rng():
        trainer(folder, **options).fit(module, DataLoader(digits(dtype)[0], SIZE))
    assert module.optimizers(use_pl_optimizer=False).last_step.depth == "closed_loop"
    return module.net


#: How the module builds its optimizer, and the plain loop's.
MAKERS = {
    "DDPNOpt(self)": (ddpnopt, ddpnopt),
    "DDPNOpt(self.net)": (lambda module: ddpnopt(module.net), ddpnopt),
    "DDPNOpt(self.parameters())": (lambda module: ddpnopt(module.parameters()), ddpnopt),
    "Feedback(self, AdamW)": (around_adamw, around_adamw),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("passes, clip", [(1, None), (2, 2.0)])
def test_fit_is_the_plain_loop(name: str, passes: int, clip: float | None, tmp_path: Path) -> None:
    make, twin = MAKERS[name]
    options = {"accumulate_grad_batches": passes, "gradient_clip_val": clip}
    net = fitted(make, tmp_path, **options)
    expected = plain_loop(twin, passes=passes, clip=clip)
    torch.testing.assert_close(weights(net), weights(expected), rtol=0, atol=1e-6)
    assert accuracy(net) == accuracy(expected) > 0.7


def test_precision_64_true(tmp_path: Path) -> None:
    net = fitted(ddpnopt, tmp_path, dtype=torch.float64, precision="64-true", epochs=1)
    expected = plain_loop(ddpnopt, epochs=1, dtype=torch.float64, model=network().double())
    torch.testing.assert_close(weights(net), weights(expected), rtol=0, atol=1e-12)


def test_precision_bf16_mixed(tmp_path: Path) -> None:
    net = fitted(ddpnopt, tmp_path, precision="bf16-mixed", epochs=1)
    expected = plain_loop(ddpnopt, epochs=1, autocast=True)
    torch.testing.assert_close(weights(net), weights(expected), rtol=0, atol=1e-6)
    assert (weights(net) - weights(plain_loop(ddpnopt, epochs=1))).abs().max() > 1e-5
    assert abs(accuracy(net) - accuracy(expected)) < 1e-6


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    make, _ = MAKERS[name]
    loader = DataLoader(digits()[0], 2 * SIZE)
    straight, first, second = Classifier(make), Classifier(make), Classifier(make)
    trainer(tmp_path).fit(straight, loader)
    half = trainer(tmp_path, epochs=1)
    half.fit(first, loader)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path).fit(second, loader, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(straight.net), weights(second.net))
    assert not torch.equal(weights(straight.net), weights(first.net))


def test_schedulers_of_lightning(tmp_path: Path) -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = ddpnopt(self)
            one = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one, "interval": "step"}}

    module = Scheduled(None)
    trainer(tmp_path, epochs=1).fit(module, DataLoader(digits()[0], SIZE))
    twin = network()
    optimizer = ddpnopt(twin)
    one = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=20)
    for x, y in DataLoader(digits()[0], SIZE):
        optimizer.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        optimizer.step()
        one.step()
    torch.testing.assert_close(weights(module.net), weights(twin), rtol=0, atol=1e-6)


def test_parts_called_one_by_one_are_refused_by_name(tmp_path: Path) -> None:
    """No single call owns the layers: the module needs a forward of its own."""

    class Parts(Classifier):
        def training_step(self, given: Any, _: int) -> torch.Tensor:
            hidden = self.net[:2](given[0])
            return F.cross_entropy(self.net[2:](hidden), given[1])

    loader = DataLoader(digits()[0], SIZE)
    with pytest.raises(RuntimeError, match=r"'net\.0'.*call one module"):
        trainer(tmp_path).fit(Parts(ddpnopt), loader)
    with pytest.raises(RuntimeError, match="no forward pass was seen of a module that owns"):
        trainer(tmp_path).fit(Parts(lambda module: ddpnopt(module.parameters())), loader)
