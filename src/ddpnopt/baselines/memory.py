# SPDX-License-Identifier: MIT
"""How much memory a sweep over the augmented state takes, and how much there is."""

from __future__ import annotations

import os

import torch

from ddpnopt.step import Step
from ddpnopt.value import Augmented, LowRank

#: Square matrices of a state's size that a backup holds at once.
COPIES = 6


def check_memory(step: Step, value: Augmented, limit: int | None) -> None:
    """Refuse a sweep that does not fit, before it starts.

    Raises:
        MemoryError: With the bytes it needs, and those there are.
    """
    needed = bytes_needed(step, value)
    device = next(iter(step.layers.values())).blocks[0].x.device
    there = free_memory(device) if limit is None else limit
    if needed > there:
        raise MemoryError(
            f"VanillaDDP: a sweep over this batch needs about {needed:,} bytes (matrices of the "
            f"augmented state), and {there:,} may be used; nothing was changed. Use a smaller "
            "batch, form='low_rank' with dynamics='first_order', DDPNOpt, or raise memory="
        )


def bytes_needed(step: Step, value: Augmented) -> int:
    """Bytes of the largest layer's matrices and of all values and policies that are kept."""
    largest, kept = 0, 0
    for layer in step.layers.values():
        samples = sum(layer.counts)
        H = sum(s.G.numel() for s in layer.blocks if s.G is not None)
        X = sum(s.x.numel() for s in layer.blocks)
        U = sum(p.numel() for p in layer.params.values())
        if isinstance(value.inner, LowRank):
            R = 1 + sum(len(s.Z_h) * n for s, n in layer.pairs() if s.Z_h is not None)
            entries, policy = COPIES * R * R + 3 * R * U, 2 * R * R
        else:
            entries, policy = COPIES * max(H, X) ** 2 + 3 * H * U, 2 * H * H
            if value.segments:
                entries += 3 * U * X + samples * (H // samples) ** 2
        size = layer.dtype.itemsize
        largest, kept = max(largest, entries * size), kept + policy * size
    return largest + kept


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    if pages not in names:
        return 2**63 - 1  # the system does not tell
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
