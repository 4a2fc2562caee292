# SPDX-License-Identifier: MIT
"""Data that is no list of vectors with a class each: text, graphs, binary images.

Text and graphs are generated, so nothing here has a licence but the package's own; the images are
those of scikit-learn's digits. All is a function of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Characters of the generated text.
ALPHABET = " abcdefghijklmnopqrstuvwxyz,."
#: Characters of a sequence.
LENGTH = 32
#: Nodes of a graph.
NODES = 16

_NOUNS = ("dog", "child", "king", "sailor", "river", "stone", "garden", "teacher", "song", "house")
_LIVING = ("dog", "child", "king", "sailor", "teacher")
_VERBS = ("see", "hear", "find", "follow", "remember", "praise", "leave")
_RESTS = ("sleep", "wait", "sing", "vanish", "shine")
_ADJECTIVES = ("old", "small", "quiet", "green", "lonely", "bright")
_IRREGULAR = {"child": "children"}


@dataclass(frozen=True)
class Samples:
    """Inputs and targets of a task.

    Attributes:
        x: Inputs (N, ...).
        y: Targets (N, ...).
        classes: Number of classes that a target is one of.
        origin: Where they come from.
    """

    x: Tensor
    y: Tensor
    classes: int
    origin: str = "generated"


def _noun_phrase(rng: random.Random, depth: int) -> tuple[str, bool]:
    plural, noun = rng.random() < 0.4, rng.choice(_NOUNS)
    words = ["the"] if plural else [rng.choice(("the", "a", "every"))]
    if rng.random() < 0.4:
        words.append(rng.choice(_ADJECTIVES))
    words.append(_IRREGULAR.get(noun, noun + "s") if plural else noun)
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    if depth and rng.random() < 0.3:
        words.append("that " + _verb_phrase(rng, plural, depth - 1))
    return " ".join(words), plural


def _verb_phrase(rng: random.Random, plural: bool, depth: int) -> str:
    ending = "" if plural else "s"
    if rng.random() < 0.35:
        rest = rng.choice(_RESTS)
        return rest + ("es" if ending and rest.endswith("sh") else ending)
    return rng.choice(_VERBS) + ending + " " + _noun_phrase(rng, depth)[0]


def text(characters: int, seed: int = 0) -> str:
    """Write sentences of a small grammar: number agrees between subject and verb.

    Args:
        characters: Length of the text.
        seed: Seed of the choices.

    Returns:
        Text of the characters of `ALPHABET`.
    """
    rng, parts, length = random.Random(seed), [], 0
    while length < characters:
        subject, plural = _noun_phrase(rng, 2)
        parts.append(f"{subject} {_verb_phrase(rng, plural, 2)}. ")
        length += len(parts[-1])
    return "".join(parts)[:characters]


def encode(characters: str) -> Tensor:
    """Indices of the characters in `ALPHABET`, int64."""
    return torch.tensor([ALPHABET.index(c) for c in characters])


def grammar(count: int, seed: int) -> Samples:
    """Sequences of generated text; the target of every character is the next one.

    Args:
        count: Number of sequences of `LENGTH` characters.
        seed: Seed of the text.

    Returns:
        x and y (count, LENGTH), int64.
    """
    tokens = encode(text(count * LENGTH + 1, seed))
    shape = (count, LENGTH)
    return Samples(tokens[:-1].reshape(shape), tokens[1:].reshape(shape), len(ALPHABET))


def _random_graph(rng: random.Random) -> set[tuple[int, int]]:
    pairs = [(i, j) for i in range(NODES) for j in range(i)]
    return set(rng.sample(pairs, 2 * NODES))


def _small_world(rng: random.Random) -> set[tuple[int, int]]:
    # A ring with chords to the second neighbours, an edge in eight moved elsewhere.
    edges = {(i, (i + k) % NODES) for i in range(NODES) for k in (1, 2)}
    for edge in sorted(edges):
        if rng.random() < 0.125:
            edges.discard(edge)
            edges.add((edge[0], rng.choice([j for j in range(NODES) if j != edge[0]])))
    return edges


def _hubs(rng: random.Random) -> set[tuple[int, int]]:
    # Every new node is tied to two old ones, drawn by their degree.
    edges, ends = {(0, 1), (1, 2), (0, 2)}, [0, 1, 0, 2, 1, 2]
    for node in range(3, NODES):
        for other in {rng.choice(ends), rng.choice(ends)}:
            edges.add((node, other))
            ends += [node, other]
    return edges


def _communities(rng: random.Random) -> set[tuple[int, int]]:
    half = NODES // 2
    pairs = [(i, j) for i in range(NODES) for j in range(i)]
    inside = [(i, j) for i, j in pairs if (i < half) == (j < half)]
    across = [(i, j) for i, j in pairs if (i < half) != (j < half)]
    return set(rng.sample(inside, 2 * NODES - 4)) | set(rng.sample(across, 4))


_GRAPHS = (_random_graph, _small_world, _hubs, _communities)


def graphs(count: int, seed: int) -> Samples:
    """Graphs of `NODES` nodes and about twice as many edges; the class is how they were made.

    Random edges, a rewired ring, growth by preferential attachment, two communities. A node's
    only feature is a constant: what can be learned lies in the edges.

    Args:
        count: Number of graphs.
        seed: Seed of the graphs.

    Returns:
        x (count, NODES, NODES + 1): adjacency and feature, float32; y (count,), int64.
    """
    rng = random.Random(seed)
    labels = [rng.randrange(len(_GRAPHS)) for _ in range(count)]
    x = torch.zeros(count, NODES, NODES + 1)
    x[..., NODES] = 1.0
    for number, label in enumerate(labels):
        order = rng.sample(range(NODES), NODES)
        for i, j in _GRAPHS[label](rng):
            x[number, order[i], order[j]] = x[number, order[j], order[i]] = 1.0
    return Samples(x, torch.tensor(labels), len(_GRAPHS))


def binary_digits(count: int, seed: int) -> Samples:
    """Images of scikit-learn's digits with pixels 0 and 1, to be reconstructed.

    Args:
        count: Number of images, at most 1797.
        seed: Seed of the choice.

    Returns:
        x (count, 64), float32, and y = x.

    Raises:
        ValueError: More images are asked for than there are.
    """
    from sklearn.datasets import load_digits

    images = torch.as_tensor(load_digits().data >= 8.0).float()
    if count > len(images):
        raise ValueError(f"there are {len(images)} digits, {count} asked for")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = images[order[:count]]
    return Samples(x, x, 2, "scikit-learn")


def sentences(count: int, seed: int) -> Samples:
    """Sentences cut or filled to `LENGTH` characters; four classes to be told apart.

    The class is what the sentence is about, a living being or a thing, and whether there are
    several of them.

    Args:
        count: Number of sentences.
        seed: Seed of the text.

    Returns:
        x (count, LENGTH), int64; y (count,), int64.
    """
    rng, x, y = random.Random(seed), [], []
    for _ in range(count):
        subject, plural = _noun_phrase(rng, 0)
        noun = next(n for n in _NOUNS if _IRREGULAR.get(n, n + "s") in subject or n in subject)
        line = f"{subject} {_verb_phrase(rng, plural, 0)}"
        x.append(encode(line[:LENGTH].ljust(LENGTH)))
        y.append(2 * int(noun in _LIVING) + int(plural))
    return Samples(torch.stack(x), torch.tensor(y), 4)


def friedman(count: int, seed: int) -> Samples:
    """Friedman's first regression problem: a sine, a square and two linear terms of 10 inputs.

    Args:
        count: Number of samples.
        seed: Seed of inputs and noise.

    Returns:
        x (count, 10) and y (count, 1), float32, of mean 0 and variance 1.
    """
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(count, noise=1.0, random_state=seed)
    y = (y - y.mean()) / y.std()
    inputs = (torch.as_tensor(x) - 0.5) * 12**0.5
    return Samples(inputs.float(), torch.as_tensor(y).float()[:, None], 1, "scikit-learn")


#: Makers (number of samples, seed) of the tasks, by name.
TASKS: dict[str, Callable[[int, int], Samples]] = {
    "sentences": sentences,
    "friedman": friedman,
    "grammar": grammar,
    "graphs": graphs,
    "digits-binary": binary_digits,
}
