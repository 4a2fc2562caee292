# SPDX-License-Identifier: MIT
"""The closed loop in Accelerate, transformers' Trainer, skorch and Ignite, all unmodified.

Each is compared with the plain loop of torch on the same batches: weights and accuracy on digits.
"""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt, Feedback
from frameworks.digits import SIZE, accuracy, digits, network, plain_loop, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LEARNT = 0.7


def ddpnopt(model: nn.Module) -> DDPNOpt:
    return DDPNOpt(model, lr=0.5, momentum=0.5)


def from_parameters(model: nn.Module) -> DDPNOpt:
    return DDPNOpt(model.parameters(), lr=0.5, momentum=0.5)


def around_adamw(model: nn.Module) -> Feedback:
    return Feedback(model, torch.optim.AdamW(model.parameters(), 1e-2))


MAKERS = {
    "DDPNOpt(model)": (ddpnopt, ddpnopt),
    "DDPNOpt(params)": (from_parameters, ddpnopt),
    "Feedback": (around_adamw, around_adamw),
}


def same(model: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-6)
    assert accuracy(model) == accuracy(expected) > LEARNT


# Accelerate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes, clip", [(1, None), (2, 2.0)])
@pytest.mark.parametrize("name", MAKERS)
def test_accelerate(name: str, passes: int, clip: float | None) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
    make, twin = MAKERS[name]
    model = network()
    # prepare() sends the optimizer's state through state_dict and back.
    model, optimizer, loader = accelerator.prepare(
        model, make(model), DataLoader(digits()[0], SIZE)
    )
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    assert optimizer.optimizer.last_step.depth == "closed_loop"
    same(model, plain_loop(twin, passes=passes, clip=clip))


def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def some(loader: Any, model: Any, optimizer: Any) -> None:
        for x, y in loader:
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()

    model = network()
    parts = accelerator.prepare(DataLoader(digits()[0], SIZE), model, from_parameters(model))
    some(*parts)
    accelerator.save_state(str(tmp_path))
    some(*parts)
    straight = weights(parts[1])
    other = network()
    accelerator._models.clear()
    accelerator._optimizers.clear()
    accelerator._dataloaders.clear()
    again = accelerator.prepare(DataLoader(digits()[0], SIZE), other, from_parameters(other))
    accelerator.load_state(str(tmp_path))
    some(*again)
    assert torch.equal(weights(again[1]), straight)


# skorch -----------------------------------------------------------------------------------------


def classifier(**options: Any) -> Any:
    skorch = pytest.importorskip("skorch")
    settings = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": DDPNOpt,
        "optimizer__momentum": 0.5,
        "lr": 0.5,
        "batch_size": SIZE,
        "max_epochs": 2,
        "train_split": None,
        "iterator_train__shuffle": False,
        "verbose": 0,
    }
    return skorch.NeuralNetClassifier(network, **{**settings, **options})


def arrays() -> tuple[np.ndarray, np.ndarray]:
    x, y = digits()[0].tensors
    return x.numpy(), y.numpy()


def test_skorch_constructs_the_class() -> None:
    net = classifier().fit(*arrays())
    assert net.optimizer_.last_step.depth == "closed_loop"
    same(net.module_, plain_loop(ddpnopt))
    x, y = (t.numpy() for t in digits()[1].tensors)
    assert net.score(x, y) == pytest.approx(accuracy(net.module_))


def test_skorch_pickles_a_net_that_goes_on() -> None:
    net = classifier().fit(*arrays())
    copied = pickle.loads(pickle.dumps(net))
    for one in (net, copied):
        one.partial_fit(*arrays())
    assert torch.equal(weights(net.module_), weights(copied.module_))
    same(copied.module_, plain_loop(ddpnopt, epochs=4))


def test_skorch_searches_a_grid() -> None:
    from sklearn.model_selection import GridSearchCV

    grid = {"lr": [0.01, 0.5], "optimizer__curvature": ["identity"]}
    search = GridSearchCV(classifier(max_epochs=1), grid, cv=2, refit=False)
    assert search.fit(*arrays()).best_params_["lr"] == 0.5


