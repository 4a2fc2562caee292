# SPDX-License-Identifier: MIT
"""One HTML page of all results: nothing in it comes from elsewhere, so it can be kept and sent."""

from ddpnopt.experiments.page.environment import environment
from ddpnopt.experiments.page.render import render
from ddpnopt.experiments.page.sections import Section, failed_section, section

__all__ = ["Section", "environment", "failed_section", "render", "section"]
