# SPDX-License-Identifier: MIT
"""How the samples lie in a tensor, found from where one sample's gradient is not zero.

Everywhere else dimension 0 is samples times a fold: consecutive rows belong to one sample.
"""

from __future__ import annotations

import torch

from ddpnopt.typing import Tensor

#: Dimension 0 is samples times a fold; dimension 1 is the samples; dimension 0 is a fold times
#: samples, as in a sequence-first tensor whose first two dimensions have been joined.
ROWS, SECOND, MINOR = "rows", "second", "minor"
LAYOUTS = (ROWS, SECOND, MINOR)
#: All samples have a part in all of it.
SHARED = ""


def fits(t: Tensor, layout: str, samples: int) -> bool:
    """Whether a tensor can have a layout, by its shape."""
    if samples < 1 or t.dim() == 0:
        return False
    if layout == SECOND:
        return t.dim() > 1 and t.shape[1] == samples
    return t.shape[0] > 0 and t.shape[0] % samples == 0


def arranged(t: Tensor, layout: str, samples: int, axis: int = 0) -> Tensor:
    """A tensor with its samples in front, consecutive rows belonging to one.

    Args:
        t: The tensor.
        layout: How its samples lie.
        samples: B.
        axis: Where its own dimension 0 is: behind a leading axis of columns, 1.
    """
    if layout == SECOND:
        return t.movedim(axis + 1, axis)
    if layout == MINOR:
        parts = t.reshape(*t.shape[:axis], -1, samples, *t.shape[axis + 1 :])
        return parts.movedim(axis + 1, axis).reshape(t.shape)
    return t


def layouts_of(gradient: Tensor, samples: int, chosen: int) -> tuple[str, ...]:
    """The layouts in which only one sample's part of a gradient is not zero; maybe none.

    One probe may leave several: where the output sees the last position alone, the last sample's
    part looks alike in both orders of joined rows.

    Args:
        gradient: Of a function of one sample's output.
        samples: B.
        chosen: The sample.
    """
    hit, found = gradient.ne(0), []
    for layout in LAYOUTS:
        same = layout == MINOR and hit.dim() > 0 and hit.shape[0] == samples  # as in rows
        if not same and fits(hit, layout, samples):
            per_sample = arranged(hit, layout, samples).reshape(samples, -1).any(1)
            per_sample[chosen] = False
            if not bool(per_sample.any()):
                found.append(layout)
    return tuple(found)


def layouts_in_step(once: Tensor, weighted: Tensor, weights: Tensor) -> tuple[str, ...]:
    """The layouts in which each sample's part of a gradient is its own alone; maybe none.

    Args:
        once: Gradient of a function of the output.
        weighted: The same with each sample of the output weighted.
        weights: (B,).
    """
    samples, found = len(weights), []
    tolerance = max(1e-3, 8 * torch.finfo(once.dtype).eps)
    for layout in LAYOUTS:
        same = layout == MINOR and once.dim() > 0 and once.shape[0] == samples  # as in rows
        if same or not fits(once, layout, samples):
            continue
        alone, given = (arranged(g, layout, samples).reshape(samples, -1) for g in (once, weighted))
        own = alone * weights.to(alone)[:, None]
        if bool(((given - own).abs().amax(1) <= tolerance * own.abs().amax(1)).all()):
            found.append(layout)
    return tuple(found)
