# SPDX-License-Identifier: MIT
"""Models as people run them: residual nets written in place, Hugging Face's BERT and GPT-2.

The small ones of BERT and GPT-2 take the steps of the dense recursion on the explicit state, in
float64; the deep ones must have feedback in every layer, and not without effect.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpnopt import DDPNOpt, explain
from ddpnopt.errors import DDPNOptWarning
from ddpnopt.value import LowRank, Moreau
from oracles.common import assert_same, cross_entropy
from oracles.graph import Net, Program
from oracles.graph_cases import inner, problem
from oracles.graph_dense import DenseGraph
from oracles.graph_moreau import MoreauGraph
from oracles.graph_parts import add
from oracles.resnets import group_norm, twins

transformers = pytest.importorskip("transformers")

BATCH = 4


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small ones, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 2, 1])


DEEP = {"18": ((2, 2, 2, 2), 1), "50": ((3, 4, 6, 3), 4)}
NORMS: dict[str, Any] = {"group": group_norm, "batch": nn.BatchNorm2d}


@pytest.mark.filterwarnings("error::ddpnopt.errors.DDPNOptWarning")
@pytest.mark.parametrize("depth", DEEP)
def test_group_norm_has_feedback_everywhere(depth: str) -> None:
    """Explained, unwarned, and the update is another one than without the rollout."""
    model, _ = twins(*DEEP[depth], group_norm)
    x, y = images()
    rows = explain(model, x).rows
    assert [r.name for r in rows if r.treatment != "feedback" or "?" in r.state] == []
    others = [copy.deepcopy(model) for _ in range(2)]
    for net, feedback in zip((model, *others), (True, "open_loop", False), strict=True):
        opt = DDPNOpt(net, lr=0.1, feedback=feedback)
        F.cross_entropy(net(x), y).backward()
        opt.step()
    for name, p in model.named_parameters():
        assert all(not torch.equal(p, dict(o.named_parameters())[name]) for o in others) or (
            name == "conv1.weight"  # nothing lies below: q = 0
        ), name


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [Moreau(), LowRank()])
def test_in_place_is_as_on_copies(depth: str, norm: str, value: object) -> None:
    """What is said, and what is done."""
    said = []
    models = twins(DEEP[depth][0][:2] + (1,), DEEP[depth][1], NORMS[norm])
    x, y = images()
    for net in models:
        opt = DDPNOpt(net, lr=0.1, value=value, gram="exact")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                opt.zero_grad()
                F.cross_entropy(net(x), y).backward()
                opt.step()
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1]
    assert not any("open-loop" in text for text in said[0])
    assert bool(said[0]) == (norm == "batch")
    assert_same(*models, 1e-9)


def heads(x: Tensor, count: int) -> Tensor:
    """(B, T, d) to (B, heads, T, d / heads)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Two heads, written out."""
    q, k, v = (heads(one, 2) for one in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def causal(qkv: Tensor) -> Tensor:
    """Of the three in one tensor."""
    T = qkv.shape[-2]
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    return attended(*qkv.chunk(3, -1), mask)  # type: ignore[arg-type]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All positions."""
    return attended(q, k, v, torch.zeros(q.shape[-2], q.shape[-2], dtype=torch.bool))


def assert_moved_alike(
    reference: Any, layers: Mapping[str, nn.Module], bare: Mapping[str, Tensor]
) -> None:
    """The library's layers, by the oracle's names, have the oracle's weights."""
    reference.assert_equals(SimpleNamespace(layers=layers, bare=bare))


VOCABULARY, T = 5, 2


