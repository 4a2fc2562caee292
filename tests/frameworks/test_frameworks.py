# SPDX-License-Identifier: MIT
"""One line after the optimizer's construction, in frameworks that own the training loop.

Each framework is compared with a plain loop of torch on the same batches: without re-weighting
where all coefficients are 1, to the last bit, and with `open_loop` in it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ddpnopt import open_loop

LR, CLIP, SIZE, BATCHES, EPOCHS = 0.05, 0.5, 8, 4, 2
pytestmark = pytest.mark.filterwarnings("ignore")


def ones(z: torch.Tensor) -> torch.Tensor:
    """A loss without curvature: every coefficient is 1."""
    return z.new_zeros(*z.shape, 1)


#: What `open_loop` is told about the loss; None: it is not there.
CASES = [pytest.param(ones, None, id="ones"), pytest.param("auto", "auto", id="robust")]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(*layers).double()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(SIZE * BATCHES, 6, generator=generator).double()
    return TensorDataset(x, torch.randint(4, (len(x),), generator=generator))


def batches() -> Iterator[list[torch.Tensor]]:
    for _ in range(EPOCHS):
        yield from DataLoader(data(), SIZE)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loop(
    terminal: Any, passes: int = 1, clip: float | None = None, model: nn.Module | None = None
) -> torch.Tensor:
    """Torch's own loop, as its documentation has it."""
    model = network() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    if terminal is not None:
        open_loop(model, optimizer, terminal=terminal)
    for number, (x, y) in enumerate(batches(), 1):
        (F.cross_entropy(model(x), y) / passes).backward()
        if number % passes:
            continue
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_the_reweighting_shows() -> None:
    """Otherwise nothing below tells anything."""
    assert (plain_loop(None) - plain_loop("auto")).abs().max() > 1e-2
    assert torch.equal(plain_loop(None), plain_loop(ones))


@pytest.mark.parametrize("passes, clip", [(1, None), (2, CLIP)])
@pytest.mark.parametrize("terminal, oracle", CASES)
def test_lightning(terminal: Any, oracle: Any, passes: int, clip: float | None) -> None:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, given: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.net(given[0]), given[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(self.parameters(), LR)
            open_loop(self, optimizer, terminal=terminal)
            return optimizer

    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=clip,
        accumulate_grad_batches=passes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data(), SIZE))
    assert torch.equal(weights(model), plain_loop(oracle, passes, clip))


@pytest.mark.parametrize("passes, clip", [(1, None), (2, CLIP)])
@pytest.mark.parametrize("terminal, oracle", CASES)
def test_accelerate(terminal: Any, oracle: Any, passes: int, clip: float | None) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    open_loop(model, optimizer, terminal=terminal)
    loader = DataLoader(data(), SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    assert torch.equal(weights(model), plain_loop(oracle, passes, clip))


@pytest.mark.parametrize("terminal, oracle", CASES)
def test_skorch(terminal: Any, oracle: Any) -> None:
    skorch = pytest.importorskip("skorch")

    class Robust(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            super().initialize_optimizer(*args, **kwargs)
            open_loop(self.module_, self.optimizer_, terminal=terminal)
            return self

    net = Robust(
        network(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        lr=LR,
        batch_size=SIZE,
        max_epochs=EPOCHS,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    )
    x, y = data().tensors
    net.fit(x.numpy(), y.numpy())
    assert torch.equal(weights(net.module_), plain_loop(oracle))


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).train()


def sentences() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(20, (SIZE * BATCHES, 6), generator=generator)
    labels = torch.randint(3, (len(words),), generator=generator)
    pairs = zip(words, labels, strict=True)
    return [{"input_ids": one, "labels": label} for one, label in pairs]


def bert_loop(terminal: Any, passes: int) -> torch.Tensor:
    """The Trainer's defaults by hand: clipping at 1, the mean over the accumulated passes."""
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    if terminal is not None:
        open_loop(model, optimizer, terminal=terminal)
    for number, given in enumerate(DataLoader(sentences(), SIZE), 1):
        (model(**given).loss / passes).backward()
        if number % passes == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("passes, recomputed", [(1, False), (2, True)])
@pytest.mark.parametrize("terminal, oracle", CASES)
def test_trainer(terminal: Any, oracle: Any, passes: int, recomputed: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(sentences(), SIZE)

    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    open_loop(model, optimizer, terminal=terminal)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=recomputed,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = InOrder(model, arguments, train_dataset=sentences(), optimizers=(optimizer, constant))
    # BERT's own loss is a mean over the pass, whatever arguments it takes.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    expected = bert_loop(oracle, passes)
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=2e-6)
    assert (expected - bert_loop(None, passes)).abs().max() > 1e-4 or oracle is None


class Recomputed(nn.Module):
    """The same chain, its middle recomputed in the backward pass."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.net[:2], x, use_reentrant=False)
        return self.net[4](checkpoint(self.net[2:4], x, use_reentrant=False))


@pytest.mark.parametrize("terminal", ["auto", ones])
def test_activation_checkpointing(terminal: Any) -> None:
    recomputed = plain_loop(terminal, model=Recomputed(network()))
    assert torch.equal(recomputed, plain_loop(terminal))


@pytest.mark.parametrize("terminal, oracle", CASES)
def test_grad_scaler(terminal: Any, oracle: Any) -> None:
    """The first step knows the scale, too, as every later one does from the step before."""
    model, scale = network(), 2.0**10
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    open_loop(model, optimizer, terminal=terminal)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(weights(model), plain_loop(oracle), rtol=0, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 2.0**5, 2.0**16, 3000.0])
def test_the_first_step_knows_the_scale(reduction: str, passes: int, scale: float) -> None:
    """A scaler multiplies the loss; what it will be divided by again is no part of the loss."""

    def first(scaled: bool) -> torch.Tensor:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.5 if reduction == "mean" else 0.02)
        open_loop(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)
        for x, y in list(batches())[:passes]:
            loss = F.cross_entropy(model(x), y, reduction=reduction) / passes
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        return weights(model)

    # What is no power of two the scaler inverts in float32.
    tolerance = 1e-10 if scale != 3000 else 1e-7
    torch.testing.assert_close(first(True), first(False), rtol=0, atol=tolerance)


def test_a_scaler_that_has_nothing_to_do_with_it() -> None:
    """One that lives on from another training changes nothing."""
    expected = plain_loop("auto")
    other = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    other.scale(torch.zeros(()))
    assert torch.equal(plain_loop("auto"), expected)