def test_skorch_with_parameter_groups_and_checkpoints(tmp_path: Path) -> None:
    callbacks = pytest.importorskip("skorch.callbacks")
    kept = callbacks.Checkpoint(dirname=str(tmp_path), monitor=None)
    groups = [("0.*", {"lr": 0.1})]
    options = {"optimizer__param_groups": groups, "callbacks": [kept]}
    net = classifier(**options).fit(*arrays())
    assert sorted(group["lr"] for group in net.optimizer_.param_groups) == [0.1, 0.5]
    other = classifier(**options).initialize()
    other.load_params(checkpoint=kept)
    for one in (net, other):
        one.partial_fit(*arrays())
    assert torch.equal(weights(net.module_), weights(other.module_))


# Ignite -----------------------------------------------------------------------------------------


def test_ignite() -> None:
    engine = pytest.importorskip("ignite.engine")
    model = network()
    trainer = engine.create_supervised_trainer(model, ddpnopt(model), nn.CrossEntropyLoss())
    trainer.run(DataLoader(digits()[0], SIZE), max_epochs=2)
    same(model, plain_loop(ddpnopt))


# transformers -----------------------------------------------------------------------------------


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).train().double()


def sentences(first: int, last: int) -> list[dict[str, torch.Tensor]]:
    """The digits 0, 1 and 2 as sentences of 16 words: every other pixel of every other row."""
    x, y = (torch.cat([part.tensors[i] for part in digits()]) for i in (0, 1))
    chosen = slice(first, last)
    x, y = x[y < 3][chosen], y[y < 3][chosen]
    words = (8 * x + 8).long().view(-1, 8, 8)[:, ::2, 1::2].reshape(-1, 16)
    return [{"input_ids": one, "labels": label} for one, label in zip(words, y, strict=True)]


LEARN, BATCH, EPOCHS = 384, 64, 3
BERT = {"lr": 2e-2, "curvature": "adamw"}


def right(model: Any) -> float:
    given = next(iter(DataLoader(sentences(LEARN, 537), 537)))
    with torch.no_grad():
        found = model.eval()(given["input_ids"]).logits.argmax(1)
    return float((found == given["labels"]).double().mean())


@cache
def bert_loop(passes: int) -> Any:
    """The Trainer's defaults by hand: clipping at 1, the mean over the accumulated passes."""
    model = bert()
    optimizer = DDPNOpt(model, **BERT)
    for number, given in enumerate(list(DataLoader(sentences(0, LEARN), BATCH)) * EPOCHS, 1):
        (model(**given).loss / passes).backward()
        if number % passes:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def hugging_face(folder: Path, model: Any, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(sentences(0, LEARN), BATCH)

    made = {key: options.pop(key) for key in list(options) if key.startswith("optimizer")}
    settings = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "weight_decay": 0.0,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    trainer = InOrder(model, arguments, train_dataset=sentences(0, LEARN), **made)
    # BERT's own loss is a mean over the pass, whatever arguments it takes.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def given_object(model: Any) -> dict[str, Any]:
    optimizer = DDPNOpt(model, **BERT)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return {"optimizers": (optimizer, constant)}


def given_class(model: Any) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (DDPNOpt, dict(BERT))}


@pytest.mark.parametrize(
    "given, passes, recomputed",
    [(given_object, 1, False), (given_object, 2, True)] + [(given_class, 1, False)],
)
def test_trainer(given: Any, passes: int, recomputed: bool, tmp_path: Path) -> None:
    model = bert()
    options = {"gradient_accumulation_steps": passes, "gradient_checkpointing": recomputed}
    trainer = hugging_face(tmp_path, model, **options, **given(model))
    trainer.train()
    expected = bert_loop(passes)
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-9)
    assert right(model) == right(expected) > LEARNT


@pytest.mark.parametrize("given", [given_object, given_class])
def test_trainer_resumes(given: Any, tmp_path: Path) -> None:
    straight = bert()
    hugging_face(tmp_path / "straight", straight, **given(straight)).train()
    half = bert()
    saved = {"save_strategy": "steps", "save_steps": 6, "max_steps": 6}
    hugging_face(tmp_path / "half", half, **saved, **given(half)).train()
    resumed = bert()
    trainer = hugging_face(tmp_path / "half", resumed, **given(resumed))
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=1e-9)
    assert (weights(half) - weights(straight)).abs().max() > 1e-3
