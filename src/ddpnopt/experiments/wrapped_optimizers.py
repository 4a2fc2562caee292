# SPDX-License-Identifier: MIT
"""Torch's optimizers with `ddpnopt.Feedback` around them, for the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import ddpnopt
from ddpnopt.experiments.names import call, lookup, split
from ddpnopt.value import VALUES

#: Makes the optimizers of a model's parameters from a rate and options.
Inner = Callable[..., list[torch.optim.Optimizer]]


def _torch(kind: Callable[..., torch.optim.Optimizer], **defaults: Any) -> Inner:
    def build(model: nn.Module, lr: float, options: Mapping[str, Any]) -> list[Any]:
        return [call(kind, model.parameters(), lr, options={**defaults, **options})]

    return build


def _muon(model: nn.Module, lr: float, options: Mapping[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between input and output, AdamW for all else, at one rate."""
    if options:
        raise ValueError(f"muon takes no options, got {', '.join(options)}")
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)][1:-1]
    chosen = {id(w) for w in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    others: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr, weight_decay=0.0)]
    if not matrices:
        return others
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon needs torch 2.9 or newer; this is {torch.__version__}")
    muon = torch.optim.Muon(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, *others]


#: By the name that stands behind "feedback-".
INNERS: dict[str, tuple[str, Inner]] = {
    "sgd": ("SGD", _torch(torch.optim.SGD)),
    "momentum": ("SGD momentum", _torch(torch.optim.SGD, momentum=0.9)),
    "rmsprop": ("RMSprop", _torch(torch.optim.RMSprop)),
    "adam": ("Adam", _torch(torch.optim.Adam)),
    "adamw": ("AdamW", _torch(torch.optim.AdamW, weight_decay=0.0)),
    "nadam": ("NAdam", _torch(torch.optim.NAdam)),
    "adagrad": ("Adagrad", _torch(torch.optim.Adagrad)),
    "muon": ("Muon", _muon),
}


def feedback(name: str) -> Callable[[nn.Module, float, dict[str, Any]], torch.optim.Optimizer]:
    """A factory of `ddpnopt.Feedback` around the optimizer of that name.

    Args:
        name: A name in `INNERS`.

    Returns:
        Factory (model, lr, options); `feedback`, `mode`, `trust`, `value` and `value.<option>` are
        the wrapper's, all other options the inner optimizer's.
    """
    return partial(_feedback, INNERS[name][1])


#: Options of the wrapper.
_OWN = ("feedback", "mode", "terminal", "trust")


def _feedback(
    inner: Inner, model: nn.Module, lr: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    value_options, rest = split(options, "value")
    own: dict[str, Any] = {key: rest.pop(key) for key in _OWN if key in rest}
    value = lookup(VALUES, str(rest.pop("value", "moreau")), "value function")
    own["value"] = call(value, options=value_options)
    return ddpnopt.Feedback(model, inner(model, lr, rest), **own)
