# SPDX-License-Identifier: MIT
"""The flow's coefficient along the exact softmax line beside that along the logistic line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
Slope = Callable[[float], float]


def lines(z: np.ndarray, label: int) -> tuple[Slope, Slope]:
    """Slopes of the exact and of the logistic line, over the predicted change of the loss."""
    p = np.exp(z - z.max())
    p /= p.sum()
    g = p - np.eye(len(z))[label]
    square, mean = g @ g, p @ g
    bound = 1 + (g.max() - mean) / square
    kappa = p @ (g - mean) ** 2 / square**2
    omega = kappa * bound / (bound - 1)

    def exact(delta: float) -> float:
        w = z + delta * g / square
        w = np.exp(w - w.max())
        return float((w @ g / w.sum() - g[label]) / square)

    def logistic(delta: float) -> float:
        return float(bound / (1 + np.exp(-(omega * delta - np.log(bound - 1)))))

    return exact, logistic


def coefficient(slope: Slope, length: float, steps: int = 800) -> float:
    """Mean slope of the flow of a length (midpoint rule)."""
    delta, h = 0.0, length / steps
    for _ in range(steps):
        delta -= h * slope(delta - h * slope(delta) / 2)
    return -delta / length


def main() -> None:
    """Print the means over twelve samples."""
    rng = np.random.default_rng(0)
    for classes in (3, 10, 100, 1000):
        for scale in (0.0, 3.0):
            found = []
            for _ in range(12 if scale else 1):
                pair = lines(scale * rng.standard_normal(classes), int(rng.integers(classes)))
                found.append([[coefficient(one, S) for one in pair] for S in LENGTHS])
            means = np.mean(found, 0)
            text = "  ".join(
                f"S {S:g}: {a:.2f} / {b:.2f}" for S, (a, b) in zip(LENGTHS, means, strict=True)
            )
            print(f"{classes:5} classes, logits of deviation {scale:g}: exact / logistic  {text}")


if __name__ == "__main__":
    main()
