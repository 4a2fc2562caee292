# SPDX-License-Identifier: MIT
"""Training a network, and its gain matrices by singular values and images (Algorithm 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddpnopt import DDPNOpt, feedback_gains
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.models import build_model
from ddpnopt.experiments.optimizers import Options, build_optimizer
from ddpnopt.experiments.policies import Triplets, singular_triplets
from ddpnopt.gains import Gain


def trained(
    data: Dataset,
    architecture: str,
    optimizer: str,
    lr: float,
    options: Options,
    *,
    epochs: int,
    batch: int,
    seed: int,
) -> tuple[nn.Module, float]:
    """Train a network with cross-entropy, on one thread.

    Args:
        data: What to train on.
        architecture: Name of the network.
        optimizer: Registry name.
        lr: Learning rate.
        options: The optimizer's options.
        epochs: Passes over the training part.
        batch: Samples per step.
        seed: Of weights and order; torch's global generator is left as it was.

    Returns:
        The network, without the optimizer's hooks, and its test accuracy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(architecture, data.input_shape, data.classes)
            built = build_optimizer(optimizer, model, lr, options).optimizer
            order = torch.Generator().manual_seed(seed)
            for _ in range(epochs):
                permutation = torch.randperm(len(data.y_train), generator=order)
                for index in torch.split(permutation, batch):
                    built.zero_grad()
                    loss = nn.functional.cross_entropy(
                        model(data.x_train[index]), data.y_train[index]
                    )
                    loss.backward()  # type: ignore[no-untyped-call]
                    built.step()
            if isinstance(built, DDPNOpt):
                built.detach()
            with torch.no_grad():
                answers = torch.cat([model(x).argmax(1) for x in torch.split(data.x_test, 1000)])
    finally:
        torch.set_num_threads(threads)
    return model, float((answers == data.y_test).double().mean())


def first_of_classes(data: Dataset, number: int) -> list[int]:
    """Indices of the first test samples of the first `number` classes that occur."""
    found: dict[int, int] = {}
    for index, label in enumerate(data.y_test.tolist()):
        found.setdefault(label, index)
    return [found[label] for label in sorted(found)[:number]]


def layers_of_interest(model: nn.Module, gains: dict[str, Gain]) -> dict[str, Gain]:
    """The convolutions' gains, in order; all gains of a network without convolutions."""
    modules = dict(model.named_modules())
    found = {n: gain for n, gain in gains.items() if isinstance(modules[n], nn.Conv2d)}
    return found or gains


def pictures(
    model: nn.Module,
    data: Dataset,
    samples: Sequence[int],
    *,
    value: str,
    step: float,
    triplets: int,
    vectors: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Look at the gain matrices of some test samples.

    Args:
        model: The trained network; its weights stay.
        data: Where the samples come from.
        samples: Indices into the test part, one pass each: a batch of one.
        value: Value function of the gains.
        step: Learning rate of the policy.
        triplets: Singular values to compute, at most.
        vectors: Right-singular vectors to pull back to the input.
        seed: Of Lanczos' starting vector.

    Returns:
        For each sample: label, prediction, input, and for each layer its name, shape, state shape,
        singular values, and images of the input's shape (pulled-back leading vectors).
    """
    found = []
    with DDPNOpt(model, lr=step, value=value, terminal="cross_entropy") as optimizer:
        for index in samples:
            x, y = data.x_test[index : index + 1], data.y_test[index : index + 1]
            optimizer.zero_grad()
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            loss.backward()  # type: ignore[no-untyped-call]
            answer = torch.softmax(outputs.detach(), 1)[0]
            gains = layers_of_interest(model, feedback_gains(optimizer))
            layers = [_layer(name, g, triplets, vectors, seed) for name, g in gains.items()]
            optimizer.zero_grad()
            found.append(
                {
                    "label": int(y),
                    "predicted": int(answer.argmax()),
                    "probability": float(answer.max()),
                    "input": x[0].tolist(),
                    "layers": layers,
                }
            )
    return found


def _leading(gain: Gain, number: int, seed: int) -> Triplets:
    """The leading triplets; zeros where K is zero, as behind dead units, which Lanczos refuses."""
    start = torch.randn(gain.shape[0], generator=torch.Generator().manual_seed(seed))
    if gain.rmatvec(start).any():
        return singular_triplets(gain, number, seed)
    U, X = gain.shape
    return Triplets(torch.zeros(number), torch.zeros(U, number), torch.zeros(X, number))


def _layer(name: str, gain: Gain, triplets: int, vectors: int, seed: int) -> dict[str, Any]:
    leading = _leading(gain, min(triplets, min(gain.shape) - 1), seed)
    images = []
    for column in range(min(vectors, leading.states.shape[1])):
        image = gain.to_input(leading.states[:, column])
        # A singular vector has no sign: the strongest pixel is made positive.
        flat = image.flatten()
        images.append((image * torch.sign(flat[flat.abs().argmax()])).tolist())
    return {
        "layer": name,
        "shape": list(gain.shape),
        "state": list(gain.state),
        "values": leading.values.tolist(),
        "images": images,
    }
