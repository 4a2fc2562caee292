# SPDX-License-Identifier: MIT
"""The command `ddpnopt explain`."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from ddpnopt.experiments.models import ARCHITECTURE_HELP, build_model
from ddpnopt.explain import HEADINGS, Explanation, explain


def explain_command(
    model: Annotated[
        str, typer.Argument(help=f"{ARCHITECTURE_HELP}; or package.module:factory of your own.")
    ] = "mlp-20x4-tanh",
    shape: Annotated[
        str, typer.Option("--input", help="Shape of a batch, such as 8,3,32,32.")
    ] = "16,64",
    classes: Annotated[int, typer.Option("--classes", min=1, help="Outputs.")] = 10,
    vocabulary: Annotated[
        int | None, typer.Option("--int", min=1, help="Inputs are integers below this.")
    ] = None,
) -> None:
    """Say which feedback each layer of a model gets, and what a step costs."""
    try:
        sizes = tuple(int(part) for part in shape.split(","))
        if min(sizes) < 1:
            raise ValueError(f"--input {shape}: sizes must be positive, such as 8,3,32,32")
        net = _own(model) if ":" in model else build_model(model, sizes[1:], classes)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise typer.BadParameter(str(error)) from error
    x = torch.randn(sizes) if vocabulary is None else torch.randint(vocabulary, sizes)
    try:
        found = explain(net, x)
    except (RuntimeError, ValueError) as error:
        raise typer.BadParameter(f"{model} with an input of {shape}: {error}") from error
    _show(found)


def _own(path: str) -> nn.Module:
    """A module, or what a factory without arguments returns, by its import path."""
    module_name, _, attribute = path.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    finally:
        sys.path.remove("")
    made = found if isinstance(found, nn.Module) else found()
    if not isinstance(made, nn.Module):
        raise TypeError(f"{path} is no torch.nn.Module, but a {type(made).__name__}")
    return made


def _show(found: Explanation) -> None:
    console = Console()
    table = Table()
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number in (4, 5, 6) else "left")
    for cells in found.cells():
        table.add_row(*cells)
    console.print(table)
    console.print(found.summary(), highlight=False, soft_wrap=True)
