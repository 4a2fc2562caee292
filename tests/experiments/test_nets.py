# SPDX-License-Identifier: MIT
"""Networks that are no chains: what they compute, and that the library trains them as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from ddpnopt import DDPNOpt
from ddpnopt.experiments.models import build_model, wants_images
from ddpnopt.experiments.nets import (
    VAE,
    LanguageModel,
    Recurrent,
    SelfAttention,
    Transformer,
    negative_elbo,
    resnet18,
    resnet20,
    resnet50,
)
from ddpnopt.experiments.tasks import ALPHABET, TASKS, binary_digits, encode, graphs, text

Loss = Callable[[Any, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def images(*shape: int) -> tuple[Tensor, Tensor, int, Loss]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator)
    return x, torch.randint(10, (4,), generator=generator), 10, cross_entropy


def task(name: str, count: int = 4) -> tuple[Tensor, Tensor, int, Loss]:
    made = TASKS[name](count, 0)
    return made.x, made.y, made.classes, negative_elbo if made.x is made.y else cross_entropy


SMALL, COLOUR = (1, 8, 8), (3, 16, 16)
CASES: dict[str, Callable[[], tuple[Tensor, Tensor, int, Loss]]] = {
    "resnet20-4-gn": lambda: images(*COLOUR),
    "resnet20-4s2-bn": lambda: images(*COLOUR),
    "resnet20-4-none": lambda: images(*COLOUR),
    "resnet18-4-bn": lambda: images(3, 32, 32),
    "resnet18-4-gn": lambda: images(3, 32, 32),
    "resnet50-4-bn": lambda: images(3, 32, 32),
    "resnet50-4-gn": lambda: images(3, 32, 32),
    "inception-4": lambda: images(*SMALL),
    "densenet-4": lambda: images(*SMALL),
    "transformer-16x2": lambda: images(*SMALL),
    "encoder-16x2": lambda: images(*SMALL),
    "gru-16": lambda: images(*SMALL),
    "lstm-16": lambda: images(*SMALL),
    "gpt-16x2": lambda: task("grammar"),
    "graphnet-8": lambda: task("graphs", 8),
    "vae-16": lambda: task("digits-binary", 8),
}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(name: str, feedback: bool | str) -> tuple[Tensor, list[float], list[str]]:
    """Weights after three steps, their losses, and the warnings."""
    x, y, classes, loss_of = CASES[name]()
    torch.manual_seed(0)
    model = build_model(name, tuple(x.shape[1:]), classes)
    optimizer = DDPNOpt(model, lr=0.1, feedback=feedback)
    losses: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return weights(model), losses, [str(w.message) for w in caught]


@pytest.mark.parametrize("name", list(CASES))
def test_every_network_trains_with_feedback(name: str) -> None:
    plain, _, _ = trained(name, False)
    for feedback in (True, "open_loop"):
        found, losses, said = trained(name, feedback)
        assert torch.isfinite(found).all() and all(map(torch.isfinite, map(torch.tensor, losses)))
        assert (found - plain).abs().max() > 1e-5
        # Behind BatchNorm samples are weighted once, and that is said; else nothing is.
        if name.endswith("-bn"):
            assert all("weighted once" in text for text in said)
        else:
            assert not said, said


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_hugging_face_models_train_unmodified(kind: str) -> None:
    transformers = pytest.importorskip("transformers")

    def made() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        tokens = torch.randint(50, (4, 7))
        if kind == "bert":
            config = transformers.BertConfig(
                vocab_size=50,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
                num_labels=3,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            model = transformers.BertForSequenceClassification(config)
            given = {"input_ids": tokens, "labels": torch.tensor([0, 1, 2, 0])}
        else:
            config = transformers.GPT2Config(
                vocab_size=50,
                n_positions=16,
                n_embd=16,
                n_layer=2,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
            model = transformers.GPT2LMHeadModel(config)
            given = {"input_ids": tokens, "labels": tokens}
        return model.train(), given

    def steps(feedback: bool | str) -> Tensor:
        model, given = made()
        # GPT-2 begins with nearly equal logits, at which the loss is nearly linear.
        optimizer = DDPNOpt(model, lr=0.3 if kind == "bert" else 3.0, feedback=feedback)
        for _ in range(2):
            optimizer.zero_grad()
            model(**given).loss.backward()
            optimizer.step()
        if feedback:
            assert optimizer.last_step is not None
            assert optimizer.last_step.terminal == "cross_entropy"
        return weights(model)

    plain, opened, closed = steps(False), steps("open_loop"), steps(True)
    for found in (opened, closed):
        assert torch.isfinite(found).all() and (found - plain).abs().max() > 1e-5
    assert not torch.equal(opened, closed)


@pytest.mark.parametrize(
    ("build", "count"), [(resnet20, 272_474), (resnet18, 11_689_512), (resnet50, 25_557_032)]
)
def test_resnets_have_the_published_numbers_of_parameters(
    build: Callable[[], nn.Module], count: int
) -> None:
    # He et al. with projections for ResNet-20; torchvision's for the other two.
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def test_own_attention_is_torchs() -> None:
    own, torchs = SelfAttention(8, 2).double(), nn.MultiheadAttention(8, 2, batch_first=True)
    torchs = torchs.double()
    with torch.no_grad():
        torchs.in_proj_weight.copy_(own.queries_keys_values.weight)
        torchs.in_proj_bias.copy_(own.queries_keys_values.bias)
    torchs.out_proj.load_state_dict(own.out.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(own(x), torchs(x, x, x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feedback", [True, "open_loop"])
@pytest.mark.parametrize("samples", [3, 8, 16])
def test_both_attentions_get_the_same_feedback(samples: int, feedback: bool | str) -> None:
    """One function as two module trees: rows by place or by sample, 8 tokens in both."""
    torch.manual_seed(0)
    own = Transformer((1, 8, 8), 10, 16, 1, own=True).double()
    torchs = Transformer((1, 8, 8), 10, 16, 1).double()
    place = "blocks.0.attention."
    names = {
        f"{place}{ours}.{kind}": f"{place}{theirs}{kind}"
        for ours, theirs in (("queries_keys_values", "in_proj_"), ("out", "out_proj."))
        for kind in ("weight", "bias")
    }
    torchs.load_state_dict({names.get(k, k): v for k, v in own.state_dict().items()})
    before = own.state_dict()["blocks.0.dense.0.weight"].clone()
    x = torch.randn(samples, 1, 8, 8, dtype=torch.float64)
    y = torch.randint(10, (samples,))
    for model in (own, torchs):
        optimizer = DDPNOpt(model, lr=1.0, feedback=feedback)
        cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not torch.equal(before, own.state_dict()["blocks.0.dense.0.weight"])
    found = torchs.state_dict()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(found[names.get(name, name)], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lstm", [False, True])
def test_unrolled_cells_are_torchs_recurrent_layers(lstm: bool) -> None:
    model = Recurrent(features=8, classes=3, width=6, lstm=lstm).double()
    fused = (nn.LSTM if lstm else nn.GRU)(8, 6, batch_first=True).double()
    for name, value in model.cell.named_parameters():
        getattr(fused, f"{name}_l0").data.copy_(value.data)
    x = torch.randn(4, 1, 5, 8, dtype=torch.float64)
    expected = model.head(fused(x[:, 0])[0][:, -1])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_language_model_sees_no_later_token_and_ties_its_head() -> None:
    model = LanguageModel(len(ALPHABET), 12, width=8, blocks=2)
    tokens = torch.randint(len(ALPHABET), (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % len(ALPHABET)
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])
    assert model.head.weight is model.embed.weight


def test_the_elbo_is_that_of_torchs_distributions() -> None:
    x = binary_digits(6, 0).x.double()
    outputs = VAE(64, 16, 3).double()(x)
    logits, mean, log_variance = outputs
    code = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(code, Normal(torch.zeros(3), torch.ones(3))).sum(1)
    expected = expected - Bernoulli(logits=logits).log_prob(x).sum(1)
    torch.testing.assert_close(negative_elbo(outputs, x), expected.mean())


def test_generated_text_agrees_in_number_and_follows_the_seed() -> None:
    written = text(20_000, seed=3)
    assert len(written) == 20_000 and set(written) <= set(ALPHABET)
    assert written == text(20_000, seed=3) != text(20_000, seed=4)
    assert torch.equal(encode("ab. "), torch.tensor([1, 2, ALPHABET.index("."), 0]))
    for sentence in written.split(". ")[:-1]:
        first, *rest = sentence.split()
        # "a dog sees", "the dogs see": a singular article and a plural noun never meet.
        if first in ("a", "an", "every"):
            noun = rest[0] if rest[0] not in ("old", "small", "quiet", "green") else rest[1]
            assert noun in ("lonely", "bright") or not noun.endswith(("s", "ren")), sentence
        assert (first != "a" or rest[0][0] not in "aeiou") and " a a" not in sentence


def test_graphs_are_undirected_and_their_classes_differ() -> None:
    made = graphs(200, seed=0)
    adjacency = made.x[..., :16]
    assert torch.equal(adjacency, adjacency.transpose(1, 2))
    assert not adjacency.diagonal(dim1=1, dim2=2).any() and bool((made.x[..., 16] == 1).all())
    spread = torch.stack([adjacency[made.y == k].sum(1).std(1).mean() for k in range(4)])
    # A rewired ring has nearly equal degrees, attachment by degree has hubs.
    assert spread.argmin() == 1 and spread.argmax() == 2
    assert torch.equal(graphs(200, seed=0).x, made.x)


def test_names_say_what_takes_images() -> None:
    assert all(wants_images(name) for name in CASES if CASES[name]()[0].dim() == 4)
    assert not any(wants_images(name) for name in ("gpt-16x2", "vae-16", "graphnet-8", "mlp"))
    for wrong in ("resnet20-8", "inception-0", "gpt-8", "resnet18-8-ln"):
        with pytest.raises(ValueError, match="unknown architecture"):
            build_model(wrong, SMALL, 10)
    with pytest.raises(ValueError, match="inception needs images"):
        build_model("inception-8", (64,), 10)