def gpt2(attention: str) -> Any:
    """One block of width four."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=3, n_embd=4, n_layer=1, n_head=2, n_inner=6,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.5,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def gpt2_oracle(model: Any) -> Net:
    """The same as a list of nodes."""
    body, block = model.transformer, model.transformer.h[0]
    p = Program()
    h = p(add, p("wte", 0), "wpe")
    h = p(add, p("proj", p(causal, p("attn", p("ln1", h)))), h)
    gelu = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
    h = p(add, h, p("out", p(gelu, p("fc", p("ln2", h)))))
    p(lambda z: z.flatten(1), p("head", p("lnf", h)))
    layers = {
        "wte": body.wte, "ln1": block.ln_1, "attn": block.attn.c_attn, "proj": block.attn.c_proj,
        "ln2": block.ln_2, "fc": block.mlp.c_fc, "out": block.mlp.c_proj, "lnf": body.ln_f,
        "head": model.lm_head,
    }  # fmt: skip
    return Net(layers, p, {"wpe": body.wpe.weight.detach()[:T].clone()})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gpt2_is_the_dense_recursion(attention: str) -> None:
    """All tokens' losses; the table of positions, which all samples share, takes the plain step."""
    model = gpt2(attention)
    net = gpt2_oracle(model)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 2, 1]])
    y = tokens[:, 1:].flatten()

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.reshape(-1, VOCABULARY), y)

    def hessian(z: Tensor) -> Tensor:
        p = z.reshape(-1, VOCABULARY).softmax(1)
        blocks = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
        return torch.stack([torch.block_diag(*pair) for pair in blocks.split(T)])

    reference = DenseGraph(copy.deepcopy(net), inner(0.3, "identity"))
    for _ in range(2):
        reference.step([tokens[:, :-1]], loss, hessian)
    opt = DDPNOpt(model, lr=0.3, value=LowRank(), gram="exact")
    with pytest.warns(DDPNOptWarning, match="'transformer.wpe' take.* plain step"):
        for _ in range(2):
            opt.zero_grad()
            loss(model(tokens[:, :-1]).logits).backward()
            opt.step()
    assert_moved_alike(reference, net.layers, {"wpe": model.transformer.wpe.weight[:T]})


def bert() -> Any:
    """One block of width four."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, max_position_embeddings=3, type_vocab_size=2, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def bert_oracle(model: Any) -> Net:
    """The same as a list of nodes, of tokens and their types."""
    embed, block = model.bert.embeddings, model.bert.encoder.layer[0]
    attention, made = block.attention.self, block.attention.output
    p = Program(2)
    h = p("norm", p(add, p(add, p("words", 0), p("types", 1)), "positions"))
    heads_of = p(full, p("q", h), p("k", h), p("v", h))
    h = p("norm1", p(add, p("o", heads_of), h))
    h = p("norm2", p(add, p("down", p(F.gelu, p("up", h))), h))
    p("head", p(torch.tanh, p("pool", p(lambda x: x[:, 0], h))))
    layers = {
        "words": embed.word_embeddings, "types": embed.token_type_embeddings,
        "norm": embed.LayerNorm, "q": attention.query, "k": attention.key, "v": attention.value,
        "o": made.dense, "norm1": made.LayerNorm, "up": block.intermediate.dense,
        "down": block.output.dense, "norm2": block.output.LayerNorm,
        "pool": model.bert.pooler.dense, "head": model.classifier,
    }  # fmt: skip
    positions = embed.position_embeddings.weight.detach()[:T].clone()
    return Net(layers, p, {"positions": positions})


@pytest.mark.parametrize("value", ["low_rank", "moreau"])
def test_bert_is_the_dense_recursion(value: str) -> None:
    model = bert()
    net = bert_oracle(model)
    inputs = (torch.tensor([[1, 2], [3, 4], [5, 6], [1, 6], [2, 2]]), torch.zeros(5, T).long())
    reference: Any
    if value == "low_rank":
        y, loss, hessian = cross_entropy(inputs[0], 3)
        reference = DenseGraph(copy.deepcopy(net), inner(0.3, "identity"))
        step = lambda: reference.step(inputs, loss, hessian)  # noqa: E731
    else:
        loss, _, w, lines = problem(inputs, "cross_entropy")
        reference = MoreauGraph(copy.deepcopy(net), inner(0.3, "identity"))
        step = lambda: reference.step(inputs, loss, w, lines)  # noqa: E731
    choice = LowRank() if value == "low_rank" else Moreau()
    opt = DDPNOpt(model, lr=0.3, value=choice, gram="exact")
    with pytest.warns(DDPNOptWarning, match="position_embeddings' take.* plain step"):
        for _ in range(2):
            step()
            opt.zero_grad()
            loss(model(input_ids=inputs[0], token_type_ids=inputs[1]).logits).backward()
            opt.step()
    table = model.bert.embeddings.position_embeddings.weight[:T]
    assert_moved_alike(reference, net.layers, {"positions": table})
