# SPDX-License-Identifier: MIT
"""Sections into one HTML file: style and pictures inside, no scripts, nothing to load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from ddpnopt.experiments.page.sections import Section
from ddpnopt.experiments.reproduce.outcome import QUICK


def _packaged(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(
    sections: Sequence[Section],
    environment: Mapping[str, str],
    *,
    date: str,
    store: str,
    remarks: Sequence[str] = (),
) -> str:
    """Render the page.

    Args:
        sections: Results, in their order.
        environment: What and its value.
        date: When the page was made.
        store: Name of the store's file.
        remarks: Sentences for the top of the page, such as what the store holds besides.

    Returns:
        HTML; every text from outside is escaped.
    """
    engine = Environment(
        loader=FunctionLoader(_packaged),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return engine.get_template("report.html.j2").render(
        sections=sections,
        environment=environment,
        date=date,
        store=store,
        remarks=remarks,
        style=Markup(_packaged("style.css")),
        quick_text=QUICK,
        any_quick=any(s.quick for s in sections),
        shown=[s for s in sections if s.state in ("complete", "incomplete")],
    )
